"""DeepFool in batches that never wait: one forward a step, finished images leave, waiting ones take their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.estimator import DOMAINS, NORMS, Domain, EstimatorError, Norm, Settings, setting
from attacks.geometry import per_row
from attacks.isolation import Classifier
from attacks.via_foolbox import stock_deepfool

ENGINES = ("batched", "foolbox")
# Foolbox's own numbers: added to every step's length, and to every norm that is divided by
STEP_EXTRA, NORM_FLOOR = 1e-4, 1e-8


@dataclass(frozen=True, kw_only=True)
class DeepFool(Settings):
    """DeepFool (Moosavi-Dezfooli et al. 2016, Algorithm 2) with the step geometry of Foolbox 3.3.4.

    Departs from the paper as Foolbox does: ``candidates`` classes only, logits instead of softmax, and each step is
    lengthened by 1e-4 and ``overshoot``. The walk starts from the predicted class, which is the label that `measure`
    passes.

    ``engine=batched`` computes what ``engine=foolbox`` (the library's own loops) computes, with one forward a step
    instead of one a class, no gradients for images that are across, and batches that are filled up from the waiting
    images, so that no image waits for a slower one. Its margins are the library's but for rounding.
    """

    name: ClassVar[str] = "deepfool"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True
    refills: ClassVar[bool] = True

    steps: int = setting(50, least=1)
    candidates: int = setting(10, least=2)
    overshoot: float = setting(0.02, least=0)
    engine: str = setting("batched")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ENGINES:
            raise EstimatorError(f"expected engine of {', '.join(ENGINES)}, got {self.engine!r}; choose one")

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
        if self.engine == "foolbox":
            return stock_deepfool(
                model, images, labels, norm, steps=self.steps, candidates=self.candidates, overshoot=self.overshoot
            )
        walk = _Walk(self, model, images, norm)
        waiting = torch.arange(len(images), device=images.device)
        batch = waiting[:0]
        while len(batch) or len(waiting):
            batch = walk.unfinished(batch, labels)
            free = max(model.batch_size - len(batch), 0)
            batch, waiting = torch.cat([batch, waiting[:free]]), waiting[free:]
            batch = walk.step(batch)
        return walk.points


class _Walk:
    """Where each image is, how it came there, and the classes that it looks at."""

    def __init__(self, settings: DeepFool, model: Classifier, images: Tensor, norm: Norm) -> None:
        self.settings, self.model, self.images, self.norm = settings, model, images, norm
        self.points, self.total = images.clone(), torch.zeros_like(images)
        self.steps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        count = min(settings.candidates, model.classes)
        self.classes = torch.zeros(len(images), count, dtype=torch.int64, device=images.device)

    @torch.no_grad()
    def unfinished(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Those of these rows ``(A,)`` that have steps left and are not across."""
        rows = rows[self.steps[rows] < self.settings.steps]
        if not len(rows):
            return rows
        with self.model.rows(rows):
            logits = self.model(self.points[rows])
        return rows[logits.argmax(1) == labels[rows]]

    def step(self, rows: Tensor) -> Tensor:
        """Step to the nearest linearised boundary; returns the rows that moved."""
        if not len(rows):
            return rows
        leaf = self.points[rows].requires_grad_()
        with self.model.rows(rows):
            logits = self.model(leaf)
            new = self.steps[rows] == 0
            if new.any():
                self.classes[rows[new]] = logits.detach()[new].argsort(1).flip(1)[:, : self.classes.shape[1]]
            length, gradient = self._nearest(leaf, logits, self.classes[rows])
        move = per_row(length, leaf) * (gradient.sign() if self.norm == "linf" else gradient)
        self.total[rows] += move
        ahead = self.images[rows] + (1.0 + self.settings.overshoot) * self.total[rows]
        self.points[rows] = ahead.clamp(*self.model.bounds)
        self.steps[rows] += 1
        # a dead gradient leads nowhere, however often it is followed
        return rows[move.flatten(1).any(1)]

    def _nearest(self, leaf: Tensor, logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The step's length in units of the gradient, or of its sign, and the gradient, to the nearest boundary."""
        first = logits.gather(1, classes[:, :1])
        gaps = logits.gather(1, classes[:, 1:]) - first
        best = torch.full_like(gaps[:, 0], torch.inf)
        nearest, size = torch.zeros_like(leaf), torch.ones_like(best)
        for k, gap in enumerate(gaps.unbind(1), 1):
            (gradient,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=k < gaps.shape[1])
            flat = gradient.flatten(1)
            norm = (flat.abs().sum(1) if self.norm == "linf" else flat.norm(dim=1)) + NORM_FLOOR
            distance = gap.detach().abs() / norm
            closer = distance < best
            best, size = torch.where(closer, distance, best), torch.where(closer, norm, size)
            nearest = torch.where(per_row(closer, leaf).bool(), gradient, nearest)
        return (best + STEP_EXTRA) / (1.0 if self.norm == "linf" else size), nearest
