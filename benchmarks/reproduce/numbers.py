"""Numbers that decide claims: per run, estimator, norm and split; NaN if missing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.reproduce.stored import Stored
from harness.statistics.effects.effect import LEAST_IMAGES

# function of stored tables, run, estimator, norm and split
Number = Callable[[Stored, str, str, str, str], float]


def jump(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average at epoch 1 over that at epoch 0."""
    curve = stored.curve(run, estimator, norm, split)
    return _ratio(curve, 1, 0)


def later_peak(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Highest average after epoch 1 over that at epoch 1."""
    curve = stored.curve(run, estimator, norm, split)
    return float(curve[curve.index > 1].max() / curve.get(1, math.nan))


def change(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average at the last epoch over that at epoch 1."""
    curve = stored.curve(run, estimator, norm, split)
    return _ratio(curve, int(curve.index[-1]), 1)


def change_of(subset: str):  # type: ignore[no-untyped-def]
    """The same for the correct or the incorrect images of an epoch, if there are enough."""

    def value(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
        curve = stored.curve(run, estimator, norm, split, subset)
        if _few(stored, run, estimator, norm, split, subset):
            return math.nan
        return _ratio(curve, int(curve.index[-1]), 1)

    return value


def while_error_falls(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average at the epoch of the smallest test error over that at epoch 1; NaN if that is epoch 1."""
    errors = stored.errors(run, "test")
    best = int(errors[errors.index >= 1].idxmin())
    return math.nan if best == 1 else _ratio(stored.curve(run, estimator, norm, split), best, 1)


def largest_error(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Largest standard error over average from epoch 1 on."""
    share = stored.curve(run, estimator, norm, split, of="se") / stored.curve(run, estimator, norm, split)
    return float(share[share.index >= 1].max())


def errors_apart(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Largest over smallest standard error from epoch 1 on."""
    errors = stored.curve(run, estimator, norm, split, of="se")
    later = errors[errors.index >= 1]
    return float(later.max() / later.min())


def with_accuracy(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Correlation of average and accuracy over epochs from 1 on."""
    curve, errors = stored.curve(run, estimator, norm, split), stored.errors(run, split)
    both = pd.concat([curve, 1 - errors], axis=1, join="inner")
    both = both[both.index >= 1]
    return float(np.corrcoef(both.T)[0, 1])


def tau(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Kendall's tau of the average with epochs from 1 on."""
    curve = stored.curve(run, estimator, norm, split)
    later = curve[curve.index >= 1]
    return float(stats.kendalltau(later.index, later).statistic)


def own_change(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """The change of the correct images' average due to stayers, over the average at epoch 1."""
    group = next(group for group in stored.groups() if run in group.runs)
    own = stored.group(group.name, "composition")
    rows = own[
        (own["run"] == run)
        & (own["estimator"] == estimator)
        & (own["norm"] == norm)
        & (own["split"] == split)
        & (own["subset"] == "correct")
    ]
    first = stored.curve(run, estimator, norm, split, "correct").get(1, math.nan)
    return float(rows["stayers"].sum() / first) if len(rows) else math.nan


def incorrect_errors(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Standard error of the incorrect images at the last epoch over that of the correct ones."""
    if _few(stored, run, estimator, norm, split, "incorrect"):
        return math.nan
    wrong, right = (stored.curve(run, estimator, norm, split, s, "se") for s in ("incorrect", "correct"))
    return float(wrong.iloc[-1] / right.iloc[-1]) if len(wrong) and len(right) else math.nan


def spread_of_incorrect(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Variance of the incorrect images' margins at the last epoch over that of the correct ones'."""
    parts = []
    for subset in ("incorrect", "correct"):
        errors, found = (stored.curve(run, estimator, norm, split, subset, of) for of in ("se", "found"))
        enough = not _few(stored, run, estimator, norm, split, subset)
        parts.append(errors.iloc[-1] ** 2 * found.iloc[-1] if enough else math.nan)
    return float(parts[0] / parts[1])


def peak_epoch(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """The epoch of the highest average from epoch 1 on."""
    curve = stored.curve(run, estimator, norm, split)
    return float(curve[curve.index >= 1].idxmax())


def confidence_of_incorrect(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average confidence of the set's incorrect images at the last epoch."""
    own = stored.run(run, "confidence")
    rows = own[(own["split"] == split) & ~own["correct"].astype(bool)].sort_values("epoch")
    return float(rows["confidence"].iloc[-1]) if len(rows) else math.nan


def first_mistakes_mended(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Share of the images incorrect at epoch 1 that are correct at the last epoch."""
    own = stored.run(run, "flow")
    return float(own.loc[own["split"] == split, "of_first_now_correct"].iloc[-1])


def still_incorrect(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Median over epochs from 2 on of the share of incorrect images that were incorrect at the previous epoch."""
    own = stored.run(run, "flow")
    rows = own[(own["split"] == split) & (own["epoch"] >= 2) & (own["incorrect"] > 0)]
    return float((rows["incorrect_before"] / rows["incorrect"]).median())


def crossed(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Share of random directions that change the class within ten times the margin, at the last epoch measured."""
    own = stored.run(run, "directions")
    if not len(own) or estimator != "deepfool":
        return math.nan
    rows = own[(own["norm"] == norm) & (own["split"] == split) & (own["times"] == 10)].sort_values("epoch")
    return float(rows["crossed"].iloc[-1]) if len(rows) else math.nan


def against_standard(number: Number) -> Number:
    """A number of an adversarial run over that of the standard run of the same group and seed."""

    def value(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
        plain = run.replace("-pgd", "-standard")
        return float(number(stored, run, estimator, norm, split) / number(stored, plain, estimator, norm, split))

    return value


def last_average(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average at the last epoch."""
    return float(stored.curve(run, estimator, norm, split).iloc[-1])


def beyond_forty(stored: Stored, run: str, estimator: str, norm: str, split: str) -> float:
    """Average at the last epoch over that at epoch 40."""
    curve = stored.curve(run, estimator, norm, split)
    return _ratio(curve, int(curve.index[-1]), 40)


def _few(stored: Stored, run: str, estimator: str, norm: str, split: str, subset: str) -> bool:
    """Whether there are fewer images than a test needs at the last epoch or at epoch 1."""
    found = stored.curve(run, estimator, norm, split, subset, "found")
    return bool(min(found.get(1, 0), found.iloc[-1] if len(found) else 0) < LEAST_IMAGES)


def _ratio(curve: pd.Series, epoch: int, other: int) -> float:
    return float(curve.get(epoch, math.nan) / curve.get(other, math.nan))
