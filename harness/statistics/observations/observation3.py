"""Observation 3: misclassified images lie closer to the decision boundary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from harness.statistics.composition import newcomer_gap
from harness.statistics.effects.groups import CliffDelta, DetectionGain, area, variance_ratio
from harness.statistics.effects.paired import Share
from harness.statistics.observations.observation1 import equivalence_bound
from harness.statistics.observations.verdicts import Trial
from harness.statistics.panels import Panel
from harness.statistics.trends import describe, kendall

CLOSER, STAY, NEWCOMERS = "closer", "stay incorrect", "newcomers are closer"
BEATS_SOFTMAX, BEATS_LOGITS = "detects better than softmax", "detects better than logit margin"
NEAR = 0.02  # equivalence bound of effects without a unit


def trials(panels: list[Panel]) -> Iterator[Trial]:
    """The tests of one run's margins; epoch 0 is left out.

    - At every epoch: whether misclassified images are closer.
    - At the last epoch (chosen in advance), on test images: whether the margin detects them better than the maximum
      softmax and the logit margin, which cost one forward pass.
    - Over all epochs: whether newly correct images are closer than those that stayed correct.
    """
    for panel in panels:
        for epoch in panel.later:
            effect = CliffDelta(panel.at(epoch), ~panel.correct[:, panel.column(epoch)])
            yield Trial(3, CLOSER, panel.run, *panel.key, epochs=str(epoch), side=-1, effect=effect, bound=NEAR)
        if not len(panel.later):
            yield Trial(3, CLOSER, panel.run, *panel.key, epochs="", side=-1, obstacle="no epoch after 0 was measured")
            continue
        last = int(panel.epochs[-1])
        wrong = ~panel.correct[:, panel.column(last)]
        if panel.split == "test":
            yield from _detection(panel, last, wrong)
        yield _newcomers(panel)


def _detection(panel: Panel, epoch: int, wrong: np.ndarray) -> Iterator[Trial]:
    place = panel.column(epoch)
    scores = {BEATS_SOFTMAX: panel.confidence[:, place], BEATS_LOGITS: panel.logit_margin[:, place]}
    for claim, score in scores.items():
        gain = DetectionGain(-panel.at(epoch), -score, wrong)
        yield Trial(3, claim, panel.run, *panel.key, epochs=str(epoch), side=1, effect=gain, bound=NEAR)


def _newcomers(panel: Panel) -> Trial:
    later = panel.later
    names = (3, NEWCOMERS, panel.run, *panel.key, f"{later[0]} → {later[-1]}")
    gap = newcomer_gap(panel)
    if gap is None:
        return Trial(*names, side=-1, obstacle="fewer than two measured epochs from 1 on")
    return Trial(*names, side=-1, effect=gap, bound=equivalence_bound(panel))


def persistence(run: str, split: str, correctness: pd.DataFrame) -> Trial:
    """Whether most images that are incorrect at the last epoch were incorrect at the epoch before.

    Args:
        correctness: ``(image x epoch)`` bool of the whole set; neighbouring columns are neighbouring recorded epochs.
    """
    later = [int(epoch) for epoch in correctness.columns.to_numpy() if epoch >= 1]
    names = (3, STAY, run, "", "", split, "")
    if len(later) < 2:
        return Trial(*names, epochs="", side=1, obstacle="fewer than two epochs from 1 on")
    before, after = (~correctness[epoch].to_numpy() for epoch in later[-2:])
    hits = np.where(after, before.astype(float), np.nan)
    return Trial(*names, epochs=f"{later[-2]} → {later[-1]}", side=1, effect=Share(hits), bound=NEAR)


def describe_persistence(run: str, split: str, correctness: pd.DataFrame) -> list[dict[str, Any]]:
    """At every epoch, the share of its incorrect images that were incorrect at the epoch before."""
    key = {"observation": 3, "name": "share of incorrect images that were incorrect before", "run": run}
    rows = []
    for previous, epoch in itertools.pairwise(correctness.columns.to_numpy()):
        wrong = ~correctness[epoch].to_numpy()
        if previous >= 1 and wrong.any():
            share = float((~correctness[previous].to_numpy())[wrong].mean())
            where = {"estimator": "", "norm": "", "split": split, "measure": "", "epochs": f"{previous} → {epoch}"}
            rows.append(key | where | {"value": share, "images": int(wrong.sum()), "note": "whole set"})
    return rows


def describe_groups(panel: Panel) -> list[dict[str, Any]]:
    """Areas under the ROC curve and the ratio of variances at the last epoch, and each group's own trend."""
    later = panel.later
    if not len(later):
        return []
    last, span = int(later[-1]), f"{later[0]} → {later[-1]}"
    place = panel.column(last)
    wrong = ~panel.correct[:, place]
    scores = {
        "margin": panel.at(last),
        "maximum softmax": panel.confidence[:, place],
        "logit margin": panel.logit_margin[:, place],
    }
    rows = [
        describe(
            3, f"area under the ROC curve of detecting misclassified images by {name}", panel, str(last),
            area(-score, wrong), images=int(np.isfinite(score).sum()),
        )
        for name, score in scores.items()
    ]  # fmt: skip
    ratio = variance_ratio(panel.at(last), wrong)
    if math.isfinite(ratio):
        name = "variance of incorrect images' margins over that of correct images'"
        rows.append(describe(3, name, panel, str(last), ratio, images=int(np.isfinite(panel.at(last)).sum())))
    for subset, member in (("correct", panel.correct), ("incorrect", ~panel.correct)):
        averages = np.array([_average(panel.at(epoch)[member[:, panel.column(epoch)]]) for epoch in later])
        rows.append(
            describe(3, f"Kendall's tau of the {subset} images' average", panel, span, kendall(later, averages))
        )
    return rows


def _average(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if len(found) else math.nan
