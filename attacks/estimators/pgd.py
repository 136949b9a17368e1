"""Projected gradient descent (PGD), from torchattacks, with the radius bisected per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torchattacks
from torch import Tensor, nn

from attacks.adapters.torchattacks import Anchored, quiet
from attacks.estimator import Settings, setting
from attacks.geometry import ball_point, per_row
from attacks.isolation import Classifier
from attacks.search.radius import bisect_radius, misses
from attacks.search.scale_free import ScaleFree
from attacks.seeds import seeded_directions
from attacks.trace import Record
from attacks.types import BOTH_NORMS, BOX_ONLY, Domain, Norm


class FirstStepFrom(nn.Module):
    """Shift the images of the first call to given points of their balls: a restart for attacks without restarts."""

    def __init__(self, model: nn.Module, points: Tensor) -> None:
        super().__init__()
        self.model = model
        self.points: Tensor | None = points
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.points is not None:
            images, self.points = images + (self.points - images).detach(), None
        logits: Tensor = self.model(images)
        return logits


@dataclass(frozen=True, kw_only=True)
class PGD(Settings):
    """torchattacks' PGD and PGDL2 (Madry et al. 2018) with a radius per image, bisected in one batch.

    The distance is that of the best witness, not the radius. Departs from the paper: no random start (each of
    ``restarts`` after the first takes its first gradient at a seeded point of the ball); step size
    ``2.5 * radius / steps``; cross-entropy of ``temperature * z / std(z)``, whose gradient does not vanish for
    confident images (``temperature=0`` uses the raw logits).
    """

    name: ClassVar[str] = "pgd"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.005, "linf": 1.01}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(20, least=1)
    rounds: int = setting(8, least=1)
    restarts: int = setting(1, least=1)
    temperature: float = setting(10.0, least=0)

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
        directions = [seeded_directions(images, seeds, norm, stream) for stream in range(1, self.restarts)]

        def attempt(rows: Tensor, radius: Tensor, record: Record) -> None:
            left = torch.arange(len(rows), device=rows.device)
            for direction in [None, *directions]:
                active = rows[left]
                begin = None
                if direction is not None:
                    begin = ball_point(images[active], direction[active], radius[left], model.bounds)
                with model.rows(left):
                    last = self.at_radius(model, images[active], labels[active], radius[left], norm, begin)
                    with torch.no_grad():
                        model(last)  # the record sees the last iterate
                left = torch.nonzero(misses(record, rows, radius)).flatten()
                if not len(left):
                    return

        return bisect_radius(attempt, model, images, labels, norm, rounds=self.rounds)

    def at_radius(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        radius: Tensor,
        norm: Norm,
        begin: Tensor | None = None,
    ) -> Tensor:
        """torchattacks' result for radii ``(B,)``; the first gradient is taken at ``begin`` ``(B, ...)`` if given."""
        view = ScaleFree(model, self.temperature) if self.temperature else model
        if begin is not None:
            view = FirstStepFrom(view, begin)
        anchored = Anchored(view, images.device, images.dtype)
        epsilon = per_row(radius, images)
        options = {"steps": self.steps, "alpha": 2.5 * epsilon / self.steps, "random_start": False}
        with quiet():
            if norm == "linf":
                attack = torchattacks.PGD(anchored, eps=epsilon, **options)
            else:
                # the default 1e-10 is added to the gradient of the batch's *mean* loss, which shrinks with the batch
                attack = torchattacks.PGDL2(anchored, eps=radius.to(images), eps_for_division=1e-30, **options)
            result: Tensor = attack(images, labels)
        return result
