"""Decoupled direction and norm: ascent on cross-entropy on a sphere that shrinks when the class changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from attacks.estimator import Settings, setting
from attacks.geometry import farthest_in_box, per_row, row_norm, steepest_step
from attacks.isolation import Classifier
from attacks.search.linearised import first_order_margin, left_class
from attacks.search.radius import FREE_REACH
from attacks.search.scale_free import ScaleFree
from attacks.types import BOTH_DOMAINS, Domain, Norm

# the first radius, in first-order margins: with 1, a third more images follow a class that is not the nearest; with 3,
# distances on adversarially trained networks are larger
FIRST = 1.5
# length of the last step over that of the first, as in Foolbox
LAST = 0.01
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class DDN(Settings):
    """DDN (Rony et al. 2019, Algorithm 1), unquantised, in units of each image's own radius.

    Departs from the paper and from Foolbox: the first radius is 1.5 times the image's first-order margin instead of 1;
    it grows by ``growth`` per step until a first witness is found; steps are in units of the radius, not of pixels. No
    step is spent on shrinking from a radius of 1 or on growing to a large margin, and 60 steps give distances as small
    as Foolbox's 100. Cross-entropy is of ``temperature * z / std(z)``: of raw logits, its gradient vanishes as
    confidence grows. Where the gradient is 0 the point stays; Foolbox draws noise there.
    """

    name: ClassVar[str] = "ddn"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.001}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(60, least=1)
    gamma: float = setting(0.05, least=0)
    growth: float = setting(0.2, least=0)
    temperature: float = setting(10.0, least=0.1)

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
        view = ScaleFree(model, self.temperature)
        reach = farthest_in_box(images, norm) * (1.0 if model.domain == "box" else FREE_REACH)
        radius = torch.minimum(FIRST * first_order_margin(model, images, labels, norm)[0], reach)
        points, witness = images, images.clone()
        least = torch.full_like(radius, torch.inf)
        for step in range(self.steps):
            leaf = points.detach().clone().requires_grad_()
            logits = view(leaf)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), leaf)
            outside = left_class(logits, labels)
            distance = row_norm(points - images, norm)
            nearer = outside & (distance < least) & (distance > 0)
            least = torch.where(nearer, distance, least)
            witness = torch.where(per_row(nearer, points).bool(), points, witness)
            length = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / self.steps)) / 2
            ahead = points + per_row(length * radius, points) * steepest_step(gradient, norm)
            grown = torch.where(least.isfinite(), 1 + self.gamma, 1 + self.growth)
            radius = torch.minimum(radius * torch.where(outside, 1 - self.gamma, grown), reach)
            offset = ahead - images
            offset = offset * per_row(radius / row_norm(offset, norm).clamp_min(TINY), offset)
            points = (images + offset).clamp(*model.bounds)
        return witness
