"""Margins as arrays of image x epoch: what every test and table of one curve starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from harness.statistics.averages import FOUND

MEASURES = ("distance", "attack_distance")


@dataclass(frozen=True)
class Panel:
    """The margins of one run, split, estimator and norm.

    Attributes:
        epochs: ``(E,)`` measured epochs in order.
        images: ``(N,)`` ids in order.
        values: ``(N, E)`` distances; NaN where an image has none or is tied, as averages are over images found.
        correct: ``(N, E)`` whether the prediction was the label.
        confidence, logit_margin: ``(N, E)`` of the predicted class.
        target: ``(N, E)`` class at the witness, -1 without one; ``prediction`` ``(N, E)``; ``label`` ``(N,)``.
    """

    run: str
    estimator: str
    norm: str
    split: str
    measure: str
    epochs: np.ndarray
    images: np.ndarray
    values: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    logit_margin: np.ndarray
    prediction: np.ndarray
    target: np.ndarray
    label: np.ndarray

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Estimator, norm, split and measure: what panels of different runs are matched by."""
        return self.estimator, self.norm, self.split, self.measure

    @cached_property
    def averages(self) -> np.ndarray:
        """``(E,)`` average over the images found; NaN where none is."""
        found = np.isfinite(self.values)
        count = found.sum(axis=0)
        total = np.where(found, self.values, 0).sum(axis=0)
        return np.asarray(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))

    @property
    def later(self) -> np.ndarray:
        """The epochs from 1 on."""
        return self.epochs[self.epochs >= 1]

    def column(self, epoch: int) -> int:
        """Position of a measured epoch."""
        (place,) = np.flatnonzero(self.epochs == epoch)
        return int(place)

    def at(self, epoch: int) -> np.ndarray:
        """``(N,)`` distances at a measured epoch."""
        return self.values[:, self.column(epoch)]


def panels(run: str, margins: pd.DataFrame) -> Iterator[Panel]:
    """One panel for every split, estimator, norm and measure, the measures of one curve side by side."""
    for (split, estimator, norm), rows in margins.groupby(["split", "estimator", "norm"], sort=False):
        yield from _both_measures(run, str(split), str(estimator), str(norm), rows)


def _both_measures(run: str, split: str, estimator: str, norm: str, rows: pd.DataFrame) -> Iterator[Panel]:
    epochs, columns = np.unique(rows["epoch"].to_numpy(dtype=np.int64), return_inverse=True)
    images, places = np.unique(rows["image"].to_numpy(), return_inverse=True)
    label = np.zeros(len(images), dtype=np.int64)
    label[places] = rows["label"].to_numpy()

    def spread(column: np.ndarray, empty: float) -> np.ndarray:
        table = np.full((len(images), len(epochs)), empty, dtype=column.dtype)
        table[places, columns] = column
        return table

    found = np.isin(rows["status"].to_numpy(), FOUND)
    for measure in MEASURES:
        distances = np.where(found, rows[measure].to_numpy(dtype=float), math.nan)
        yield Panel(
            run=run,
            estimator=estimator,
            norm=norm,
            split=split,
            measure=measure,
            epochs=epochs,
            images=images,
            values=spread(distances, math.nan),
            correct=spread(rows["correct"].to_numpy(dtype=bool), False),
            confidence=spread(rows["confidence"].to_numpy(dtype=float), math.nan),
            logit_margin=spread(rows["logit_margin"].to_numpy(dtype=float), math.nan),
            prediction=spread(rows["prediction"].to_numpy(dtype=np.int64), -1),
            target=spread(rows["target"].to_numpy(dtype=np.int64), -1),
            label=label,
        )
