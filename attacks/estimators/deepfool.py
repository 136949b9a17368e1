"""DeepFool with refilled batches: one forward per step, few gradients, and finished images leave the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.adapters.foolbox import library, run
from attacks.estimator import Settings, setting
from attacks.geometry import per_row
from attacks.isolation import Classifier
from attacks.types import BOTH_DOMAINS, BOTH_NORMS, Domain, EstimatorError, Norm

ENGINES = ("batched", "foolbox")
# Foolbox's constants, added to every step length and to every norm in a denominator
STEP_EXTRA, NORM_FLOOR = 1e-4, 1e-8


@dataclass(frozen=True, kw_only=True)
class DeepFool(Settings):
    """DeepFool (Moosavi-Dezfooli et al. 2016, Algorithm 2) with the step geometry of Foolbox 3.3.4.

    Departs from the paper as Foolbox does: only ``candidates`` classes, logits instead of softmax, and each step is
    lengthened by 1e-4 and ``overshoot``. The walk starts from the predicted class, which is the label that `measure`
    passes.

    ``engine=batched`` computes the same as ``engine=foolbox`` (the library's own loops) with one forward per step
    instead of one per class, with batches that slow images do not hold up, and with few gradients. The first step
    computes the gradients of all classes. A later step computes that of the class that is likely nearest, and those of
    the classes whose boundary would be nearer still if their gradient were ``growth`` times as large as the image's
    largest recorded one. A gradient that grows by more is missed; otherwise the margins equal the library's up to
    rounding. ``growth=1e9`` computes all gradients.
    """

    name: ClassVar[str] = "deepfool"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True
    refills: ClassVar[bool] = True

    steps: int = setting(50, least=1)
    candidates: int = setting(10, least=2)
    overshoot: float = setting(0.02, least=0)
    # With 1, no image of the networks examined (dense, cnn, resnet18; standard and PGD training) took another step than
    # with 1e9. 4 costs two or three more gradients per image: 12 to 17 in all, against 24 to 67 with 1e9.
    growth: float = setting(4.0, least=1)
    engine: str = setting("batched")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ENGINES:
            raise EstimatorError(f"expected engine of {', '.join(ENGINES)}, got {self.engine!r}; choose one of them")

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
        walk = _Walk(self, model, images, labels, norm)
        all_rows = torch.arange(len(images), device=images.device)
        queue = torch.cat([walk.set_out(rows) for rows in torch.split(all_rows, model.batch_size)])
        while len(queue):
            # unfinished rows go to the end of the queue, so that batches are full until few rows are left
            batch, queue = queue[: model.batch_size], queue[model.batch_size :]
            queue = torch.cat([queue, walk.step(batch)])
        return walk.points


class _Walk:
    """The state of all walks: current points, steps so far, and the candidate classes.

    Attributes:
        points: ``(N, ...)`` current points. total: ``(N, ...)`` sum of all moves, without overshoot.
        classes: ``(N, C)`` int64, the predicted class and then the others, by logit.
        sizes: ``(N, C - 1)``, per other class the dual norm of the logit gap's gradient when last computed.
    """

    def __init__(self, settings: DeepFool, model: Classifier, images: Tensor, labels: Tensor, norm: Norm) -> None:
        self.settings, self.model, self.images, self.labels, self.norm = settings, model, images, labels, norm
        self.points, self.total = images.clone(), torch.zeros_like(images)
        self.steps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        count = min(settings.candidates, model.classes)
        self.classes = torch.zeros(len(images), count, dtype=torch.int64, device=images.device)
        self.sizes = images.new_zeros(len(images), count - 1)

    def set_out(self, rows: Tensor) -> Tensor:
        """Take the first step, with the gradients of all classes; returns the rows that have not finished."""
        leaf = self.points[rows].requires_grad_()
        with self.model.rows(rows):
            logits = self.model(leaf)
            self.classes[rows] = logits.detach().argsort(1).flip(1)[:, : self.classes.shape[1]]
            gaps = self._gaps(logits, rows)
            best, gradient = torch.full_like(gaps[:, 0], torch.inf), torch.zeros_like(leaf)
            for k, gap in enumerate(gaps.unbind(1)):
                (other,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=k + 1 < gaps.shape[1])
                size = self._size(other)
                self.sizes[rows, k] = size
                distance = gap.detach().abs() / size
                closer = distance < best
                best = torch.where(closer, distance, best)
                gradient = torch.where(per_row(closer, leaf).bool(), other, gradient)
        return self._move(rows, logits, best, gradient)

    def step(self, rows: Tensor) -> Tensor:
        """Take a later step, with the gradients of the likely nearest class and of those that may be nearer."""
        sizes = self.sizes[rows]
        leaf = self.points[rows].requires_grad_()
        with self.model.rows(rows):
            logits = self.model(leaf)
            gaps = self._gaps(logits, rows)
            lengths = gaps.detach().abs()
            likely = (lengths / sizes).argmin(1)
            (gradient,) = torch.autograd.grad(gaps.gather(1, likely[:, None]).sum(), leaf)
        distances = torch.full_like(lengths, torch.inf)
        every = torch.arange(len(rows), device=rows.device)
        distances[every, likely] = self._distance(rows, likely, lengths[every, likely], gradient)
        least = lengths / (self.settings.growth * sizes.amax(1, keepdim=True))
        doubtful = (least < distances.amin(1, keepdim=True)) & self._inside(logits, rows)[:, None]
        place, other = torch.nonzero(doubtful.scatter(1, likely[:, None], False)).unbind(1)
        for begin in range(0, len(place), self.model.batch_size):
            at, k = (part[begin : begin + self.model.batch_size] for part in (place, other))
            gradients = self._gradient(rows[at], k)
            distances[at, k] = self._distance(rows[at], k, lengths[at, k], gradients)
            nearest = distances.argmin(1)[at] == k
            gradient[at[nearest]] = gradients[nearest]
        return self._move(rows, logits, distances.amin(1), gradient)

    def _gaps(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits of the other classes minus that of the predicted class, ``(A, C - 1)``."""
        ranked = logits.gather(1, self.classes[rows])
        return ranked[:, 1:] - ranked[:, :1]

    def _inside(self, logits: Tensor, rows: Tensor) -> Tensor:
        return logits.argmax(1) == self.labels[rows]

    def _gradient(self, rows: Tensor, which: Tensor) -> Tensor:
        """Gradient of one logit gap per entry of ``rows``, which may repeat."""
        leaf = self.points[rows].requires_grad_()
        with self.model.rows(rows):
            gaps = self._gaps(self.model(leaf), rows)
            (gradient,) = torch.autograd.grad(gaps.gather(1, which[:, None]).sum(), leaf)
        return gradient

    def _distance(self, rows: Tensor, which: Tensor, lengths: Tensor, gradient: Tensor) -> Tensor:
        """Distances to the linearised boundary of one other class per row; records the gradients' sizes."""
        size = self._size(gradient)
        self.sizes[rows, which] = size
        return lengths / size

    def _size(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        return (flat.abs().sum(1) if self.norm == "linf" else flat.norm(dim=1)) + NORM_FLOOR

    def _move(self, rows: Tensor, logits: Tensor, best: Tensor, gradient: Tensor) -> Tensor:
        """Step by the distance ``best`` along the gradient, or its sign; returns the rows that have not finished.

        Rows whose class has changed do not move.
        """
        length = best + STEP_EXTRA
        if self.norm == "linf":
            move = per_row(length, gradient) * gradient.sign()
        else:
            move = per_row(length / self._size(gradient), gradient) * gradient
        # rows with a zero gradient are finished: they would not move in later steps either
        going = self._inside(logits, rows) & move.flatten(1).any(1)
        rows, move = rows[going], move[going]
        self.total[rows] += move
        ahead = self.images[rows] + (1.0 + self.settings.overshoot) * self.total[rows]
        self.points[rows] = ahead.clamp(*self.model.bounds)
        self.steps[rows] += 1
        return rows[self.steps[rows] < self.settings.steps]


def stock_deepfool(
    model: Classifier, images: Tensor, labels: Tensor, norm: Norm, *, steps: int, candidates: int, overshoot: float
) -> Tensor:
    """Foolbox's L2DeepFoolAttack or LinfDeepFoolAttack, unchanged."""
    cls = library.L2DeepFoolAttack if norm == "l2" else library.LinfDeepFoolAttack
    return run(cls(steps=steps, candidates=candidates, overshoot=overshoot), model, images, labels)
