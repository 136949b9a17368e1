"""Run an estimator and judge its points: clip, re-classify, retry with noise, refine, compute distances."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from attacks.arguments import check_choice, check_estimator, check_flag, plain_bounds, whole
from attacks.checks import (
    check_ability,
    check_images,
    check_model,
    check_module,
    check_points,
    clean_logits,
    plain_seeds,
)
from attacks.estimator import Estimator, Margins, Status
from attacks.geometry import boundary_fraction, on_segment, per_row, row_norm
from attacks.isolation import Classifier, WeightsError, frozen_view
from attacks.memory import affordable, chunk_size
from attacks.seeds import derive_seed, forked_generators, seed_generators
from attacks.trace import Trace
from attacks.types import DOMAINS, Bounds, Domain, EstimatorError, InputError, Norm

# A witness stands this part of its distance beyond the crossing that bisection found, which is as close again:
# nearer, rounding in another batch, another precision or on another device puts up to 1% of them back.
STEP_BACK = 5e-5


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How images are measured, the same for every estimator and norm of a run.

    Attributes:
        domain, bounds, noise_retries, batch_size, expect_over, binary: see `measure`.

    Raises:
        InputError: one of the wrong type or value.
    """

    domain: Domain = "box"
    bounds: Bounds = (0.0, 1.0)
    noise_retries: int = 6
    batch_size: int = 128
    expect_over: int = 1
    binary: bool = False

    def __post_init__(self) -> None:
        check_choice("domain", self.domain, DOMAINS)
        check_flag("binary", self.binary)
        plain = {
            "bounds": plain_bounds(self.bounds),
            "batch_size": whole("batch_size", self.batch_size, 1),
            "noise_retries": whole("noise_retries", self.noise_retries, 0),
            "expect_over": whole("expect_over", self.expect_over, 1),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def measure(
    model: nn.Module,
    images: Tensor,
    estimator: Estimator,
    norm: Norm,
    *,
    domain: Domain = "box",
    bounds: Bounds = (0.0, 1.0),
    noise_retries: int = 6,
    batch_size: int = 128,
    seeds: Sequence[int] | Tensor | None = None,
    start: Tensor | None = None,
    trace: Trace | None = None,
    on_progress: Callable[[int], None] | None = None,
    expect_over: int = 1,
    binary: bool = False,
    checked: bool = False,
) -> Margins:
    """Measure each image's distance to the decision boundary of its *predicted* class, from above.

    Mickisch et al. 2020, eq. 1 and section 3 (noise retries). Departs from the paper: distances are
    of the witness after bisection on the segment from the image (``attack_distance`` keeps the raw one).

    Args:
        model: pixels ``(B, C, H, W)`` in ``bounds`` -> logits ``(B, K)``, K >= 2. Left untouched: parameters,
            gradients, buffers, flags, device and all random generators. Wrappers (compiled, DataParallel,
            DistributedDataParallel, AveragedModel) are left out. A model that carries a ``forward`` or other function
            of its own as an attribute is frozen in place: no other thread may use it meanwhile, except to measure it.
        images: ``(N, C, H, W)`` float in ``bounds``, of the model's dtype and on its device.
        estimator: see `attacks.create`.
        norm: ``l2`` or ``linf``.
        domain: ``box`` keeps witnesses inside ``bounds``; ``free`` does not.
        noise_retries: how often a failed image is tried again from a noisy start (standard deviation
            ``0.01 * 2**i`` of the pixel range).
        batch_size: images a pass at most; fewer where one of them takes much memory (`attacks.memory`), halved where it
            runs out, which changes no margin but for rounding.
        seeds: ``(N,)`` the images' own seeds; by default their positions'.
        start: ``(N, C, H, W)`` points in ``bounds``, such as the witnesses of an earlier network, for estimators that
            can start from one; they need not be witnesses. A row that is not finite or is the image itself
            counts as no start.
        trace: an empty trace; it gets each image's nearest point, pass by pass.
        on_progress: called with the number of images done after every chunk.
        expect_over: of a model that draws at random, average the softmax over N draws and measure its logarithm.
            Every pass is a batch of N copies of one image, after the global generators are seeded from the clean
            image's pixels: the average is one fixed function per image, for every estimator, batch and order. It counts
            as N passes.
        binary: the model returns one logit ``z`` per image, ``(B,)`` or ``(B, 1)``, which is read as ``(0, z)``.
        checked: the caller has looked at the model with `attacks.checks.check_model`.

    Warns:
        ModelWarning: the model's margins say less than they seem to (see `attacks.checks`).

    Returns:
        One row per image. All rows are ``failed`` where the estimator wrote the weights, which are restored.

    Raises:
        InputError: images or a model that cannot be measured.
        EstimatorError: the estimator lacks the norm or domain, or broke its contract.
    """
    check_module(model)
    check_estimator(estimator)
    check_ability(estimator, norm, domain)
    options = MeasureOptions(
        domain=domain,
        bounds=bounds,
        noise_retries=noise_retries,
        batch_size=batch_size,
        expect_over=expect_over,
        binary=binary,
    )
    return measure_with(
        model,
        images,
        estimator,
        norm,
        options,
        seeds=seeds,
        start=start,
        trace=trace,
        on_progress=on_progress,
        checked=checked,
    )


def measure_with(
    model: nn.Module,
    images: Tensor,
    estimator: Estimator,
    norm: Norm,
    options: MeasureOptions,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    start: Tensor | None = None,
    trace: Trace | None = None,
    on_progress: Callable[[int], None] | None = None,
    checked: bool = False,
) -> Margins:
    """See `measure`, with the options that a whole run shares as one object."""
    check_module(model)
    check_estimator(estimator)
    check_ability(estimator, norm, options.domain)
    check_images(images, options.bounds)
    if seeds is None:
        seeds = [derive_seed("image", i) for i in range(len(images))]
    seeds = plain_seeds(seeds, len(images))
    if start is not None:
        check_points("start", start, images)
    parts, spoiled = [], ""
    with forked_generators(), frozen_view(model, options.bounds, options.domain, images.device) as view:
        # contiguous since torchattacks uses `view`
        pixels = images.detach().clone(memory_format=torch.contiguous_format)
        view.draws, view.binary = options.expect_over, options.binary
        view.batch_size, first = affordable(view, pixels, options.batch_size), 0
        for told in () if checked else check_model(view, pixels):
            warnings.warn(told, stacklevel=3)
        while first < len(images):
            # anew for every chunk: where memory ran out, the view's batches have become smaller
            chunk = slice(first, first + chunk_size(view, estimator))
            given = None if start is None else _usable(start[chunk], pixels[chunk])
            judge = _Judge(view, pixels[chunk], estimator, norm, seeds[chunk], given, trace)
            try:
                parts.append(judge.conclude() if spoiled else judge.run(options.noise_retries))
            except WeightsError as error:
                spoiled = str(error)
                parts.append(judge.conclude())
            first += len(parts[-1].status)
            if on_progress is not None:
                on_progress(len(parts[-1].status))
        found = join_margins(parts)
        return _failed(found, images, spoiled) if spoiled else found


class _Judge:
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
    ) -> None:
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
        clean = self.view.from_pixels(self.images)
        noisy = clean.clone()
        for row in pending.tolist():
            generator = torch.Generator().manual_seed(derive_seed("noise", int(self.seeds[row]), attempt))
            noise = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float64)
            noisy[row] += (0.01 * 2**attempt * noise).to(noisy)
        noisy = noisy.clamp(*self.view.bounds)
        self.retries[pending] += 1
        # a noisy point that already has another class is itself a witness
        self._accept(noisy[pending], pending)
        rest = pending[self.target[pending] < 0]
        seeds = torch.tensor([derive_seed("retry", int(s), attempt) for s in self.seeds], dtype=torch.int64)
        self._attack(noisy, rest, seeds, None)

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
        """Bisect from the image to the witness; ``(points, classes)``, as the attack left them where that fails."""
        images, witness = self.images[rows], self.witness[rows]
        if not len(rows):
            return witness, self.target[rows]

        def is_outside(points: Tensor, active: Tensor) -> Tensor:
            return self._new_class(self._into_domain(points), rows[active]) >= 0

        fraction = boundary_fraction(is_outside, images, witness, tolerance=STEP_BACK)
        points, target = witness.clone(), self.target[rows]
        longest = row_norm(witness - images, self.norm)
        settled = torch.zeros_like(rows, dtype=torch.bool)
        for farther in (STEP_BACK, 1e-4, 1e-3, 1e-2, 1e-1):
            trial = self._into_domain(on_segment(images, witness, (fraction * (1.0 + farther)).clamp_max(1.0)))
            trial = torch.where(per_row(settled, trial).bool(), points, trial)
            reached, length = self._new_class(trial, rows), row_norm(trial - images, self.norm)
            better = ~settled & (reached >= 0) & (length > 0) & (length <= longest)
            points[better], target[better] = trial[better], reached[better]
            settled |= better
            if settled.all():
                break
        return points, target

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


def _usable(start: Tensor, images: Tensor) -> Tensor:
    """The starts, and the image itself where there is none: a point that upsets no estimator."""
    points = start.detach().to(images)
    finite = per_row(points.flatten(1).isfinite().all(1), images).bool()
    return torch.where(finite, points, images).contiguous()


def _failed(margins: Margins, images: Tensor, message: str) -> Margins:
    """The margins of an estimator of whose rows none can be trusted."""
    nowhere = torch.full_like(margins.distance, torch.inf)
    return replace(
        margins,
        distance=nowhere,
        attack_distance=nowhere.clone(),
        witness=images.detach().cpu().clone(),
        status=(Status.FAILED,) * len(images),
        target=torch.full_like(margins.target, -1),
        message=(message,) * len(images),
    )


def join_margins(parts: Sequence[Margins]) -> Margins:
    """The margins of all parts' images, in their order; there is at least one part."""
    columns: dict[str, object] = {}
    for field in fields(Margins):
        values = [getattr(part, field.name) for part in parts]
        tensors = isinstance(values[0], Tensor)
        columns[field.name] = torch.cat(values) if tensors else tuple(item for value in values for item in value)
    return Margins(**columns)  # type: ignore[arg-type]
