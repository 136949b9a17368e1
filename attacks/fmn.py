"""Fast minimum-norm attacks on Foolbox's implementation, with an L2 projection that projects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor

from attacks.estimator import Domain, Norm, Settings, setting
from attacks.isolation import Bounds, Classifier
from attacks.upstream import library
from attacks.via_foolbox import BOTH, EVERYWHERE, run

# what float32 resolves of a pixel, with something to spare
LEAST_NUDGE = 1e-6


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
    """

    name: ClassVar[str] = "fmn"
    norms: ClassVar[frozenset[Norm]] = BOTH
    domains: ClassVar[frozenset[Domain]] = EVERYWHERE
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.001, "linf": 1.001}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(100, least=1)
    max_stepsize: float = setting(1.0, least=0)
    gamma: float = setting(0.05, least=0)
    nudge: float = setting(1e-3, least=0)

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
        settings = {"steps": self.steps, "max_stepsize": self.max_stepsize, "gamma": self.gamma}
        if norm == "l2":
            attack: Any = ProjectedL2FMN(self.nudge, model.bounds, **settings)
        else:
            attack = NudgedLinfFMN(self.nudge, **settings)
        if start is None:
            return run(attack, model, images, labels)
        with torch.no_grad():
            outside = model(start).argmax(1) != labels
        result = images.clone()
        # Foolbox raises for the whole batch where one starting point is no witness
        for part, begin in ((outside, start), (~outside, None)):
            if part.any():
                options: dict[str, Any] = {} if begin is None else {"starting_points": begin[part]}
                with model.rows(torch.nonzero(part).flatten()):
                    result[part] = run(attack, model, images[part], labels[part], **options)
        return result
