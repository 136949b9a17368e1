"""Refine witnesses: bisect on the segment from the image to the witness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.geometry import boundary_fraction, on_segment, per_row, row_norm
from attacks.types import Norm

# A witness lies this fraction of its distance beyond the crossing that bisection found, which has the same tolerance:
# nearer, rounding in another batch, another precision or on another device puts up to 1% of them back.
STEP_BACK = 5e-5

# (points (A, C, H, W), indices of their rows (A,)) -> class (A,), -1 where it is the image's own
NewClass = Callable[[Tensor, Tensor], Tensor]


def refined(
    images: Tensor,
    witness: Tensor,
    target: Tensor,
    norm: Norm,
    new_class: NewClass,
    into_domain: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Bisect from each image to its witness.

    Args:
        images: ``(R, C, H, W)``.
        witness: ``(R, C, H, W)``, points of another class.
        target: ``(R,)`` their classes.
        norm: in which a refined witness must not be farther than the witness.
        new_class: classifies points of some of the rows in a fresh pass.
        into_domain: clips points into the domain.

    Returns:
        ``(points, classes)``, as they were where bisection fails.
    """

    def is_outside(points: Tensor, active: Tensor) -> Tensor:
        return new_class(into_domain(points), active) >= 0

    fraction = boundary_fraction(is_outside, images, witness, tolerance=STEP_BACK)
    every = torch.arange(len(images), device=images.device)
    points, target = witness.clone(), target.clone()
    longest = row_norm(witness - images, norm)
    settled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for farther in (STEP_BACK, 1e-4, 1e-3, 1e-2, 1e-1):
        trial = into_domain(on_segment(images, witness, (fraction * (1.0 + farther)).clamp_max(1.0)))
        trial = torch.where(per_row(settled, trial).bool(), points, trial)
        reached, length = new_class(trial, every), row_norm(trial - images, norm)
        better = ~settled & (reached >= 0) & (length > 0) & (length <= longest)
        points[better], target[better] = trial[better], reached[better]
        settled |= better
        if settled.all():
            break
    return points, target
