"""Row-wise norms, projections, distances to planes and bisection on segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.types import Norm


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` so that it broadcasts over the rows of ``like`` ``(B, ...)``, in its dtype."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def row_norm(perturbation: Tensor, norm: Norm) -> Tensor:
    """Norm of each row: ``(B, ...)`` -> ``(B,)`` float64."""
    flat = perturbation.detach().double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()


def dual_norm(gradient: Tensor, norm: Norm) -> Tensor:
    """Dual norm of each row: L1 for ``linf``, L2 for ``l2``; ``(B, ...)`` -> ``(B,)`` float64."""
    flat = gradient.detach().double().flatten(1)
    return flat.abs().sum(1) if norm == "linf" else flat.square().sum(1).sqrt()


def project(perturbation: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """Nearest point (L2) of each row's ball of ``radius`` ``(B,)`` in ``norm``."""
    limit = per_row(radius, perturbation)
    if norm == "linf":
        return perturbation.clamp(-limit, limit)
    length = per_row(row_norm(perturbation, "l2"), perturbation)
    return perturbation * (limit / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)


def steepest_step(gradient: Tensor, norm: Norm) -> Tensor:
    """Unit step of largest linear ascent: the sign (``linf``) or the normalised gradient (``l2``)."""
    if norm == "linf":
        return gradient.sign()
    length = per_row(row_norm(gradient, "l2"), gradient)
    return gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny)


def plane_crossing(
    points: Tensor, normal: Tensor, gap: Tensor, norm: Norm, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest move from each point to its plane ``normal . move = gap`` inside the bounds.

    The move ends at ``(points + length * direction).clamp(*bounds)``: pixel i moves at rate ``|direction_i|`` until it
    stops at its bound, and ``length`` is where the piecewise linear gain ``normal . move`` reaches the gap. The gain is
    concave, so that Newton's method ends exactly there, with fewer moving pixels in every round.

    Args:
        points: ``(B, ...)`` inside the bounds. normal: ``(B, ...)``. gap: ``(B,)``, the gain to reach.

    Returns:
        direction: ``(B, ...)`` in ``normal``'s dtype, `steepest_step`; 0 where the normal is 0.
        length: ``(B,)`` float64; that of the farthest point where the plane cannot be reached inside the bounds.
        shortfall: ``(B,)`` float64, the fraction of the gap that is left there, else 0.
    """
    gap = gap.double()
    direction = steepest_step(normal.double(), norm)
    slope, rate = (normal * direction).flatten(1), direction.abs().flatten(1)
    room = torch.where(direction > 0, bounds[1] - points, points - bounds[0]).double().flatten(1)
    limit = torch.where(rate > 0, room.clamp_min(0.0) / rate, 0.0)
    length, gain = torch.zeros_like(gap), torch.zeros_like(gap)
    while True:
        moving = length[:, None] < limit
        left = torch.where(moving, slope, 0.0).sum(1)
        gain = torch.where(moving, 0.0, slope * limit).sum(1)
        farther = (gap - gain) / left
        longer = (left > 0) & (farther > length)
        if not longer.any():
            break
        length = torch.where(longer, farther, length)
    short = ((gap - gain) / gap).clamp_min(0.0)
    return direction.to(normal), length, torch.where((left > 0) | (gap <= 0), 0.0, short)


def least_step(images: Tensor, norm: Norm) -> float:
    """A distance that is large enough not to vanish by rounding in the images' dtype."""
    pixels = images[0].numel()
    return float(4 * torch.finfo(images.dtype).eps * (pixels**0.5 if norm == "l2" else 1.0))


def farthest_in_box(images: Tensor, norm: Norm) -> Tensor:
    """Distance from each image to the farthest point of ``[0, 1]``: a radius that no box margin exceeds."""
    return row_norm(torch.maximum(images, 1.0 - images), norm)


def on_segment(images: Tensor, ends: Tensor, fraction: Tensor) -> Tensor:
    """Points at ``fraction`` ``(B,)`` of the way from ``images`` to ``ends``; exactly ``ends`` at 1."""
    points = images + per_row(fraction, images) * (ends - images)
    return torch.where(per_row(fraction, images) >= 1.0, ends, points)


def boundary_fraction(
    is_outside: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    ends: Tensor,
    *,
    tolerance: float = 1e-4,
    passes: int = 24,
) -> Tensor:
    """Bisect the segment from each image to its witness for a crossing of the boundary.

    A row stops when its bracket is narrower than ``tolerance`` times its distance, or after ``passes``.

    Args:
        is_outside: (points of the active rows, indices of these rows) -> bool ``(A,)``, true where the class differs.
        images: ``(B, ...)``, not outside.
        ends: ``(B, ...)``, outside.

    Returns:
        ``(B,)`` float64 in ``(0, 1]``: the smallest fraction seen outside.
    """
    low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    high = torch.ones_like(low)
    for _ in range(passes):
        active = torch.nonzero(high - low >= tolerance * high).flatten()
        if not len(active):
            break
        middle = (low[active] + high[active]) / 2
        outside = is_outside(on_segment(images[active], ends[active], middle), active)
        high[active] = torch.where(outside, middle, high[active])
        low[active] = torch.where(outside, low[active], middle)
    return high


def ball_point(images: Tensor, direction: Tensor, radius: Tensor, bounds: tuple[float, float]) -> Tensor:
    """``images + radius * direction``, clipped to the bounds."""
    return (images + per_row(radius, images) * direction).clamp(*bounds)
