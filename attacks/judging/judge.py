"""Run an estimator on one chunk of images and verify its points: clip, re-classify, retry, refine, measure."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from attacks.checks import clean_logits
from attacks.estimator import Estimator, Margins, Status
from attacks.geometry import per_row, row_norm
from attacks.isolation import Classifier
from attacks.judging.noise import noisy_starts, retry_seeds
from attacks.judging.refine import refined
from attacks.memory import chunk_size
from attacks.pool import Pool, with_pool
from attacks.seeds import derive_seed, seed_generators
from attacks.trace import Trace
from attacks.types import EstimatorError, InputError, Norm


class Judge:
    """One chunk of images on its way from clean prediction to verified distances."""

    def __init__(
        self,
        view: Classifier,
        images: Tensor,
        estimator: Estimator,
        norm: Norm,
        seeds: Tensor,
        start: Tensor | None,
        trace: Trace | None,
        pool: Pool | None,
    ) -> None:
        self.pool = with_pool(estimator, pool)
        self.view, self.estimator, self.norm, self.seeds, self.start = view, estimator, norm, seeds, start
        self.images = images
        view.start_chunk(len(images))
        if view.draws > 1:
            view.draw_seed = derive_seed("draws", _digest(images))
        logits = clean_logits(view, images)
        top = logits.topk(2, dim=1)
        self.labels = logits.argmax(1)
        if trace is not None:
            trace.start_chunk(images, self.labels, norm, view.pixel_bounds if view.domain == "box" else view.bounds)
            view.trace = trace
        self.confidence = logits.softmax(1).amax(1)
        self.logit_margin = top.values[:, 0] - top.values[:, 1]
        self.tied = self.logit_margin == 0
        self.witness = images.clone()
        self.target = torch.full_like(self.labels, -1)
        self.retries = torch.zeros_like(self.labels)
        self.message = [""] * len(images)

    def run(self, noise_retries: int) -> Margins:
        """Attack, retry from noisy starts where nothing was found, refine; the chunk's margins."""
        pending = torch.nonzero(~self.tied).flatten()
        start = None if self.start is None else self.view.from_pixels(self.start)
        self._attack(self.view.from_pixels(self.images), pending, self.seeds, start)
        for attempt in range(noise_retries):
            pending = torch.nonzero(~self.tied & (self.target < 0) & self._unbroken()).flatten()
            if not len(pending):
                break
            self._retry(pending, attempt)
        return self.conclude()

    def _retry(self, pending: Tensor, attempt: int) -> None:
        """Section 3 of the paper: perturb the image with Gaussian noise and attack from there."""
        noisy = noisy_starts(
            self.view.from_pixels(self.images), pending.tolist(), self.seeds, attempt, self.view.bounds
        )
        self.retries[pending] += 1
        # what was found before is not kept
        self.view.basins[pending] = torch.nan
        # a noisy point that already has another class is itself a witness
        self._accept(noisy[pending], pending)
        rest = pending[self.target[pending] < 0]
        self._attack(noisy, rest, retry_seeds(self.seeds, attempt), None)

    def _attack(self, points: Tensor, rows: Tensor, seeds: Tensor, start: Tensor | None) -> None:
        """Run the estimator on these rows; where the library raises, halve until the raising rows stand alone.

        If memory runs out, continue with smaller batches.
        """
        if not len(rows):
            return
        if len(rows) > (most := chunk_size(self.view, self.estimator)):
            for part in torch.split(rows, most):
                self._attack(points, part, seeds, start)
            return
        chosen = seeds[rows.cpu()]
        seed_generators(derive_seed("chunk", *chosen.tolist()))
        try:
            with self.view.rows(rows), torch.enable_grad():
                candidates = self.estimator.perturb(
                    self.view,
                    points[rows].clone(),
                    self.labels[rows].clone(),
                    self.norm,
                    seeds=chosen.to(points.device),
                    start=None if start is None else start[rows].clone(),
                    **self.pool,
                )
        except (EstimatorError, InputError):
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.view.take_less(len(rows), error)
                self._attack(points, rows, seeds, start)
                return
            if len(rows) == 1:
                self.message[int(rows)] = f"{type(error).__name__}: {error}"
                return
            half = len(rows) // 2
            self._attack(points, rows[:half], seeds, start)
            self._attack(points, rows[half:], seeds, start)
            return
        finally:
            self.view.settle()
        if not isinstance(candidates, Tensor) or candidates.shape != points[rows].shape:
            got = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
            raise EstimatorError(
                f"expected witnesses of shape {tuple(points[rows].shape)} from {self.estimator.name}, got {got}; "
                "return one point per image"
            )
        if candidates.layout is not torch.strided or candidates.is_meta:
            kind = "a meta tensor" if candidates.is_meta else f"layout {candidates.layout}"
            for row in rows.tolist():
                self.message[row] = f"expected witnesses as a dense tensor, got {kind}"
            return
        self._accept(candidates.detach(), rows)

    def _accept(self, candidates: Tensor, rows: Tensor) -> None:
        """Clip candidates (in ``[0, 1]`` units) into the domain and keep those of another class."""
        images = self.images[rows]
        points = self._into_domain(self.view.to_pixels(candidates.to(images)))
        points = torch.where(per_row(points.flatten(1).isfinite().all(1), points).bool(), points, images)
        target = self._new_class(points, rows)
        found = (target >= 0) & (row_norm(points - images, self.norm) > 0)
        self.witness[rows[found]] = points[found]
        self.target[rows[found]] = target[found]

    def _into_domain(self, pixels: Tensor) -> Tensor:
        return pixels.clamp(*self.view.pixel_bounds) if self.view.domain == "box" else pixels

    def _new_class(self, points: Tensor, rows: Tensor) -> Tensor:
        """The class of each point in a fresh pass; -1 where it is the image's own or not finite."""
        with self.view.rows(rows):
            logits = self.view.classify(points)
        target = logits.argmax(1)
        kept = (target == self.labels[rows]) | ~logits.isfinite().all(1)
        return torch.where(kept, -1, target)

    def _refine(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `refined`."""
        images, witness, target = self.images[rows], self.witness[rows], self.target[rows]
        if not len(rows):
            return witness, target

        def new_class(points: Tensor, active: Tensor) -> Tensor:
            return self._new_class(points, rows[active])

        return refined(images, witness, target, self.norm, new_class, self._into_domain)

    def conclude(self) -> Margins:
        """Refine what was found; the chunk's margins."""
        found = self.target >= 0
        rows = torch.nonzero(found).flatten()
        nowhere = torch.where(self.tied, 0.0, torch.inf).double()
        attack_distance = torch.where(found, row_norm(self.witness - self.images, self.norm), nowhere)
        self.witness[rows], self.target[rows] = self._refine(rows)
        return Margins(
            distance=torch.where(found, row_norm(self.witness - self.images, self.norm), nowhere).cpu(),
            attack_distance=attack_distance.cpu(),
            witness=self.witness.cpu(),
            status=tuple(self._status(row) for row in range(len(self.images))),
            target=self.target.cpu(),
            message=tuple(self.view.notes[row] if hit else self.message[row] for row, hit in enumerate(found.tolist())),
            prediction=self.labels.cpu(),
            confidence=self.confidence.cpu(),
            logit_margin=self.logit_margin.cpu(),
            basins=torch.where(found, self.view.basins, torch.nan).cpu(),
            noise_retries=self.retries.cpu(),
            forwards=self.view.forwards.cpu(),
            backwards=self.view.backwards.cpu(),
        )

    def _status(self, row: int) -> Status:
        if self.tied[row]:
            return Status.TIED
        if self.target[row] >= 0:
            return Status.FOUND_AFTER_NOISE if self.retries[row] else Status.FOUND
        return Status.FAILED if self.message[row] else Status.NOT_FOUND

    def _unbroken(self) -> Tensor:
        return torch.tensor([not text for text in self.message], device=self.tied.device)


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
