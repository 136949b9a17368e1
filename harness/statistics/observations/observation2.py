"""Observation 2: adversarial training keeps the decision boundary away."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.statistics.effects.paired import KeptShares, LogMeans, MedianChange, SlopeDifference
from harness.statistics.observations.observation1 import EQUIVALENCE, equivalence_bound
from harness.statistics.observations.verdicts import Trial
from harness.statistics.panels import Panel
from harness.statistics.trends import describe, slopes

RATIO, TRANSFER, SLOPE, DAMPED = "larger margins", "transfer to L2", "slower decline", "smaller share lost"


def trials(standard: list[Panel], adversarial: list[Panel], name: str) -> Iterator[Trial]:
    """The tests of a pair of runs that measured the same images.

    - The ratio of the averages at the last common epoch. In L2, a norm other than the one trained in, this tests the
      transfer.
    - The difference of the slopes over the common epochs from 1 on.
    - The ratio of the shares of the epoch-1 average that are kept, because absolute slopes of curves at different
      heights are hard to compare.

    Args:
        standard, adversarial: panels of the run with standard and with adversarial training.
        name: name of the pair in the tables.
    """
    by_key = {panel.key: panel for panel in adversarial}
    for plain in standard:
        if plain.key in by_key:
            yield from _compare(plain, by_key[plain.key], name)


def _compare(plain: Panel, robust: Panel, name: str) -> Iterator[Trial]:
    epochs = np.intersect1d(plain.later, robust.later)
    ratio = TRANSFER if plain.norm == "l2" else RATIO
    if not np.array_equal(plain.images, robust.images) or not len(epochs):
        reason = "the runs have no measured epoch from 1 on in common" if not len(epochs) else "the images differ"
        for claim in (ratio, SLOPE, DAMPED):
            yield Trial(2, claim, name, *plain.key, epochs="", side=1, obstacle=reason)
        return
    last, span = int(epochs[-1]), f"{epochs[0]} → {epochs[-1]}"
    near = math.log1p(EQUIVALENCE)
    ends = np.stack([robust.at(last), plain.at(last)], axis=1)
    effect = LogMeans(ends, np.array([1.0, -1.0]))
    yield Trial(2, ratio, name, *plain.key, epochs=str(last), side=1, effect=effect, bound=near)
    if len(epochs) < 3 or epochs[0] != 1:
        for claim in (SLOPE, DAMPED):
            yield Trial(2, claim, name, *plain.key, span, side=1, obstacle="fewer than three common epochs from 1 on")
        return
    slower = SlopeDifference(slopes(robust, epochs) - slopes(plain, epochs))
    # a slope that changes the epoch-1 average by less than 2% over the whole span counts as no slope
    flat = equivalence_bound(plain) / (last - 1)
    yield Trial(2, SLOPE, name, *plain.key, epochs=span, side=1, effect=slower, bound=flat)
    kept = KeptShares(np.column_stack([ends, robust.at(1), plain.at(1)]), np.array([1.0, -1.0, -1.0, 1.0]))
    yield Trial(2, DAMPED, name, *plain.key, epochs=span, side=1, effect=kept, bound=near)


def describe_change(panel: Panel) -> list[dict[str, Any]]:
    """The median change of the margins under adversarial training from epoch 1 to the last."""
    last = int(panel.epochs[-1])
    if 1 not in panel.epochs or last <= 1:
        return []
    effect = MedianChange(panel.at(last) - panel.at(1))
    if effect.obstacle():
        return []
    low, high = effect.interval(0.05)
    name = "median change under adversarial training"
    note = "95% interval, uncorrected"
    return [describe(2, name, panel, f"1 → {last}", effect.estimate, note, low=low, high=high, images=effect.images)]
