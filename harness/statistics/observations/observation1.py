"""Observation 1: standard training moves the decision boundary closer to the images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from harness.statistics.effects.groups import MeanGap
from harness.statistics.effects.paired import MedianChange
from harness.statistics.observations.verdicts import Trial
from harness.statistics.panels import Panel

JUMP, DECLINE, LATE, SPLITS_AGREE = "jump", "decline", "late decline", "train and test agree"
EQUIVALENCE = 0.02  # relative to the average at epoch 1


def trials(panels: list[Panel]) -> Iterator[Trial]:
    """The tests of one run: jump, decline from epoch 1 (chosen in advance), late decline, train against test images."""
    for panel in panels:
        yield from _changes(panel)
    by_key = {panel.key: panel for panel in panels}
    for key, train in by_key.items():
        test = by_key.get((key[0], key[1], "test", key[3]))
        if train.split == "train" and test is not None:
            yield _agreement(train, test)


def last_quarter(epochs: np.ndarray) -> int | None:
    """The first measured epoch in the last quarter of the epochs from 1 on; None unless between 1 and the last."""
    later = epochs[epochs >= 1]
    if len(later) < 2:
        return None
    start = int(later[later >= 1 + 0.75 * (later[-1] - 1)][0])
    return start if 1 < start < later[-1] else None


def _changes(panel: Panel) -> Iterator[Trial]:
    last, quarter = int(panel.epochs[-1]), last_quarter(panel.epochs)
    for claim, side, before, after in (
        (JUMP, 1, 0, 1),
        (DECLINE, -1, 1, last),
        (LATE, -1, quarter, last),
    ):
        obstacle = _missing(panel, claim, before, after)
        names = (1, claim, panel.run, *panel.key)
        span = f"{before} → {after}" if before is not None else ""
        if obstacle or before is None:
            yield Trial(*names, epochs=span, side=side, obstacle=obstacle)
            continue
        effect = MedianChange(panel.at(after) - panel.at(before))
        yield Trial(*names, epochs=span, side=side, effect=effect, bound=equivalence_bound(panel))


def _missing(panel: Panel, claim: str, before: int | None, after: int) -> str:
    if before is None:
        return "too few measured epochs for a last quarter"
    absent = [epoch for epoch in (before, after) if epoch not in panel.epochs]
    if absent:
        return f"epoch {absent[0]} was not measured"
    return f"no epoch after epoch {before}" if claim == DECLINE and after <= before else ""


def equivalence_bound(panel: Panel) -> float:
    """2% of the average margin at epoch 1; NaN where epoch 1 was not measured."""
    if 1 not in panel.epochs:
        return math.nan
    return EQUIVALENCE * float(panel.averages[panel.column(1)])


def _agreement(train: Panel, test: Panel) -> Trial:
    last = int(train.epochs[-1])
    names = (1, SPLITS_AGREE, train.run, train.estimator, train.norm, "train - test", train.measure, str(last))
    bound = equivalence_bound(train)
    if last not in test.epochs or last < 1:
        return Trial(*names, side=0, obstacle="no epoch after the first where both were measured")
    if math.isnan(bound):
        return Trial(*names, side=0, obstacle="epoch 1, which the bound is taken from, was not measured")
    values = np.concatenate([train.at(last), test.at(last)])
    member = np.arange(len(values)) < len(train.images)
    return Trial(*names, side=0, effect=MeanGap(values, member), bound=bound)
