"""Fast minimum-norm attacks on Foolbox's implementation, with an L2 projection that projects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor

from attacks.estimator import Domain, Norm, Settings, setting
from attacks.isolation import Bounds, Classifier
from attacks.radius import likeliest_others
from attacks.upstream import library
from attacks.via_foolbox import BOTH, EVERYWHERE, run

# what float32 resolves of a pixel, with something to spare
LEAST_NUDGE = 1e-6
# how far a start that is no witness any more is pushed on, away from its image: of the witnesses of the epoch before
# about 40% are still across on digits and Fashion-MNIST networks, and 80 to 90% after these
PUSHES = (1.0, 1.1, 1.3, 2.0)
# Foolbox's bisections between image and start: to 1/32 of the way, from where the descent finds on by itself
BISECTIONS = 5


class ProjectedL2FMN(library.L2FMNAttack):
    """Foolbox's L2 FMN with a projection that projects.

    Foolbox 3.3.4 scales by ``min(1, norms / norms)``, so that epsilon is unused and the result lies
    about one step size away from the image whatever the margin. Points are clipped into ``bounds``
    before they are scaled: clipped afterwards, as the paper has it, they lose length at every step
    and many images with pixels at the bounds are never brought across.
    """

    def __init__(self, nudge: float, bounds: Bounds, **settings: Any) -> None:
        super().__init__(**settings)
        self.nudge, self.bounds = nudge, bounds

    def project(self, x: ep.Tensor, x0: ep.Tensor, epsilon: ep.Tensor) -> ep.Tensor:
        """The point of the nudged ball around ``x0`` towards the clipped ``x``."""
        perturbation = x.clip(*self.bounds) - x0
        length = ep.maximum(perturbation.flatten(1).norms.l2(axis=-1), 1e-12)
        factor = ep.minimum(1.0, (epsilon * (1.0 + self.nudge) + LEAST_NUDGE) / length)
        return x0 + perturbation * factor.reshape((-1,) + (1,) * (x.ndim - 1))


class NudgedLinfFMN(library.LInfFMNAttack):
    """Foolbox's L-infinity FMN with nudged balls."""

    def __init__(self, nudge: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.nudge = nudge

    def project(self, x: ep.Tensor, x0: ep.Tensor, epsilon: ep.Tensor) -> ep.Tensor:
        """Nearest point of the nudged ball around ``x0``."""
        return super().project(x, x0, epsilon * (1.0 + self.nudge) + LEAST_NUDGE)


@dataclass(frozen=True, kw_only=True)
class FMN(Settings):
    """Fast minimum-norm attack (Pintor et al. 2021, Algorithm 1) on Foolbox's implementation.

    Departs from Foolbox: the L2 projection is mended (`ProjectedL2FMN`), and balls are larger by
    ``nudge`` of their radius and ``LEAST_NUDGE``: FMN aims exactly at the boundary and otherwise stops
    just inside of it where the network is locally linear. The bisection of `measure` takes it off again.

    Where a start is given, ``warm`` replaces ``steps`` by two short descents of ``warm`` steps each, one from the image
    and one from the start, pushed on until it is a witness again; the nearest verified point of both is kept. Images
    without a start get the ordinary ``steps``. With ``warm`` 0, a start that is a witness takes the image's place.

    With ``targets``, one run towards each of so many likeliest other classes, of which the nearest verified point is
    kept; a start is of no use to it.
    """

    name: ClassVar[str] = "fmn"
    norms: ClassVar[frozenset[Norm]] = BOTH
    domains: ClassVar[frozenset[Domain]] = EVERYWHERE
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.001, "linf": 1.001}
    batch_invariant: ClassVar[bool] = True
    # distance / that of 100 cold steps, and images farther by more than 1%; means of 20 epochs of digits and 8 of
    # Fashion-MNIST, 300 test images; passes an image (cold: 218):
    #                             digits L2    L-infinity   Fashion L2   L-infinity   passes
    #   20 cold steps             1.005  4.0%  1.006  6.9%  1.005  5.8%  1.012   25%      63
    #   30 from the start alone   1.068   24%  1.053   26%  1.007   13%  1.014   22%     110
    #   warm=10                   0.994  7.6%  0.991  8.5%  0.994  9.3%  1.017   39%      63
    #   warm=20                   0.991  0.7%  0.987  1.1%  0.990  1.0%  0.999   10%     100
    #   warm=30                   0.990  0.2%  0.987  0.6%  0.989  0.3%  0.994  3.1%     135
    # the start alone keeps to the class that was nearest once, and is worse than fewer steps. What an epoch found is
    # handed on, so that warm margins fall below cold ones over epochs (Fashion-MNIST, L-infinity: 1.006 to 0.987)
    WARM: ClassVar[int] = 30

    steps: int = setting(100, least=1)
    max_stepsize: float = setting(1.0, least=0)
    gamma: float = setting(0.05, least=0)
    nudge: float = setting(1e-3, least=0)
    warm: int = setting(0, least=0)
    targets: int = setting(0, least=0)

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
        if self.targets:
            return self._towards_classes(model, images, labels, norm)
        if start is None:
            return self._descend(model, images, labels, norm, self.steps)
        # the image itself is how `measure` says that there is no start
        given = (start != images).flatten(1).any(1)
        begin, outside = push_out(model, images, labels, start, given, PUSHES if self.warm else PUSHES[:1])
        result = images.clone()

        def descend(rows: Tensor, steps: int, begin: Tensor | None = None) -> None:
            # Foolbox raises for the whole batch where one starting point is no witness
            if rows.any():
                with model.rows(torch.nonzero(rows).flatten()):
                    points = None if begin is None else begin[rows]
                    result[rows] = self._descend(model, images[rows], labels[rows], norm, steps, points)

        if not self.warm:
            descend(outside, self.steps, begin)
            descend(~outside, self.steps)
            return result
        descend(~given, self.steps)
        with model.recording(images, labels, norm) as record:
            descend(given, self.warm)
            descend(outside, self.warm, begin)
        return record.improve(result)

    def _towards_classes(self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        with torch.no_grad():
            classes = likeliest_others(model(images), labels, self.targets)
        with model.recording(images, labels, norm) as record:
            for targets in classes.unbind(1):
                run(self._attack(model, norm, self.steps), model, images, labels, targets=targets)
        return record.improve(images)

    def _descend(
        self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm, steps: int, begin: Tensor | None = None
    ) -> Tensor:
        attack = self._attack(model, norm, steps)
        if begin is None:
            return run(attack, model, images, labels)
        attack.binary_search_steps = BISECTIONS
        return run(attack, model, images, labels, starting_points=begin)

    def _attack(self, model: Classifier, norm: Norm, steps: int) -> Any:
        settings = {"steps": steps, "max_stepsize": self.max_stepsize, "gamma": self.gamma}
        if norm == "l2":
            return ProjectedL2FMN(self.nudge, model.bounds, **settings)
        return NudgedLinfFMN(self.nudge, **settings)


@torch.no_grad()
def push_out(
    model: Classifier, images: Tensor, labels: Tensor, start: Tensor, given: Tensor, factors: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The given starts ``(B, ...)``, each at the first of these multiples of its perturbation that is a witness.

    Returns:
        The points, and which are witnesses ``(B,)``: none but of the rows ``given`` ``(B,)``.
    """
    points, outside = start.clone(), torch.zeros_like(given)
    for factor in factors:
        rows = torch.nonzero(given & ~outside).flatten()
        if not len(rows):
            break
        moved = (images[rows] + factor * (start[rows] - images[rows])).clamp(*model.bounds)
        with model.rows(rows):
            hit = model(moved).argmax(1) != labels[rows]
        points[rows[hit]] = moved[hit]
        outside[rows[hit]] = True
    return points, outside
