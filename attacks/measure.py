"""Measure images chunk by chunk on a frozen view of the model; `attacks.judging` verifies the points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from attacks.arguments import check_choice, check_estimator, check_flag, plain_bounds, whole
from attacks.checks import check_ability, check_images, check_model, check_module, check_points, check_pool, plain_seeds
from attacks.estimator import Estimator, Margins, Status
from attacks.geometry import per_row
from attacks.isolation import WeightsError, frozen_view
from attacks.judging.judge import Judge
from attacks.memory import affordable, chunk_size
from attacks.pool import Pool, predicted, uses_pool
from attacks.seeds import derive_seed, forked_generators
from attacks.trace import Trace
from attacks.types import DOMAINS, NOISE_RETRIES, Bounds, Domain, Norm


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
    noise_retries: int = NOISE_RETRIES
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
    noise_retries: int = NOISE_RETRIES,
    batch_size: int = 128,
    seeds: Sequence[int] | Tensor | None = None,
    start: Tensor | None = None,
    pool: Tensor | None = None,
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
        pool: ``(P, C, H, W)`` images in ``bounds``, such as training images, for estimators that set out from images of
            other classes as well (``cascade``, ``best``). They are classified once, which no image's passes count.
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
        pool=pool,
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
    pool: Tensor | Pool | None = None,
    trace: Trace | None = None,
    on_progress: Callable[[int], None] | None = None,
    checked: bool = False,
) -> Margins:
    """See `measure`, with the options that a whole run shares as one object; for a pool, see `classified`."""
    check_module(model)
    check_estimator(estimator)
    check_ability(estimator, norm, options.domain)
    check_images(images, options.bounds)
    if seeds is None:
        seeds = [derive_seed("image", i) for i in range(len(images))]
    seeds = plain_seeds(seeds, len(images))
    if start is not None:
        check_points("start", start, images)
    if pool is not None:
        points, limits = (pool.points, (0.0, 1.0)) if isinstance(pool, Pool) else (pool, options.bounds)
        check_pool(points, images, limits)
    parts, spoiled = [], ""
    with forked_generators(), frozen_view(model, options.bounds, options.domain, images.device) as view:
        # contiguous since torchattacks uses `view`
        pixels = images.detach().clone(memory_format=torch.contiguous_format)
        view.draws, view.binary = options.expect_over, options.binary
        view.batch_size, first = affordable(view, pixels, options.batch_size), 0
        for told in () if checked else check_model(view, pixels):
            warnings.warn(told, stacklevel=3)
        if isinstance(pool, Tensor):
            pool = predicted(view, pool.to(images.device)) if uses_pool(estimator) else None
        while first < len(images):
            # anew for every chunk: where memory ran out, the view's batches have become smaller
            chunk = slice(first, first + chunk_size(view, estimator))
            given = None if start is None else _usable(start[chunk], pixels[chunk])
            judge = Judge(view, pixels[chunk], estimator, norm, seeds[chunk], given, trace, pool)
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


def classified(model: nn.Module, images: Tensor, options: MeasureOptions) -> Pool:
    """A pool of these images ``(P, C, H, W)`` on the model's device, for several calls of `measure_with`."""
    with forked_generators(), frozen_view(model, options.bounds, options.domain, images.device) as view:
        view.draws, view.binary = options.expect_over, options.binary
        view.batch_size = affordable(view, images, options.batch_size) if len(images) else options.batch_size
        return predicted(view, images)


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
        basins=torch.full_like(margins.basins, torch.nan),
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
