"""The default cheap estimator: walks from the image towards its nearest classes, under a budget of passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.descent import Walks, advance, move, set_out
from attacks.estimator import DOMAINS, NORMS, Domain, Norm, Settings, setting
from attacks.geometry import dual_norm, row_norm
from attacks.isolation import Classifier

# what `measure` may still spend on a row: a look, at most 24 bisections and 5 steps back; or two looks a noise retry
RESERVE = 30
# a walk of fewer steps than this gets hardly beyond its first crossing: small budgets have fewer walks
FEWEST_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """How walks go: step length over radius and shrinkage of the radius, from first to last; and momentum."""

    stride: tuple[float, float]
    shrink: tuple[float, float]
    momentum: float


# chosen by measurement on Fashion-MNIST networks; momentum helps signs and hinders gradients
PACES: Mapping[Norm, Pace] = {
    "l2": Pace((3.0, 0.02), (0.1, 0.002), 0.0),
    "linf": Pace((3.0, 0.02), (0.1, 0.002), 0.5),
}


@dataclass(frozen=True, kw_only=True)
class Cascade(Settings):
    """DeepFool's steps out to each of the nearest classes, then fast-minimum-norm steps, all within ``budget`` passes.

    One forward and a vector-Jacobian product for each of ``candidates`` classes rank them by linearised distance
    (DeepFool, Moosavi-Dezfooli et al. 2016, eq. 8) and by logit, of which the one ranks better on standard and the
    other on adversarially trained networks; the first ``targets`` of both lists, in turn, get a walk each (see
    `attacks.descent`), and so does a given ``start``. Strides fall on a cosine of the image's own spent share, so
    that what a walk that stops does not spend lengthens the others'. A walk stops where it is optimal to first order,
    where its gradient dies, and where its witness, or the radius that it has searched, is beyond the image's best by
    more than ``slack``, which falls to nothing on the same cosine.

    ``budget`` bounds the forwards and backwards of every image, the judge's clean pass, checks, refinement and up to
    14 noise retries included; retries spend what earlier calls have left.
    """

    name: ClassVar[str] = "cascade"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True

    budget: int = setting(300, least=60)
    targets: int = setting(4, least=1)
    candidates: int = setting(10, least=2)
    slack: float = setting(0.5, least=0)

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
        begun, limit, pace = spent(model), self.budget - RESERVE, PACES[norm]
        rows = torch.nonzero(begun + 1 + min(self.candidates, model.classes) <= limit).flatten().to(images.device)
        best = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        result = images.clone()
        if not len(rows):
            return result
        afford = ((limit - begun) // (2 * FEWEST_STEPS)).clamp(1, self.targets).to(images.device)
        walks = self._towards_classes(model, images, labels, norm, rows, afford[rows])
        if start is not None:
            walks = walks.join(_from_start(model, images, labels, norm, rows, start))
        while len(walks):
            share = (spent(model) - begun) / (limit - begun)
            fall = (1 + torch.cos(math.pi * share.to(images.device)[walks.owner])) / 2
            advance(
                model,
                images,
                labels,
                walks,
                norm,
                stride=pace.stride[1] + (pace.stride[0] - pace.stride[1]) * fall,
                shrink=pace.shrink[1] + (pace.shrink[0] - pace.shrink[1]) * fall,
                momentum=pace.momentum,
            )
            nearest = best.scatter_reduce(0, walks.owner, walks.distance, "amin")
            winner = (walks.distance < best[walks.owner]) & (walks.distance == nearest[walks.owner])
            result[walks.owner[winner]] = walks.witness[winner]
            best = nearest
            claim = torch.where(walks.distance.isfinite(), walks.distance, walks.radius)
            walks = walks.select(~walks.done & (claim <= best[walks.owner] * (1 + self.slack * fall)))
            cost = 2 * torch.bincount(walks.owner.cpu(), minlength=len(images))
            walks = walks.select((spent(model) + cost <= limit).to(images.device)[walks.owner])
        return result

    def _towards_classes(
        self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm, rows: Tensor, afford: Tensor
    ) -> Walks:
        """Walks of these images towards the nearest ``afford`` of their classes, their first step taken."""
        count = min(self.candidates, model.classes) - 1
        with model.rows(rows):
            gaps, gradients, classes = class_slopes(model, images[rows], labels[rows], count)
        linear = gaps.double() / torch.stack([dual_norm(g, norm) for g in gradients.unbind(1)], 1)
        linear = torch.where(linear.isfinite(), linear, torch.inf)
        by_gap = torch.arange(count, device=rows.device)
        by_linear = linear.argsort(dim=1, stable=True).argsort(dim=1)
        # the two lists in turn, each class where it first comes
        order = torch.minimum(2 * by_linear, 2 * by_gap + 1).argsort(dim=1, stable=True)[:, : self.targets]
        walks = set_out(images, rows.repeat_interleave(order.shape[1]), classes.gather(1, order).flatten())
        chosen = torch.arange(len(rows), device=rows.device).repeat_interleave(order.shape[1]), order.flatten()
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
        rank = torch.arange(order.shape[1], device=rows.device).repeat(len(rows))
        return walks.select(~walks.done & (rank < afford.repeat_interleave(order.shape[1])))


def class_slopes(model: Classifier, images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The label's logit less those of the ``count`` largest other ones, ``(B, count)``, the first the largest.

    Returns:
        These gaps; their gradients ``(B, count, ...)``; the classes ``(B, count)``. One forward, ``count`` backwards.
    """
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    others = logits.detach().scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    classes = others[:, :count]
    gaps = logits.gather(1, labels[:, None]) - logits.gather(1, classes)
    gradients = [torch.autograd.grad(gap.sum(), leaf, retain_graph=True)[0] for gap in gaps.unbind(1)]
    return gaps.detach(), torch.stack(gradients, 1), classes


def spent(model: Classifier) -> Tensor:
    """Passes so far of each active image, ``(B,)`` float64 on the CPU."""
    return (model.forwards + model.backwards)[model.active.cpu()]


def _from_start(model: Classifier, images: Tensor, labels: Tensor, norm: Norm, rows: Tensor, start: Tensor) -> Walks:
    """Walks that stand on known points, towards the classes that are found there, be they still beyond or not."""
    there = start[rows].to(images).clamp(*model.bounds)
    radius = row_norm(there - images[rows], norm)
    usable = radius.isfinite() & (radius > 0)
    rows, there, radius = rows[usable], there[usable], radius[usable]
    if not len(rows):
        return set_out(images, rows, rows)
    with torch.no_grad(), model.rows(rows):
        target = model(there).scatter(1, labels[rows, None], -torch.inf).argmax(1)
    walks = set_out(images, rows, target)
    walks.point, walks.radius = there, radius
    return walks
