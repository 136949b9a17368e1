"""Linearised decision boundaries: logit gaps, their gradients, first-order margins and the nearest plane."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.geometry import ball_point, dual_norm, per_row, plane_crossing, row_norm
from attacks.isolation import Classifier
from attacks.types import Bounds, Norm


def logit_gap(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, ``(B,)``."""
    label_logit = logits.gather(1, labels[:, None])[:, 0]
    gap: Tensor = label_logit - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return gap


def left_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether points have left their class, ``(B,)`` bool; false where logits are not finite: no witness is there."""
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


def most_likely_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The classes of the largest logits except the label, ``(B, min(count, K - 1))``, in descending order."""
    ranked = logits.detach().argsort(1, descending=True)
    return ranked[ranked != labels[:, None]].view(len(labels), -1)[:, :count]


def gap_and_normal(
    leaf: Tensor, logits: Tensor, labels: Tensor, targets: Tensor, *, retain_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """The label's lead over the target ``(A,)`` and minus its gradient ``(A, ...)``; one backward."""
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    (rise,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=retain_graph)
    return gap.detach(), -rise


def slopes(model: Classifier, points: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logit gaps to the targets and their gradients, by one forward and one backward.

    The gap is the label's logit minus the target's. It is the label's logit minus the largest other one if the label
    does not lead or if the target is the label itself.

    Returns:
        ``(W,)`` the gap, ``(W,)`` the label's logit minus the largest other one, ``(W, ...)`` the gap's gradient.
    """
    leaf = points.detach().clone().requires_grad_()
    logits = model(leaf)
    lead = logit_gap(logits, labels)
    target_gap = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    gap = torch.where((lead < 0) | (targets == labels), lead, target_gap)
    (gradient,) = torch.autograd.grad(gap.sum(), leaf)
    return gap.detach(), lead.detach(), gradient


def class_slopes(model: Classifier, images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The label's logit minus the ``count`` largest other logits, and the gradients of these gaps.

    Costs one forward and ``count`` backwards.

    Returns:
        Gaps ``(B, count)``, the smallest first; their gradients ``(B, count, ...)``; the classes ``(B, count)`` int64.
    """
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    others = logits.detach().scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    classes = others[:, :count]
    pairs = [gap_and_normal(leaf, logits, labels, targets, retain_graph=True) for targets in classes.unbind(1)]
    gaps, normals = (torch.stack(column, 1) for column in zip(*pairs, strict=True))
    return gaps, -normals, classes


def first_order_margin(model: Classifier, images: Tensor, labels: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The first-order margin and the logit margin, ``(B,)`` float64 each.

    The first-order margin is the logit margin over the dual norm of its gradient; inf where the gradient is 0. Both are
    absolute values, since a noisy start may already have left its class.
    """
    leaf = images.clone().requires_grad_()
    gap = logit_gap(model(leaf), labels)
    (gradient,) = torch.autograd.grad(gap.sum(), leaf)
    slope = dual_norm(gradient, norm)
    lead = gap.detach().double().abs()
    margin = lead / slope
    return torch.where((slope > 0) & margin.isfinite(), margin, torch.inf), lead


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
