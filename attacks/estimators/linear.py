"""Linearised margin: one step to the nearest linearised boundary, lengthened until the class changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.estimator import Settings, setting
from attacks.geometry import ball_point, least_step
from attacks.isolation import Classifier
from attacks.search.linearised import most_likely_others, nearest_plane
from attacks.types import BOTH_DOMAINS, BOTH_NORMS, Domain, Norm


@dataclass(frozen=True, kw_only=True)
class Linear(Settings):
    """The one-step linearised margin (Jiang et al. 2019, eq. 3), the smallest over classes, turned into a witness.

    The step ends ``overshoot`` beyond the nearest linearised boundary. Where the class has not changed, the length is
    doubled, up to ``doublings`` times. `measure` therefore verifies the distance *along this one direction*, an upper
    bound. The linearised margin itself (``attack_distance`` over 1 + ``overshoot`` if nothing was doubled, in the free
    domain) is not a bound. Costs a forward and a backward for each other class, and a forward for each length except
    the last.

    Departs from the paper: linearised at the input only, not at hidden layers; the nearest of the ``candidates`` most
    likely classes, not the runner-up; restricted to the box.
    """

    name: ClassVar[str] = "linear"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
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
        others = most_likely_others(logits, labels, self.candidates - 1)
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
