"""Are two sides' margins the same? Asked before any times are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.estimator import Norm
from attacks.geometry import row_norm
from benchmarks.speed.problems import Problem

# of one image's margin, between two computations of the same thing
SAME = 1e-4
# the share of images that may differ by more: rounding decides between two classes that are equally near
FEW = 0.02
# how much farther ours may be on average than another algorithm's
FARTHER = 1e-2


@dataclass(frozen=True)
class Agreement:
    """Ours against another side's margins of the same images.

    Attributes:
        images: how many were compared.
        found, found_theirs: on how many each has a point of another class.
        mean: of our distance over theirs, where both have one; NaN where they never have.
        differing: the images whose margins differ by more than `SAME`, ours, theirs; inf is not found.
        comparable: whether a ratio of times says anything. Two computations of the same thing may differ on `FEW`
            images; where it is another algorithm, ours must find as many and lie at most `FARTHER` away.
    """

    images: int
    found: int
    found_theirs: int
    mean: float
    differing: tuple[tuple[int, float, float], ...]
    comparable: bool


def judge(problem: Problem, points: Tensor, norm: Norm) -> Tensor:
    """Distances ``(N,)`` float64 of points whose class is another than the image's; inf of all others.

    In fresh passes of the bare network; points that are not finite or outside of ``[0, 1]`` count as not found.
    """
    points = points.detach().to(problem.images)
    inside = ((points >= 0) & (points <= 1)).flatten(1).all(1)
    with torch.no_grad():
        logits = torch.cat([problem.model(part) for part in points.split(problem.batch_size)])
    moved = inside & logits.isfinite().all(1) & (logits.argmax(1) != problem.labels)
    return torch.where(moved, row_norm(points - problem.images, norm), math.inf)


def agree(ours: Tensor, theirs: Tensor, *, same: bool) -> Agreement:
    """Compare distances ``(N,)`` of `judge`.

    Args:
        same: whether both compute the same thing, image by image.
    """
    both = ours.isfinite() & theirs.isfinite()
    near = both & ((ours - theirs).abs() <= SAME * theirs)
    differs = ~near & ~(ours.isinf() & theirs.isinf())
    differing = tuple((row, float(ours[row]), float(theirs[row])) for row in torch.nonzero(differs).flatten().tolist())
    found, found_theirs = int(ours.isfinite().sum()), int(theirs.isfinite().sum())
    mean = float((ours[both] / theirs[both]).mean()) if both.any() else math.nan
    equal, no_worse = len(differing) <= FEW * len(ours), found >= found_theirs and mean <= 1 + FARTHER
    comparable = equal if same else no_worse
    return Agreement(len(ours), found, found_theirs, mean, differing, comparable)
