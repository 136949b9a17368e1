"""Compare two sides' margins before any times are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.geometry import row_norm
from attacks.types import Norm
from benchmarks.speed.problems import Problem

# of one image's margin, between two computations of the same thing
SAME = 1e-4
# the share of images that may differ by more: rounding decides between two classes that are equally near
FEW = 0.02
# how much farther ours may be on average than another algorithm's
FARTHER = 1e-2
# of the largest logit: what float32 does not resolve of a difference between two
ROUNDING = 1e-6


@dataclass(frozen=True)
class Agreement:
    """Ours against another side's margins of the same images.

    Attributes:
        images: how many were compared.
        found, found_theirs: on how many each has a point of another class.
        touching: on how many theirs is not that, but on the boundary to rounding.
        mean: of our distance over theirs, where both have one; NaN where they never have.
        differing: the images whose margins differ by more than `SAME`, ours, theirs; inf is not found.
        comparable: whether a ratio of times says anything. Two computations of the same thing may differ on `FEW`
            images. Where it is another algorithm, ours must find as many as it finds or touches, and no more than `FEW`
            more, for it is no feat to be faster than what fails; and lie at most `FARTHER` away.
    """

    images: int
    found: int
    found_theirs: int
    touching: int
    mean: float
    differing: tuple[tuple[int, float, float], ...]
    comparable: bool


def judge(problem: Problem, points: Tensor, norm: Norm, *, rounding: float = 0.0) -> Tensor:
    """Distances ``(N,)`` float64 of points whose class is another than the image's; inf of all others.

    In fresh passes of the bare network; points that are not finite or outside of ``[0, 1]`` count as not found.

    Args:
        rounding: the share of the largest logit by which the image's class may still lead.
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
        same: whether both compute the same thing, image by image.
        near: theirs with `ROUNDING`, by which another algorithm is compared. torchattacks' DeepFool walks up to where
            two logits are equal, and there its next step has no length.
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
