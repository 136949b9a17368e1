"""Trends of a curve over epochs: rank correlation, slope, peak. No p-values, because epochs are autocorrelated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from harness.statistics.panels import Panel

DESCRIPTION_COLUMNS = (
    *("observation", "name", "run", "estimator", "norm", "split", "measure", "epochs", "value", "low", "high"),
    *("images", "note"),
)


def describe(
    observation: int,
    name: str,
    panel: Panel,
    epochs: str,
    value: float,
    note: str = "",
    *,
    low: float = math.nan,
    high: float = math.nan,
    images: int | None = None,
) -> dict[str, Any]:
    """A number without a verdict, in `DESCRIPTION_COLUMNS`; ``images`` defaults to the number of the panel's images."""
    key = {"observation": observation, "name": name, "run": panel.run, "estimator": panel.estimator}
    where = {"norm": panel.norm, "split": panel.split, "measure": panel.measure, "epochs": epochs}
    count = len(panel.images) if images is None else images
    return key | where | {"value": value, "low": low, "high": high, "images": count, "note": note}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r over the pairs of finite values; NaN for fewer than three pairs or a constant argument."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 3 or np.ptp(first[both]) == 0 or np.ptp(second[both]) == 0:
        return math.nan
    return float(np.corrcoef(first[both], second[both])[0, 1])


def kendall(epochs: np.ndarray, averages: np.ndarray) -> float:
    """Kendall's tau-b of averages with epochs; NaN where it is undefined."""
    found = np.isfinite(averages)
    if found.sum() < 3 or np.ptp(averages[found]) == 0:
        return math.nan
    return float(stats.kendalltau(epochs[found], averages[found]).statistic)


def theil_sen(epochs: np.ndarray, averages: np.ndarray) -> float:
    """Median slope per epoch over all pairs of epochs; NaN for fewer than two averages."""
    found = np.isfinite(averages)
    if found.sum() < 2:
        return math.nan
    x, y = epochs[found], averages[found]
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def slopes(panel: Panel, epochs: np.ndarray) -> np.ndarray:
    """``(N,)`` least-squares slope per epoch of every image's margin; NaN where a distance is missing.

    The slope of an average curve is the average of its images' slopes, so images can be resampled.
    """
    values = panel.values[:, [panel.column(epoch) for epoch in epochs]]
    centred = epochs - epochs.mean()
    return np.asarray(values @ (centred / np.square(centred).sum()))


def describe_trend(observation: int, panel: Panel, errors: pd.DataFrame) -> list[dict[str, Any]]:
    """Trend of the average from epoch 1 on, its peak, and its correlation with the accuracy.

    Args:
        errors: rows of ``epochs.csv``; without rows of the split, the accuracy is that of the probe images.
    """
    later = panel.later
    if not len(later):
        return []
    averages = panel.averages[panel.epochs >= 1]
    span = f"{later[0]} → {later[-1]}"
    accuracy = _accuracy(panel, errors)[panel.epochs >= 1]
    rows = [
        describe(observation, "Kendall's tau of the average with epochs", panel, span, kendall(later, averages)),
        describe(observation, "Theil-Sen slope of the average, an epoch", panel, span, theil_sen(later, averages)),
        describe(observation, "correlation of the average with accuracy", panel, span, correlation(averages, accuracy)),
        describe(
            observation,
            "correlation of their changes from epoch to epoch",
            panel,
            span,
            correlation(np.diff(averages), np.diff(accuracy)),
        ),
    ]
    if np.isfinite(averages).any():
        peak = int(later[np.nanargmax(averages)])
        note = f"at epoch {peak}; only reported: chosen after looking, it would make any noise decline"
        rows.append(describe(observation, "peak of the average", panel, span, float(np.nanmax(averages)), note))
    return rows


def _accuracy(panel: Panel, errors: pd.DataFrame) -> np.ndarray:
    known = errors[errors["split"] == panel.split].set_index("epoch")["error"]
    if not len(known):
        return np.asarray(panel.correct.mean(axis=0))
    return 1 - known.reindex(panel.epochs).to_numpy(dtype=float)
