"""Auto-PGD with a radius per image (Croce & Hein 2020, Algorithm 1), on DLR and targeted DLR.

Implemented here: torchattacks' version raises an error on tensor radii once a row drops out and on two classes, and its
targeted L2 form uses the first row's step size for all rows. The tests compare both at one radius.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from attacks.estimator import Settings, setting
from attacks.geometry import ball_point, per_row, project, steepest_step
from attacks.isolation import Classifier
from attacks.search.linearised import logit_gap, most_likely_others
from attacks.search.radius import bisect_radius, misses
from attacks.seeds import seeded_directions
from attacks.trace import Record
from attacks.types import BOTH_DOMAINS, BOTH_NORMS, Bounds, Domain, Norm

Loss = Callable[[Tensor], Tensor]
TINY = 1e-12


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Untargeted difference of logits ratio (eq. 6), ``(B,)``; with two classes, where it is undefined, the difference.

    Args:
        logits: ``(B, K)``. labels: ``(B,)`` int64.
    """
    gap = logit_gap(logits, labels)
    if logits.shape[1] < 3:
        return -gap
    top = logits.sort(dim=1, descending=True).values
    return -gap / (top[:, 0] - top[:, 2] + TINY)


def targeted_dlr_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (eq. 7), ``(B,)``; with fewer than four classes, where it is undefined, the difference of logits.

    Args:
        logits: ``(B, K)``. labels, targets: ``(B,)`` int64.
    """
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return -gap
    top = logits.sort(dim=1, descending=True).values
    return -gap / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY)


def ascend(
    model: Callable[[Tensor], Tensor],
    loss: Loss,
    images: Tensor,
    radius: Tensor,
    start: Tensor,
    norm: Norm,
    *,
    steps: int,
    bounds: Bounds,
    rho: float = 0.75,
) -> Tensor:
    """Maximise ``loss`` of the logits inside each image's ball: momentum 0.75, step sizes halved at checkpoints.

    Args:
        model: ``(A, ...)`` -> logits ``(A, K)``, differentiable.
        loss: logits -> ``(A,)``, larger is better.
        images, start: ``(A, ...)``; radius: ``(A,)``.
        steps: iterations, one forward and one backward each, after one of each at the start.
        rho: fraction of improving steps below which the step size is halved (condition 1).

    Returns:
        ``(A, ...)``: the last iterate (callers record what passes through ``model``).
    """
    limit = per_row(radius, images)

    def into_ball(points: Tensor) -> Tensor:
        return (images + project(points - images, radius, norm)).clamp(*bounds)

    interval, least, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    step = 2.0 * limit.expand_as(images[:, :1, :1, :1]).clone()
    value, gradient = _value_and_gradient(model, loss, start)
    current, previous = start, start
    best, best_gradient, best_value = start.clone(), gradient.clone(), value.clone()
    value_at_check, halved_at_check = best_value.clone(), torch.ones_like(value, dtype=torch.bool)
    # values since the last checkpoint, that of the checkpoint first; as in the authors' code, the first step is
    # compared with 0
    history = [torch.zeros_like(value)]
    for iteration in range(steps):
        momentum = 0.75 if iteration else 1.0
        ahead = into_ball(current + step * steepest_step(gradient, norm))
        moved = into_ball(current + momentum * (ahead - current) + (1 - momentum) * (current - previous))
        current, previous = moved, current
        value, gradient = _value_and_gradient(model, loss, current)
        better = value > best_value
        best = torch.where(per_row(better, best).bool(), current, best)
        best_gradient = torch.where(per_row(better, best).bool(), gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        history.append(value)
        if len(history) > interval:
            rises = torch.stack([after > before for before, after in pairwise(history)]).sum(0)
            stalled = ~halved_at_check & (value_at_check >= best_value)
            halve = (rises <= interval * rho) | stalled
            step = torch.where(per_row(halve, step).bool(), step / 2, step)
            current = torch.where(per_row(halve, best).bool(), best, current)
            gradient = torch.where(per_row(halve, best).bool(), best_gradient, gradient)
            value_at_check, halved_at_check = best_value.clone(), halve
            history, interval = [value], max(interval - shrink, least)
    return current


def _value_and_gradient(model: Callable[[Tensor], Tensor], loss: Loss, points: Tensor) -> tuple[Tensor, Tensor]:
    leaf = points.detach().clone().requires_grad_()
    value = loss(model(leaf))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@dataclass(frozen=True, kw_only=True)
class APGD(Settings):
    """Auto-PGD on DLR, then on targeted DLR for the ``targets`` most likely other classes, radius bisected.

    Croce & Hein 2020 (AutoAttack's APGD-DLR and APGD-T). Departs from it: a radius per image, found by bisection, and
    few steps, since a witness's segment is bisected too.
    """

    name: ClassVar[str] = "apgd"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.003, "linf": 1.005}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(20, least=1)
    rounds: int = setting(7, least=1)
    targets: int = setting(3, least=0)

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
        with torch.no_grad():
            others = most_likely_others(model(images), labels, self.targets)
        losses = [partial(_untargeted, labels)] + [
            partial(_targeted, labels, others[:, r]) for r in range(others.shape[1])
        ]
        directions = [seeded_directions(images, seeds, norm, stream) for stream in range(len(losses))]

        def attempt(rows: Tensor, radius: Tensor, record: Record) -> None:
            left = torch.arange(len(rows), device=rows.device)
            for loss, direction in zip(losses, directions, strict=True):
                active = rows[left]
                begin = ball_point(images[active], direction[active], radius[left], model.bounds)
                with model.rows(left):
                    ascend(
                        model,
                        partial(loss, active),
                        images[active],
                        radius[left],
                        begin,
                        norm,
                        steps=self.steps,
                        bounds=model.bounds,
                    )
                left = torch.nonzero(misses(record, rows, radius)).flatten()
                if not len(left):
                    return

        return bisect_radius(attempt, model, images, labels, norm, rounds=self.rounds)


def _untargeted(labels: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    return dlr_loss(logits, labels[rows])


def _targeted(labels: Tensor, targets: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    return targeted_dlr_loss(logits, labels[rows], targets[rows])
