"""The margin of the network linearised at the image, and the step to a linearised boundary that DeepFool repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.estimator import DOMAINS, NORMS, Domain, Norm, Settings, setting
from attacks.geometry import least_step, per_row, plane_crossing, row_norm
from attacks.isolation import Classifier
from attacks.isolation.view import Bounds
from attacks.search.radius import ball_point, likeliest_others


def gap_and_normal(
    leaf: Tensor, logits: Tensor, labels: Tensor, targets: Tensor, *, retain_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """The label's lead over the target ``(A,)`` and the direction ``(A, ...)`` in which it falls; one backward."""
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    (rise,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=retain_graph)
    return gap.detach(), -rise


def nearest_plane(
    leaf: Tensor, logits: Tensor, labels: Tensor, others: Tensor, norm: Norm, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """The way to the nearest linearised boundary between the label and the others; one backward each.

    Moosavi-Dezfooli et al. 2016, Algorithm 2; Jiang et al. 2019, eq. 3. Departs from both in the box, where
    it is the nearest point of the box on that boundary; where no boundary can be reached there, the way
    that closes the largest part of a gap.

    Args:
        leaf: ``(A, ...)``, of which ``logits`` ``(A, K)`` are, with gradients.
        labels: ``(A,)``. others: ``(A, C)`` classes, C >= 1.

    Returns:
        direction: ``(A, ...)``; 0 where no gradient leads anywhere.
        length: ``(A,)`` float64; both as of `plane_crossing`.
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


@dataclass(frozen=True, kw_only=True)
class Linear(Settings):
    """The one-step linearised margin (Jiang et al. 2019, eq. 3), the smallest over classes, made a witness.

    The nearest point of the linearised boundaries is passed by ``overshoot``; where the class has not
    changed, the length is doubled, up to ``doublings`` times. What `measure` verifies is therefore the
    distance *along this one direction*, an upper bound; the linearised margin itself (``attack_distance``
    over 1 + ``overshoot`` where nothing was doubled, in free space) bounds nothing. Costs a forward and a
    backward for each other class, and a forward for each length but the last.

    Departs from the paper: at the input only, not at hidden layers; the nearest of the ``candidates``
    likeliest classes, not the runner-up; the box.
    """

    name: ClassVar[str] = "linear"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True

    candidates: int = setting(10, least=2)
    overshoot: float = setting(1e-3, least=0)
    doublings: int = setting(6, least=0)

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`."""
        leaf = images.clone().requires_grad_()
        logits = model(leaf)
        others = likeliest_others(logits, labels, self.candidates - 1)
        direction, length = nearest_plane(leaf, logits, labels, others, norm, model.bounds)
        reach = (1 + self.overshoot) * length + least_step(images, norm)
        points = ball_point(images, direction, reach, model.bounds)
        rows = torch.nonzero(direction.flatten(1).any(1)).flatten()
        for _ in range(self.doublings):
            if not len(rows):
                break
            with torch.no_grad(), model.rows(rows):
                rows = rows[model(points[rows]).argmax(1) == labels[rows]]
            reach[rows] *= 2
            points[rows] = ball_point(images[rows], direction[rows], reach[rows], model.bounds)
        return points
