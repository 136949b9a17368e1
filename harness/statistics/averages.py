"""Averages, standard errors and quantiles of margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import pandas as pd

from attacks.estimator import Status
from harness.statistics.excess import EXCESS_COLUMNS, own_excess

FOUND = (Status.FOUND.value, Status.FOUND_AFTER_NOISE.value)
# what statistics are given of the rows, besides "found": whether an image has a witness
READ = ("status", "distance", "attack_distance", "basins", "forwards", "backwards", "seconds")
Columns: TypeAlias = Mapping[str, np.ndarray]


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


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _count(rows: Columns, status: Status) -> int:
    return int((rows["status"] == status.value).sum())


# a column of the summary: a number of the rows of one epoch, split, subset, estimator, norm and domain, given as arrays
STATISTICS: dict[str, Callable[[Columns], float]] = {
    "count": lambda rows: len(rows["status"]),
    "found": lambda rows: int(rows["found"].sum()),
    "avg": lambda rows: _mean(rows["distance"][rows["found"]]),
    "se": lambda rows: standard_error(rows["distance"][rows["found"]]),
    "attack_avg": lambda rows: _mean(rows["attack_distance"][rows["found"]]),
    "attack_se": lambda rows: standard_error(rows["attack_distance"][rows["found"]]),
    "median": lambda rows: quantile(rows["distance"], 0.5),
    "q05": lambda rows: quantile(rows["distance"], 0.05),
    "q25": lambda rows: quantile(rows["distance"], 0.25),
    "q75": lambda rows: quantile(rows["distance"], 0.75),
    "q95": lambda rows: quantile(rows["distance"], 0.95),
    "forwards": lambda rows: _mean(rows["forwards"]),
    "backwards": lambda rows: _mean(rows["backwards"]),
    "seconds": lambda rows: float(rows["seconds"].sum()),
    "after_noise": lambda rows: _count(rows, Status.FOUND_AFTER_NOISE),
    "tied": lambda rows: _count(rows, Status.TIED),
    "not_found": lambda rows: _count(rows, Status.NOT_FOUND),
    "failed": lambda rows: _count(rows, Status.FAILED),
}
SUMMARY_COLUMNS = ("epoch", "split", "subset", "estimator", "norm", "domain", *STATISTICS, *EXCESS_COLUMNS)


def summarise(margins: pd.DataFrame) -> pd.DataFrame:
    """One row per epoch, split, subset, estimator and norm, in `SUMMARY_COLUMNS`.

    ``avg`` and ``se`` are over the images found (``found`` of ``count``). Ties are not among them; ``tied`` counts
    them. Quantiles are over all images: 0 for ties, +inf for images not found. Statistics of no image are NaN, and
    blank in the CSV. ``forwards`` and ``backwards`` are means per image. ``excess`` estimates by what share ``avg``
    exceeds the average margin, from ``excess_low`` to ``excess_high`` (see `harness.statistics.excess`); it is NaN for
    estimators that do not report ``basins``.

    Args:
        margins: rows in `harness.store.MARGIN_COLUMNS`.
    """
    rows = []
    keys = ["epoch", "split", "estimator", "norm", "domain"]
    for values, group in margins.groupby(keys, sort=False):
        key = dict(zip(keys, values, strict=True))
        for subset, chosen in (("all", group), ("correct", group[group.correct]), ("incorrect", group[~group.correct])):
            columns = {name: chosen[name].to_numpy() for name in READ}
            columns["found"] = np.isin(columns["status"], FOUND)
            numbers = {name: statistic(columns) for name, statistic in STATISTICS.items()}
            found = columns["found"]
            excess = own_excess(
                str(key["estimator"]), str(key["norm"]), columns["distance"][found], columns["basins"][found]
            )
            rows.append({**key, "subset": subset, **numbers, **excess})
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
