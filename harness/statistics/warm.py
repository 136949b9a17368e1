"""Warm starts compared with cold starts of the same estimator: passes saved, and dependence on the path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from attacks.estimator import Status
from harness.runs import Run
from harness.statistics.averages import FOUND
from harness.statistics.effects.paired import LogMeans
from harness.statistics.trust import bias_trend

WARM_COLUMNS = (
    *("epoch", "start", "split", "estimator", "cold", "norm", "ratio", "low", "high", "images"),
    *("nearer", "farther", "lost", "passes", "cold_passes"),
)
SAVING_COLUMNS = (
    *("estimator", "cold", "norm", "split", "passes", "cold_passes", "saved", "net", "nearer", "farther", "lost"),
    *("first_epoch", "first", "last_epoch", "last", "low", "high", "apart", "verdict"),
)
# relative, of distances and of the number of images: differences within it count as level
EQUIVALENCE = 0.01
LEVEL, NEARER, FARTHER, UNDECIDED = "level", "nearer", "farther", "undecided"


def warm_pairs(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Text of every warm-started estimator -> text of its cold form; an empty text where the run has no cold form.

    Args:
        entries: the manifest's estimators, with ``estimator``, ``name`` and ``parameters``.
    """
    warm: dict[str, tuple[str, str]] = {}
    cold: dict[str, tuple[str, str]] = {}
    for entry in entries:
        parameters = dict(entry.get("parameters", {}))
        if "warm" in parameters:
            kept = warm if parameters.pop("warm") else cold
            kept[entry["estimator"]] = str(entry.get("name")), json.dumps(parameters, sort_keys=True)
    texts = {facts: text for text, facts in cold.items()}
    return {text: texts.get(facts, "") for text, facts in warm.items()}


def warm_ratios(margins: pd.DataFrame, pairs: Mapping[str, str]) -> pd.DataFrame:
    """Average warm over average cold distance at every epoch that has both, with its 95% interval, in `WARM_COLUMNS`.

    The averages are over the images that both found. ``nearer`` and ``farther`` are shares of the images that either
    found: those with a warm distance that is more than 1% smaller or larger than the cold distance. ``lost`` is the
    share that only the cold form found; these images also count as farther. ``start`` is the epoch of the witnesses
    that were started from; blank for the first epoch.

    Args:
        margins: rows of `harness.store.MARGIN_COLUMNS`.
        pairs: see `warm_pairs`.
    """
    keys = ["epoch", "split", "norm", "image"]
    table = []
    for estimator, cold in pairs.items():
        warm_rows, cold_rows = (margins[margins["estimator"] == text] for text in (estimator, cold))
        for (epoch, split, norm), rows in warm_rows.merge(cold_rows, on=keys, suffixes=("", "_cold")).groupby(
            ["epoch", "split", "norm"], sort=False
        ):
            before = warm_rows.loc[(warm_rows["norm"] == norm) & (warm_rows["epoch"] < epoch), "epoch"]
            where = {"epoch": epoch, "start": before.max() if len(before) else pd.NA, "split": split}
            who = {"estimator": estimator, "cold": cold, "norm": norm}
            table.append(where | who | _compare(rows))
    return pd.DataFrame(table, columns=list(WARM_COLUMNS)).astype({"start": "Int64"})


def _compare(rows: pd.DataFrame) -> dict[str, float]:
    distance, cold = rows["distance"].to_numpy(dtype=float), rows["distance_cold"].to_numpy(dtype=float)
    ours, theirs = (rows[name].isin(FOUND).to_numpy() for name in ("status", "status_cold"))
    either = (ours | theirs) & (rows["status"] != Status.TIED.value).to_numpy()
    ratio = LogMeans(np.where(ours & theirs, (distance, cold), np.nan).T, np.array([1.0, -1.0]))
    numbers = [ratio.estimate, *ratio.interval(0.05)] if ratio.images > 1 else [np.nan] * 3
    apart = {"nearer": distance < (1 - EQUIVALENCE) * cold, "farther": distance > (1 + EQUIVALENCE) * cold}
    return {
        **dict(zip(("ratio", "low", "high"), np.exp(numbers), strict=True)),
        "images": ratio.images,
        **{name: float(hit[either].mean()) if either.any() else np.nan for name, hit in apart.items()},
        "lost": float((theirs & ~ours)[either].mean()) if either.any() else np.nan,
        "passes": float((rows["forwards"] + rows["backwards"]).mean()),
        "cold_passes": float((rows["forwards_cold"] + rows["backwards_cold"]).mean()),
    }


def warm_savings(ratios: pd.DataFrame, margins: pd.DataFrame) -> pd.DataFrame:
    """Passes saved by each warm start, and its ratios, over the epochs at which it had a start, in `SAVING_COLUMNS`.

    ``saved`` is the share of the cold form's passes that is saved at the epochs where both were measured. ``net`` is
    that of the whole run, with the passes of the cold samples added, against the cold form at every epoch. ``first``
    and ``last`` are the ratios at those epochs; ``low`` and ``high`` are the interval of ``last``. ``apart``: see
    `bias_trend`. ``verdict`` is the first of these that applies:

    - ``farther``: a ratio is more than 1% above 1 with its interval above 1, or more than 1% of the images are lost;
    - ``level``: every interval is within 1% of 1;
    - ``nearer``: a ratio is more than 1% below 1 with its interval below 1;
    - ``undecided`` otherwise.

    Args:
        ratios: rows of `WARM_COLUMNS`.
        margins: all rows of the run.
    """
    trends = bias_trend(ratios[ratios["ratio"].notna()])
    moving = set(trends.loc[trends["apart"], ["estimator", "norm", "split"]].itertuples(index=False, name=None))
    savings = []
    for (estimator, cold, norm, split), rows in ratios.groupby(["estimator", "cold", "norm", "split"], sort=False):
        started = rows[rows["start"].notna() & rows["ratio"].notna()].sort_values("epoch")
        if not len(started):
            continue
        measured = margins[(margins["norm"] == norm) & (margins["split"] == split)]
        spent = measured.loc[measured["estimator"].isin([estimator, cold]), ["forwards", "backwards"]].to_numpy().sum()
        images = int((measured["estimator"] == estimator).sum())
        first, last = started.iloc[0], started.iloc[-1]
        means = started[["passes", "cold_passes", "nearer", "farther", "lost"]].mean()
        numbers = {
            "saved": 1 - means["passes"] / means["cold_passes"],
            "net": 1 - spent / (rows["cold_passes"].mean() * images),
            "apart": (estimator, norm, split) in moving,
            "verdict": _verdict(started),
        }
        ends = {"first_epoch": first["epoch"], "first": first["ratio"], "last_epoch": last["epoch"]}
        ends |= {"last": last["ratio"], "low": last["low"], "high": last["high"]}
        who = {"estimator": estimator, "cold": cold, "norm": norm, "split": split}
        savings.append(who | means.to_dict() | numbers | ends)
    return pd.DataFrame(savings, columns=list(SAVING_COLUMNS))


def _verdict(rows: pd.DataFrame) -> str:
    least, most = 1 - EQUIVALENCE, 1 + EQUIVALENCE
    if ((rows["ratio"] > most) & (rows["low"] > 1)).any() or (rows["lost"] > EQUIVALENCE).any():
        return FARTHER
    if ((rows["low"] > least) & (rows["high"] < most)).all():
        return LEVEL
    return NEARER if ((rows["ratio"] < least) & (rows["high"] < 1)).any() else UNDECIDED


def cold_samples(run: Run) -> dict[str, list[int]]:
    """Cold forms that were measured at fewer epochs than their warm form -> these epochs."""
    epochs = {str(text): set(rows["epoch"]) for text, rows in run.margins.groupby("estimator", sort=False)}
    pairs = warm_pairs(run.manifest.get("estimators", ()))
    return {
        cold: sorted(epochs[cold])
        for warm, cold in pairs.items()
        if cold in epochs and epochs[cold] < epochs.get(warm, set())
    }
