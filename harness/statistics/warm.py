"""Warm starts against the same estimator cold: the passes saved, and whether margins depend on the path."""

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
# of the distance, and of the images: what is within it is level
EQUIVALENCE = 0.01
LEVEL, NEARER, FARTHER, UNDECIDED = "level", "nearer", "farther", "undecided"


def warm_pairs(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Text of every estimator that starts warm -> that of its cold form; empty where the run has none.

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
    """Average warm over average cold distance with its 95% interval at every epoch that has both, in `WARM_COLUMNS`.

    Over the images that both found. ``nearer`` and ``farther`` are the shares, of the images that either found, whose
    warm distance is by more than 1% the smaller or the larger; ``lost`` the share that only the cold one found, which
    are farther too. ``start`` is the epoch whose witnesses were started from, blank for the first.

    Args:
        margins: rows of `harness.store.MARGIN_COLUMNS`.
        pairs: see `warm_pairs`.
    """
    keys = ["epoch", "split", "norm", "image"]
    found = []
    for estimator, cold in pairs.items():
        own, other = (margins[margins["estimator"] == text] for text in (estimator, cold))
        for (epoch, split, norm), rows in own.merge(other, on=keys, suffixes=("", "_cold")).groupby(
            ["epoch", "split", "norm"], sort=False
        ):
            before = own.loc[(own["norm"] == norm) & (own["epoch"] < epoch), "epoch"]
            where = {"epoch": epoch, "start": before.max() if len(before) else pd.NA, "split": split}
            who = {"estimator": estimator, "cold": cold, "norm": norm}
            found.append(where | who | _compare(rows))
    return pd.DataFrame(found, columns=list(WARM_COLUMNS)).astype({"start": "Int64"})


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
    """What each warm start saved and did over the epochs that it had a start at, in `SAVING_COLUMNS`.

    ``saved`` is the part of the cold form's passes that is saved where it was measured beside; ``net`` that of the
    whole run, where the cold samples were spent as well, against the cold form at every epoch. ``first`` and ``last``
    are ratios, the interval the last one's. ``verdict``: ``level`` where every interval is within 1% of 1; else
    ``farther`` where a ratio is more than 1% above 1 with its interval above 1, or more than 1% of the images are
    lost; else ``nearer`` where one is as much below; else ``undecided``. ``apart``: see `bias_trend`.

    Args:
        ratios: rows of `WARM_COLUMNS`.
        margins: all rows of the run.
    """
    trends = bias_trend(ratios[ratios["ratio"].notna()])
    moving = set(trends.loc[trends["apart"], ["estimator", "norm", "split"]].itertuples(index=False, name=None))
    found = []
    for (estimator, cold, norm, split), rows in ratios.groupby(["estimator", "cold", "norm", "split"], sort=False):
        started = rows[rows["start"].notna() & rows["ratio"].notna()].sort_values("epoch")
        if not len(started):
            continue
        here = margins[(margins["norm"] == norm) & (margins["split"] == split)]
        spent = here.loc[here["estimator"].isin([estimator, cold]), ["forwards", "backwards"]].to_numpy().sum()
        images = int((here["estimator"] == estimator).sum())
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
        found.append(who | means.to_dict() | numbers | ends)
    return pd.DataFrame(found, columns=list(SAVING_COLUMNS))


def _verdict(rows: pd.DataFrame) -> str:
    least, most = 1 - EQUIVALENCE, 1 + EQUIVALENCE
    if ((rows["ratio"] > most) & (rows["low"] > 1)).any() or (rows["lost"] > EQUIVALENCE).any():
        return FARTHER
    if ((rows["low"] > least) & (rows["high"] < most)).all():
        return LEVEL
    return NEARER if ((rows["ratio"] < least) & (rows["high"] < 1)).any() else UNDECIDED


def cold_samples(run: Run) -> dict[str, list[int]]:
    """Cold forms beside warm ones that were measured at fewer epochs, and at which."""
    epochs = {str(text): set(rows["epoch"]) for text, rows in run.margins.groupby("estimator", sort=False)}
    pairs = warm_pairs(run.manifest.get("estimators", ()))
    return {c: sorted(epochs[c]) for w, c in pairs.items() if c in epochs and epochs[c] < epochs.get(w, set())}
