"""Margins as arrays of image x epoch, the input of all tests and tables of one curve."""

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
        values: ``(N, E)`` distances; NaN where an image has none or is tied, because averages are over images found.
        correct: ``(N, E)`` bool: whether the prediction was the label.
        confidence, logit_margin: ``(N, E)`` of the predicted class.
        prediction: ``(N, E)`` int64 predicted class.
        target: ``(N, E)`` int64 class at the witness; -1 without one.
        label: ``(N,)`` int64 true class.
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
        """Estimator, norm, split and measure, by which panels of different runs are matched."""
        return self.estimator, self.norm, self.split, self.measure

    @cached_property
    def averages(self) -> np.ndarray:
        """``(E,)`` average over the images found; NaN where no image was found."""
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
    """One panel per split, estimator, norm and measure; the two measures of one curve follow each other."""
    for (split, estimator, norm), rows in margins.groupby(["split", "estimator", "norm"], sort=False):
        yield from _both_measures(run, str(split), str(estimator), str(norm), rows)


def _both_measures(run: str, split: str, estimator: str, norm: str, rows: pd.DataFrame) -> Iterator[Panel]:
    epochs, columns = np.unique(rows["epoch"].to_numpy(dtype=np.int64), return_inverse=True)
    images, places = np.unique(rows["image"].to_numpy(), return_inverse=True)
    label = np.zeros(len(images), dtype=np.int64)
    label[places] = rows["label"].to_numpy()

    def by_epoch(column: np.ndarray, empty: float) -> np.ndarray:
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
            values=by_epoch(distances, math.nan),
            correct=by_epoch(rows["correct"].to_numpy(dtype=bool), False),
            confidence=by_epoch(rows["confidence"].to_numpy(dtype=float), math.nan),
            logit_margin=by_epoch(rows["logit_margin"].to_numpy(dtype=float), math.nan),
            prediction=by_epoch(rows["prediction"].to_numpy(dtype=np.int64), -1),
            target=by_epoch(rows["target"].to_numpy(dtype=np.int64), -1),
            label=label,
        )
