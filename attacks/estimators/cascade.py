"""Multi-start descent towards the nearest classes under a budget of passes, the default estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.estimator import Settings, setting
from attacks.geometry import dual_norm, row_norm
from attacks.isolation import Classifier
from attacks.search.descent import Walks, advance, kick, move, set_out
from attacks.search.linearised import class_slopes
from attacks.types import BOTH_DOMAINS, BOTH_NORMS, Domain, EstimatorError, Norm

# passes that `measure` may still spend on a row: a check, at most 24 bisections and 5 steps back; or two checks per
# noise retry
RESERVE = 30
LEAST_BUDGET = 60
# a walk of fewer steps hardly gets beyond its first crossing: small budgets have fewer walks
FEWEST_STEPS = 15
# smallest number of passes between kicks: kicked earlier, walks have not converged
SHORTEST_ROUND = 54


@dataclass(frozen=True)
class Pace:
    """Step sizes and restarts of walks in one norm.

    Attributes:
        stride, shrink: first and last value of the step length over the radius, and of the relative reduction of the
            radius at a crossing.
        momentum: factor of the drift at every step.
        kicks: the most random restarts from the witnesses, at each of which the stride starts again.
        kick: length of a kick, in distances of the witness.
        slack: relative excess over the image's best distance at which a walk is kept at first; see `Cascade`.
    """

    stride: tuple[float, float]
    shrink: tuple[float, float]
    momentum: float
    kicks: int
    kick: float
    slack: float

    def at(self, used: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kicks so far ``(B,)`` int64, stride and shrink, after ``used`` ``(B,)`` passes of ``whole``.

        Stride and shrink fall on half a cosine between kicks. The round after a kick is a fifth of the whole.
        """
        length = (whole / 5).clamp(min=SHORTEST_ROUND)
        kicks = (whole / SHORTEST_ROUND - 1).floor().clamp(0, self.kicks)
        first = whole - kicks * length
        now = torch.minimum(((used - first) / length).floor().clamp(min=-1) + 1, kicks)
        begin, span = torch.where(now > 0, first + (now - 1) * length, 0.0), torch.where(now > 0, length, first)
        fall = falling((used - begin) / span)
        stride, shrink = (last + (first - last) * fall for first, last in (self.stride, self.shrink))
        return now.long(), stride, shrink


# Chosen by measurement on Fashion-MNIST networks. Without kicks, three times the passes gained little: all steps
# stayed in one basin. Momentum helps with sign steps and harms with gradient steps.
PACES: Mapping[Norm, Pace] = {
    "l2": Pace((2.0, 0.02), (0.1, 0.002), 0.0, 4, 3.0, 0.5),
    "linf": Pace((3.0, 0.02), (0.1, 0.002), 0.5, 2, 1.0, 0.1),
}


@dataclass(frozen=True, kw_only=True)
class Cascade(Settings):
    """DeepFool steps to each of the nearest classes, then fast-minimum-norm steps, all within ``budget`` passes.

    One forward and a vector-Jacobian product for each of ``candidates`` classes rank the classes by linearised distance
    (DeepFool, Moosavi-Dezfooli et al. 2016, eq. 8) and by logit. The former ranks better on standard networks, the
    latter on adversarially trained ones. The first ``targets`` classes, taken from both lists in turn, get a walk each
    (see `attacks.search.descent`), and so does a given ``start``. Strides fall on a cosine of the fraction of the
    budget that the image has spent: passes that a finished walk does not spend lengthen the others. At intervals, walks
    are kicked off their witnesses, in directions drawn from the images' own seeds, and strides start again (`PACES`).
    A walk stops if it is optimal to first order, if its gradient vanishes, or if its witness (without one, the radius
    that it has searched) exceeds the image's best distance by more than the pace's slack, which falls to 0 over the
    budget.

    ``budget`` bounds the forwards and backwards of every image, including `measure`'s clean pass, checks, refinement
    and up to 14 noise retries; retries spend what earlier calls have left. Where a start is given and ``warm`` is not
    0, ``warm`` replaces ``budget``.
    """

    name: ClassVar[str] = "cascade"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True
    # on Fashion-MNIST networks, half the passes from the witnesses of the epoch before are about as good as half the
    # passes without them on standard networks, and much better on adversarially trained ones
    WARM: ClassVar[int] = 150

    budget: int = setting(300, least=LEAST_BUDGET)
    targets: int = setting(4, least=1)
    candidates: int = setting(10, least=2)
    warm: int = setting(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.warm < LEAST_BUDGET:
            raise EstimatorError(
                f"expected warm to be 0 or at least {LEAST_BUDGET}, got {self.warm}; give a larger number"
            )

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
        begun, limit, pace = spent(model), self._limits(images, norm, start), PACES[norm]
        result, done = images.clone(), torch.zeros_like(labels)
        best = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        rows = torch.nonzero(begun + 1 + min(self.candidates, model.classes) <= limit).flatten()
        if not len(rows):
            return result
        afford = ((limit - begun) // (2 * FEWEST_STEPS)).clamp(1, self.targets)
        walks = self._towards_classes(model, images, labels, norm, rows, afford[rows])
        if start is not None:
            walks = walks.join(_from_start(model, images, labels, norm, rows, start))
        while len(walks):
            used, whole = spent(model) - begun, limit - begun
            now, stride, shrink = pace.at(used, whole)
            kick(walks, (now > done)[walks.owner], images, model.bounds, seeds, norm, size=pace.kick, stream=now)
            done = now
            owner = walks.owner
            advance(
                model, images, labels, walks, norm, stride=stride[owner], shrink=shrink[owner], momentum=pace.momentum
            )
            nearest = best.scatter_reduce(0, owner, walks.distance, "amin")
            winner = (walks.distance < best[owner]) & (walks.distance == nearest[owner])
            result[owner[winner]] = walks.witness[winner]
            best = nearest
            claim = torch.where(walks.distance.isfinite(), walks.distance, walks.radius)
            walks = walks.select(~walks.done & (claim <= (best * (1 + pace.slack * falling(used / whole)))[owner]))
            cost = 2 * torch.bincount(walks.owner, minlength=len(images))
            walks = walks.select((spent(model) + cost <= limit)[walks.owner])
        return result

    def _limits(self, images: Tensor, norm: Norm, start: Tensor | None) -> Tensor:
        """Passes that each image may spend in `perturb`, ``(B,)`` float64."""
        limit = torch.full((len(images),), self.budget - RESERVE, dtype=torch.float64, device=images.device)
        if self.warm and start is not None:
            limit[_reach(images, norm, start).isfinite()] = self.warm - RESERVE
        return limit

    def _towards_classes(
        self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm, rows: Tensor, afford: Tensor
    ) -> Walks:
        """Walks of the images ``rows`` towards their nearest ``afford`` ``(A,)`` classes, after the first step."""
        count = min(self.candidates, model.classes) - 1
        with model.rows(rows):
            gaps, gradients, classes = class_slopes(model, images[rows], labels[rows], count)
        linear = gaps.double() / torch.stack([dual_norm(g, norm) for g in gradients.unbind(1)], 1)
        linear = torch.where(linear.isfinite(), linear, torch.inf)
        by_gap = torch.arange(count, device=rows.device)
        by_linear = linear.argsort(dim=1, stable=True).argsort(dim=1)
        # the two lists in turn, each class at its first occurrence
        order = torch.minimum(2 * by_linear, 2 * by_gap + 1).argsort(dim=1, stable=True)[:, : self.targets]
        row, rank = torch.nonzero(torch.arange(order.shape[1], device=rows.device) < afford[:, None]).unbind(1)
        chosen = row, order[row, rank]
        walks = set_out(images, rows[row], classes[chosen])
        still = torch.zeros_like(walks.radius)
        move(
            walks,
            images,
            model,
            gaps[chosen],
            gradients[chosen],
            norm,
            outside=torch.zeros_like(walks.done),
            stride=still,
            shrink=still,
            momentum=0.0,
        )
        return walks.select(~walks.done)


def falling(share: Tensor) -> Tensor:
    """Half a cosine: 1 at ``share`` 0, 0 at 1."""
    return (1 + torch.cos(math.pi * share)) / 2


def spent(model: Classifier) -> Tensor:
    """Passes so far of each active image, ``(B,)`` float64."""
    return (model.forwards + model.backwards)[model.active]


def _from_start(model: Classifier, images: Tensor, labels: Tensor, norm: Norm, rows: Tensor, start: Tensor) -> Walks:
    """Walks that begin at known points, towards the other class of the largest logit there."""
    points = start[rows].to(images).clamp(*model.bounds)
    radius = _reach(images[rows], norm, points)
    usable = radius.isfinite()
    rows, points, radius = rows[usable], points[usable], radius[usable]
    if not len(rows):
        return set_out(images, rows, rows)
    with torch.no_grad(), model.rows(rows):
        target = model(points).scatter(1, labels[rows, None], -torch.inf).argmax(1)
    walks = set_out(images, rows, target)
    walks.point, walks.radius = points, radius
    return walks


def _reach(images: Tensor, norm: Norm, start: Tensor) -> Tensor:
    """Distances ``(B,)`` float64 of starts from their images; inf for a start that cannot be used."""
    distance = row_norm(start - images, norm)
    return torch.where(distance.isfinite() & (distance > 0), distance, torch.inf)
