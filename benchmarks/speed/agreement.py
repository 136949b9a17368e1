"""Compare two sides' margins before any times are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.geometry import row_norm
from attacks.types import Norm
from benchmarks.speed.problems import Problem

# relative tolerance of one image's margin between two computations of the same algorithm
SAME = 1e-4
# share of images that may differ by more: rounding decides between two classes at equal distance
FEW = 0.02
# largest ratio of our average distance to another algorithm's
FARTHER = 1e-2
# resolution of logit differences in float32, relative to the largest logit
ROUNDING = 1e-6


@dataclass(frozen=True)
class Agreement:
    """Ours against another side's margins of the same images.

    Attributes:
        images: how many were compared.
        found, found_theirs: numbers of images with a point of another class.
        touching: number of images on which their point is on the boundary up to rounding.
        mean: mean of our distance over theirs, on images found by both; NaN without any.
        differing: images whose margins differ by more than `SAME`, with our and their distance; inf is not found.
        comparable: whether a ratio of times is meaningful. Two computations of the same algorithm may differ on `FEW`
            images. Against another algorithm, ours must find at least as many images as it finds or touches and at most
            `FEW` more, as a time ratio to a failing attack has no meaning, and lie at most `FARTHER` away.
    """

    images: int
    found: int
    found_theirs: int
    touching: int
    mean: float
    differing: tuple[tuple[int, float, float], ...]
    comparable: bool


def judge(problem: Problem, points: Tensor, norm: Norm, *, rounding: float = 0.0) -> Tensor:
    """Distances ``(N,)`` float64 of points with another class than the image; inf for all others.

    Computed in new passes of the bare network; points that are not finite or outside ``[0, 1]`` count as not found.

    Args:
        rounding: allowed lead of the image's class, relative to the largest logit.
    """
    points = points.detach().to(problem.images)
    inside = ((points >= 0) & (points <= 1)).flatten(1).all(1)
    with torch.no_grad():
        logits = torch.cat([problem.model(part) for part in points.split(problem.batch_size)])
    own = logits.gather(1, problem.labels[:, None])[:, 0]
    moved = logits.argmax(1) != problem.labels
    if rounding:
        others = logits.scatter(1, problem.labels[:, None], -math.inf).amax(1)
        moved |= own - others <= rounding * logits.abs().amax(1)
    moved &= inside & logits.isfinite().all(1)
    return torch.where(moved, row_norm(points - problem.images, norm), math.inf)


def agree(ours: Tensor, theirs: Tensor, *, same: bool, near: Tensor | None = None) -> Agreement:
    """Compare distances ``(N,)`` of `judge`.

    Args:
        same: whether both compute the same algorithm, image by image.
        near: their distances with `ROUNDING`, used to compare another algorithm. torchattacks' DeepFool may stop where
            two logits are equal, as its next step has zero length there.
    """
    found, found_theirs = int(ours.isfinite().sum()), int(theirs.isfinite().sum())
    theirs = theirs if near is None else near
    touching = int(theirs.isfinite().sum()) - found_theirs
    both = ours.isfinite() & theirs.isfinite()
    alike = both & ((ours - theirs).abs() <= SAME * theirs)
    differs = ~alike & ~(ours.isinf() & theirs.isinf())
    differing = tuple((row, float(ours[row]), float(theirs[row])) for row in torch.nonzero(differs).flatten().tolist())
    mean = float((ours[both] / theirs[both]).mean()) if both.any() else math.nan
    few, more = FEW * len(ours), found - found_theirs - touching
    comparable = len(differing) <= few if same else 0 <= more <= few and mean <= 1 + FARTHER
    return Agreement(len(ours), found, found_theirs, touching, mean, differing, comparable)
