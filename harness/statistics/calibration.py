"""Calibration: whether confidence is the chance of being right (the paper's section 4)."""

from __future__ import annotations

import numpy as np
import pandas as pd

BINS = 15
RELIABILITY_COLUMNS = ("epoch", "split", "bin", "low", "high", "count", "confidence", "accuracy")
CALIBRATION_COLUMNS = ("epoch", "split", "images", "ece", "overconfidence")


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Confidence and accuracy in equal bins of confidence, in `RELIABILITY_COLUMNS`; NaN for empty bins.

    Guo et al. 2017, section 2: bin m of 15 is ``((m - 1) / 15, m / 15]``.

    Args:
        predictions: epoch, split, label, prediction, confidence in (0, 1].
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
        own = {"epoch": epoch, "split": str(split), **bins, "confidence": means[0], "accuracy": means[1]}
        tables.append(pd.DataFrame(own))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(RELIABILITY_COLUMNS))


def calibration_error(bins: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error over epochs, in `CALIBRATION_COLUMNS`.

    ``ece = sum_m (n_m / n) |accuracy_m - confidence_m|`` (Guo et al. 2017, eq. 3); ``overconfidence`` is the
    same sum without the bars and with the other sign: positive where the network is surer than right.
    """
    rows = []
    for (epoch, split), own in bins.groupby(["epoch", "split"], sort=False):
        weight = own["count"] / own["count"].sum()
        excess = own["confidence"] - own["accuracy"]
        facts = {"images": int(own["count"].sum()), "ece": float((weight * excess.abs()).sum())}
        rows.append({"epoch": epoch, "split": split, **facts, "overconfidence": float((weight * excess).sum())})
    return pd.DataFrame(rows, columns=list(CALIBRATION_COLUMNS))
