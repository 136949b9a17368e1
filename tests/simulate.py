"""Simulated margins and runs with known answers, and the tolerance of a counted rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from harness.runs import EPOCH_COLUMNS, PREDICTION_TYPES, Run
from harness.statistics.panels import Panel
from harness.store import MARGIN_COLUMNS, RunFolder

SURE = 0.999


def band(rate: float, trials: int) -> tuple[int, int]:
    """The interval that holds a binomial count of this rate with a probability of 99.9%."""
    tail = (1 - SURE) / 2
    return int(stats.binom.ppf(tail, trials, rate)), int(stats.binom.isf(tail, trials, rate))


def is_rate(hits: int, rate: float, trials: int) -> bool:
    """Whether the count is consistent with exactly this rate."""
    low, high = band(rate, trials)
    return low <= hits <= high


def is_at_most(hits: int, rate: float, trials: int) -> bool:
    """Whether the count is consistent with this rate or a smaller one."""
    return hits <= band(rate, trials)[1]


def panel(values: np.ndarray, correct: np.ndarray | None = None, **given: Any) -> Panel:
    """A panel of ``(N, E)`` distances, NaN for images without one."""
    values = np.asarray(values, dtype=float)
    count, epochs = values.shape
    made: dict[str, Any] = {
        "run": "run",
        "estimator": "deepfool",
        "norm": "l2",
        "split": "test",
        "measure": "distance",
        "epochs": np.arange(epochs),
        "images": np.arange(count),
        "values": values,
        "correct": np.ones(values.shape, dtype=bool) if correct is None else np.asarray(correct, dtype=bool),
        "confidence": np.full(values.shape, 0.9),
        "logit_margin": np.nan_to_num(values),
        "prediction": np.zeros(values.shape, dtype=np.int64),
        "target": np.where(np.isfinite(values), 1, -1),
        "label": np.arange(count) % 3,
    }
    return Panel(**(made | given))


def margin_rows(
    values: np.ndarray,
    *,
    epochs: np.ndarray | None = None,
    correct: np.ndarray | None = None,
    split: str = "test",
    estimator: str = "deepfool",
    norm: str = "l2",
    overshoot: float = 1.02,
    **columns: np.ndarray | str,
) -> pd.DataFrame:
    """Rows of `MARGIN_COLUMNS` from ``(N, E)`` distances; NaN is an image not found.

    Args:
        correct: ``(N, E)`` bool; default all correct.
        overshoot: ``attack_distance`` over ``distance``.
        columns: further columns, each ``(N, E)`` or one value.
    """
    values = np.asarray(values, dtype=float)
    count, width = values.shape
    epochs = np.arange(width) if epochs is None else np.asarray(epochs)
    correct = np.ones(values.shape, dtype=bool) if correct is None else np.asarray(correct)
    found = np.isfinite(values)
    label = np.broadcast_to(np.arange(count)[:, None] % 3, values.shape)
    prediction = np.where(correct, label, (label + 1) % 3)
    made: dict[str, Any] = {
        "epoch": np.broadcast_to(epochs, values.shape),
        "split": split,
        "image": np.broadcast_to(np.arange(count)[:, None], values.shape),
        "label": label,
        "prediction": prediction,
        "correct": correct,
        "confidence": 0.4 + 0.6 * np.nan_to_num(values) / (1 + np.nan_to_num(values)),
        "logit_margin": 3 * np.nan_to_num(values),
        "estimator": estimator,
        "norm": norm,
        "domain": "box",
        "distance": np.where(found, values, np.inf),
        "attack_distance": np.where(found, overshoot * values, np.inf),
        "status": np.where(found, "found", "not_found"),
        "target": np.where(found, (prediction + 1) % 3, -1),
        "message": "",
        "basins": np.nan,
        "noise_retries": 0,
        "forwards": 10.0,
        "backwards": 5.0,
        "seconds": 0.01,
    }
    flat = {
        name: value.T.reshape(-1) if isinstance(value, np.ndarray) else value
        for name, value in (made | columns).items()
    }
    return pd.DataFrame(flat, index=range(values.size))[list(MARGIN_COLUMNS)]


def predictions_of(correct: np.ndarray, *, split: str = "test", confidence: float = 0.9) -> pd.DataFrame:
    """Predictions of a whole set at every epoch, from ``(N, E)`` bool."""
    count, width = correct.shape
    label = np.broadcast_to(np.arange(count)[:, None] % 3, correct.shape)
    table = pd.DataFrame(
        {
            "epoch": np.broadcast_to(np.arange(width), correct.shape).T.reshape(-1),
            "split": split,
            "image": np.broadcast_to(np.arange(count)[:, None], correct.shape).T.reshape(-1),
            "label": label.T.reshape(-1),
            "prediction": np.where(correct, label, (label + 1) % 3).T.reshape(-1),
            "confidence": confidence,
        }
    )
    return table.astype(PREDICTION_TYPES)


def run(
    name: str,
    *margins: pd.DataFrame,
    predictions: pd.DataFrame | None = None,
    errors: pd.DataFrame | None = None,
    estimators: tuple[str, ...] = ("deepfool", "fmn"),
    **options: Any,
) -> Run:
    """A run in memory; without options it is one of `MarginTracker`, which has no training options."""
    config = {"dataset": "digits", "training": "standard", "seed": 0, "pgd_epsilon": None} | options if options else {}
    manifest: dict[str, Any] = {
        "schema": 1,
        "estimators": [{"estimator": text, "parameters": {"steps": 50}} for text in estimators],
    }
    if config:
        manifest |= {"config": config, "fingerprint": dict(config)}
    rows = [table for table in margins if len(table)]
    none = pd.DataFrame(columns=list(PREDICTION_TYPES)).astype(PREDICTION_TYPES)
    return Run(
        name=name,
        folder=RunFolder(Path(name)),
        manifest=manifest,
        margins=pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(MARGIN_COLUMNS)),
        epochs=pd.DataFrame(columns=list(EPOCH_COLUMNS)) if errors is None else errors,
        predictions=none if predictions is None else predictions,
    )
