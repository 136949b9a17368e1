"""Averages, standard errors and quantiles of margins."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from attacks.estimator import Status

SUMMARY_COLUMNS = (
    "epoch",
    "split",
    "subset",
    "estimator",
    "norm",
    "domain",
    "count",
    "found",
    "avg",
    "se",
    "attack_avg",
    "attack_se",
    "median",
    "q05",
    "q25",
    "q75",
    "q95",
    "forwards",
    "backwards",
    "seconds",
    "after_noise",
    "tied",
    "not_found",
    "failed",
)
QUANTILES = {"median": 0.5, "q05": 0.05, "q25": 0.25, "q75": 0.75, "q95": 0.95}
FOUND = (Status.FOUND.value, Status.FOUND_AFTER_NOISE.value)


def standard_error(values: np.ndarray) -> float:
    """``(1/n) sqrt(sum (v - mean)^2)`` (Mickisch et al. 2020, section 3); NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.sqrt(np.square(values - values.mean()).sum()) / len(values))


def quantile(values: np.ndarray, q: float) -> float:
    """Linearly interpolated quantile of values that may be +inf (images not found); NaN for an empty array."""
    if not len(values):
        return math.nan
    ordered = np.sort(values)
    position = q * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    if not np.isfinite(high):
        return float(low) if position == math.floor(position) else math.inf
    return float(low + (position - math.floor(position)) * (high - low))


def summarise(margins: pd.DataFrame) -> pd.DataFrame:
    """One row per epoch, split, subset, estimator and norm, in `SUMMARY_COLUMNS`.

    ``avg`` and ``se`` are over the images found (``found`` of ``count``). Ties are not among them; ``tied`` counts
    them. Quantiles are over all images: 0 for ties, +inf for images not found. Statistics of no image are NaN, and
    blank in the CSV. ``forwards`` and ``backwards`` are means per image.

    Args:
        margins: rows in `harness.store.MARGIN_COLUMNS`.
    """
    rows = []
    keys = ["epoch", "split", "estimator", "norm", "domain"]
    for values, group in margins.groupby(keys, sort=False):
        key = dict(zip(keys, values, strict=True))
        for subset, chosen in (("all", group), ("correct", group[group.correct]), ("incorrect", group[~group.correct])):
            rows.append({**key, "subset": subset, **_describe(chosen)})
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def _describe(group: pd.DataFrame) -> dict[str, float]:
    status = group["status"].to_numpy()
    found = np.isin(status, FOUND)
    every, distance = group["distance"].to_numpy(), group["distance"].to_numpy()[found]
    attack_distance = group["attack_distance"].to_numpy()[found]
    return {
        "count": len(group),
        "found": int(found.sum()),
        "avg": _mean(distance),
        "se": standard_error(distance),
        "attack_avg": _mean(attack_distance),
        "attack_se": standard_error(attack_distance),
        **{name: quantile(every, q) for name, q in QUANTILES.items()},
        "forwards": _mean(group["forwards"].to_numpy()),
        "backwards": _mean(group["backwards"].to_numpy()),
        "seconds": float(group["seconds"].sum()),
        "after_noise": int((status == Status.FOUND_AFTER_NOISE.value).sum()),
        "tied": int((status == Status.TIED.value).sum()),
        "not_found": int((status == Status.NOT_FOUND.value).sum()),
        "failed": int((status == Status.FAILED.value).sum()),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
