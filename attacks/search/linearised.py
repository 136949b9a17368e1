"""Linearised decision boundaries: the logit gap to a class, its normal, and the nearest of several planes."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.geometry import per_row, plane_crossing, row_norm
from attacks.search.radius import ball_point
from attacks.types import Bounds, Norm


def gap_and_normal(
    leaf: Tensor, logits: Tensor, labels: Tensor, targets: Tensor, *, retain_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """The label's lead over the target ``(A,)`` and minus its gradient ``(A, ...)``; one backward."""
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    (rise,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=retain_graph)
    return gap.detach(), -rise


def nearest_plane(
    leaf: Tensor, logits: Tensor, labels: Tensor, others: Tensor, norm: Norm, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """The move to the nearest linearised boundary between the label and the others; one backward per class.

    Moosavi-Dezfooli et al. 2016, Algorithm 2; Jiang et al. 2019, eq. 3. Departs from both in the box: the move goes to
    the nearest point of the box on a boundary or, if the box reaches no boundary, closes the largest fraction of a gap.

    Args:
        leaf: ``(A, ...)`` that requires gradients. logits: ``(A, K)`` of ``leaf``, with their graph.
        labels: ``(A,)``. others: ``(A, C)`` classes, C >= 1.

    Returns:
        direction: ``(A, ...)``; 0 where all gradients are 0.
        length: ``(A,)`` float64; both as in `plane_crossing`.
    """
    points, count = leaf.detach(), others.shape[1]
    direction, length = torch.zeros_like(points), torch.zeros(len(points), dtype=torch.float64, device=points.device)
    least, shortest = torch.ones_like(length), torch.full_like(length, torch.inf)
    for column, targets in enumerate(others.unbind(1)):
        gap, normal = gap_and_normal(leaf, logits, labels, targets, retain_graph=column + 1 < count)
        towards, far, shortfall = plane_crossing(points, normal, gap, norm, bounds)
        distance = row_norm(ball_point(points, towards, far, bounds) - points, norm)
        better = (shortfall < least) | ((shortfall == least) & (shortfall < 1) & (distance < shortest))
        direction = torch.where(per_row(better, points).bool(), towards, direction)
        length = torch.where(better, far, length)
        least, shortest = torch.where(better, shortfall, least), torch.where(better, distance, shortest)
    return direction, length
