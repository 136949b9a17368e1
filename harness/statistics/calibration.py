"""Reliability diagrams and calibration errors: confidence against accuracy (Mickisch et al. 2020, section 4)."""

from __future__ import annotations

import numpy as np
import pandas as pd

BINS = 15
RELIABILITY_COLUMNS = ("epoch", "split", "bin", "low", "high", "count", "confidence", "accuracy")
CALIBRATION_COLUMNS = ("epoch", "split", "images", "ece", "overconfidence")


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Mean confidence and accuracy in 15 equal bins of confidence, in `RELIABILITY_COLUMNS`; NaN for empty bins.

    Guo et al. 2017, section 2: bin m of 15 is ``((m - 1) / 15, m / 15]``.

    Args:
        predictions: columns epoch, split, label, prediction, and confidence in (0, 1].
    """
    edges = np.linspace(0, 1, BINS + 1)
    tables = []
    for (epoch, split), rows in predictions.groupby(["epoch", "split"], sort=False, observed=True):
        confidence = rows["confidence"].to_numpy(dtype=float)
        correct = (rows["prediction"] == rows["label"]).to_numpy()
        places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        count = np.bincount(places, minlength=BINS)
        sums = (np.bincount(places, weights=value, minlength=BINS) for value in (confidence, correct))
        with_any = count > 0
        means = [np.divide(total, count, out=np.full(BINS, np.nan), where=with_any) for total in sums]
        bins = {"bin": np.arange(BINS), "low": edges[:-1], "high": edges[1:], "count": count}
        key = {"epoch": epoch, "split": str(split)}
        tables.append(pd.DataFrame({**key, **bins, "confidence": means[0], "accuracy": means[1]}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(RELIABILITY_COLUMNS))


def calibration_error(bins: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error and overconfidence per epoch and split, in `CALIBRATION_COLUMNS`.

    ``ece = sum_m (n_m / n) |accuracy_m - confidence_m|`` (Guo et al. 2017, eq. 3).
    ``overconfidence = sum_m (n_m / n) (confidence_m - accuracy_m)`` is positive where the mean confidence is above
    the accuracy.

    Args:
        bins: rows of `reliability`.
    """
    rows = []
    for (epoch, split), group in bins.groupby(["epoch", "split"], sort=False):
        weight = group["count"] / group["count"].sum()
        excess = group["confidence"] - group["accuracy"]
        facts = {"images": int(group["count"].sum()), "ece": float((weight * excess.abs()).sum())}
        rows.append({"epoch": epoch, "split": split, **facts, "overconfidence": float((weight * excess).sum())})
    return pd.DataFrame(rows, columns=list(CALIBRATION_COLUMNS))
