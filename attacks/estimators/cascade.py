"""Multi-start descent towards the nearest classes, and restarts, under a budget of passes: the default estimator."""

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
from attacks.pool import Pool
from attacks.search.descent import Nearest, Walks, advance, kick, move, set_out
from attacks.search.linearised import class_slopes
from attacks.search.restarts import Course, Plan, Search, spent
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


# with fewer passes, all are better spent on walks
FEWEST_PASSES = 169
# passes of the default budget, for which the restarts were chosen, by measurement on PGD-trained networks of MNIST and
# Fashion-MNIST: from random points of the ball in L-infinity and from kicks in L2; a few steps decide, longer ones
# gained no more per pass
WHOLE = 270
RESTARTS: Mapping[Norm, Plan] = {
    "l2": Plan(
        restart=Course(12, (1.0, 0.02), (0.03, 0.001), 0.0),
        tries=1,
        expected=1,
        patience=1,
        kick=3.0,
        outside=Course(25, (2.0, 0.02), (0.1, 0.002), 0.0),
        finish=Course(12, (0.2, 0.005), (0.02, 0.001), 0.0),
    ),
    "linf": Plan(
        restart=Course(6, (1.0, 0.02), (0.03, 0.001), 0.5),
        tries=5,
        expected=6,
        patience=6,
        kick=None,
        outside=Course(25, (3.0, 0.02), (0.1, 0.002), 0.5),
        finish=Course(12, (0.2, 0.005), (0.02, 0.001), 0.0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cascade(Settings):
    """Walks to each of the nearest classes, then short restarts while these gain, all within an expected ``budget``.

    One forward and a vector-Jacobian product for each of ``candidates`` classes rank the classes by linearised distance
    (DeepFool, Moosavi-Dezfooli et al. 2016, eq. 8) and by logit. The former ranks better on standard networks, the
    latter on adversarially trained ones. The first ``targets`` classes, taken from both lists in turn, get a walk each
    (see `attacks.search.descent`), and so does a given ``start``. Strides fall on a cosine of the fraction of the
    budget that the image has spent: passes that a finished walk does not spend lengthen the others. At intervals, walks
    are kicked off their witnesses, in directions drawn from the images' own seeds, and strides start again (`PACES`).
    A walk stops if it is optimal to first order, if its gradient vanishes, or if its witness (without one, the radius
    that it has searched) exceeds the image's best distance by more than the pace's slack, which falls to 0 over the
    budget.

    Where the budget is twice what it takes, from 200 on in L2 and 237 in L-infinity, part of it goes to restarts in the
    ball of the best distance (`RESTARTS`): from a random point of it in L-infinity, from a kick off the witness in L2.
    Where none gains they end; where one does, they go on until several in a row gain nothing. A descent with small
    strides from the nearest witness ends the search. The distance after the walks over that at the end is the image's
    ``basins``. With a ``pool``, every second restart in L-infinity begins towards
    a pool's image of another class, the nearest first; in L2, where a kick gained, a walk follows from the boundary on
    the way to the nearest one. Images without a witness get such a walk in both norms, without a pool on the way to
    their negative.

    ``budget`` is the expected number of forwards and backwards per image, including `measure`'s clean pass, checks,
    refinement and up to 14 noise retries; retries spend what earlier calls have left. No image spends more than
    ``most``, twice the budget by default (0), except that of an average over N draws, where a pass counts N times,
    `measure`'s own passes come to up to 30 (N - 1) more. Where a start is given and ``warm`` is not 0, ``warm``
    replaces ``budget``, and there are no restarts.
    """

    name: ClassVar[str] = "cascade"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True
    uses_pool: ClassVar[bool] = True
    # 2: restarts and a last descent; with a pool, walks from outside
    revision: ClassVar[int] = 2
    # on Fashion-MNIST networks, half the passes from the witnesses of the epoch before are about as good as half the
    # passes without them on standard networks, and much better on adversarially trained ones
    WARM: ClassVar[int] = 150

    budget: int = setting(300, least=LEAST_BUDGET)
    targets: int = setting(4, least=1)
    candidates: int = setting(10, least=2)
    warm: int = setting(0, least=0)
    most: int = setting(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.warm < LEAST_BUDGET:
            raise EstimatorError(
                f"expected warm to be 0 or at least {LEAST_BUDGET}, got {self.warm}; give a larger number"
            )
        largest = max(self.budget, self.warm)
        if 0 < self.most < largest:
            raise EstimatorError(
                f"expected most to be 0 or at least the budget of {largest}, got {self.most}; give a larger number"
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
        pool: Pool | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`."""
        begun, limit, plan = spent(model), self._limits(model, images, norm, start), self._plan(norm)
        # images with a warm start, and those that earlier calls have left little for, get walks alone
        least, whole = max(FEWEST_PASSES, 2 * plan.passes), (self.budget - RESERVE) / model.draws
        searched = (limit - begun >= least) & (limit == whole)
        search = Search(model, images, labels, norm, seeds, Nearest.none(images), pool)
        self._walk(search, start, begun, torch.where(searched, limit - plan.passes, limit))
        rows = torch.nonzero(searched).flatten()
        if len(rows):
            first = search.nearest.distance[rows]
            search.run(plan, rows, limit=((self.most or 2 * self.budget) - RESERVE) / model.draws)
            with model.rows(rows):
                model.disagree(torch.where(first.isfinite(), first, torch.nan) / search.nearest.distance[rows])
        return search.nearest.witness

    def _plan(self, norm: Norm) -> Plan:
        """Restarts in proportion to the budget."""
        return RESTARTS[norm].scaled((self.budget - RESERVE) / WHOLE)

    def _limits(self, model: Classifier, images: Tensor, norm: Norm, start: Tensor | None) -> Tensor:
        """Passes that each image may spend in `perturb` on average, ``(B,)`` float64."""
        limit = torch.full((len(images),), self.budget - RESERVE, dtype=torch.float64, device=images.device)
        if self.warm and start is not None:
            limit[_reach(images, norm, start).isfinite()] = self.warm - RESERVE
        return limit / model.draws

    def _walk(self, search: Search, start: Tensor | None, begun: Tensor, limit: Tensor) -> None:
        """Walks towards the nearest classes and from the start, up to ``limit`` ``(B,)`` passes."""
        model, images, labels, norm = search.model, search.images, search.labels, search.norm
        nearest, pace, done = search.nearest, PACES[norm], torch.zeros_like(labels)
        rows = torch.nonzero(begun + 1 + min(self.candidates, model.classes) <= limit).flatten()
        if not len(rows):
            return
        afford = ((limit - begun) // (2 * FEWEST_STEPS)).clamp(1, self.targets)
        walks = self._towards_classes(model, images, labels, norm, rows, afford[rows])
        if start is not None:
            walks = walks.join(_from_start(model, images, labels, norm, rows, start))
        while len(walks):
            used, whole = spent(model) - begun, limit - begun
            now, stride, shrink = pace.at(used, whole)
            turn = (now > done)[walks.owner]
            kick(walks, turn, images, model.bounds, search.seeds, norm, size=pace.kick, stream=now)
            done = now
            owner = walks.owner
            advance(
                model, images, labels, walks, norm, stride=stride[owner], shrink=shrink[owner], momentum=pace.momentum
            )
            nearest.note(walks)
            claim = torch.where(walks.distance.isfinite(), walks.distance, walks.radius)
            most = nearest.distance * (1 + pace.slack * falling(used / whole))
            walks = walks.select(~walks.done & (claim <= most[owner]))
            cost = 2 * torch.bincount(walks.owner, minlength=len(images))
            walks = walks.select((spent(model) + cost <= limit)[walks.owner])

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
