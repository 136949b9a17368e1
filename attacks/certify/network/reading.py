"""Checks of a network as it was read against the model itself, and estimates of the model's rounding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from attacks.certify.network.blocks import Block
from attacks.certify.network.intervals import Intervals
from attacks.certify.network.nonlinearities import Nonlinearity
from attacks.isolation import Classifier, frozen_view
from attacks.seeds import forked_generators
from attacks.types import InputError, UnsoundError

# numbers of random points in a box around all pixels and far outside, and the scale of the latter
INSIDE, OUTSIDE, FAR = 8, 4, 10.0
# random functionals of each block's result that are compared
FUNCTIONALS = 3
# largest relative difference between two orders of summation in float64, as a fraction of the sum of absolute values
SUMS = 1e-10
# factor by which a difference may exceed the estimate of rounding before the functions count as different
WRONG = 64


class Reading(Protocol):
    """A model as it was read; see `PiecewiseNetwork`."""

    shape: tuple[int, ...]
    device: torch.device
    blocks: list[Block]
    nonlinearities: list[Nonlinearity]
    places: list[str]

    def logits(self, images: Tensor) -> Tensor: ...

    def run(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...

    def sizes(self, images: Tensor) -> Tensor: ...


def rounding(network: Reading, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Estimate ``(B,)`` of the rounding error of a logit in ``dtype``, for images ``(B, C, H, W)``.

    Every block contributes the unit roundoff (half of epsilon) of the largest sum of absolute values that it computes,
    relative to its largest result; the last block contributes it in absolute terms.
    """
    inputs, _ = network.run(pixels)
    sizes = network.sizes(pixels)
    relative = torch.ones_like(sizes[:, 0])
    for values, size in zip(inputs, sizes.unbind(1), strict=False):
        relative = relative + size / values.abs().amax(1).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.finfo(dtype).eps / 2 * relative * sizes[:, -1]


def check_reading(network: Reading) -> None:
    """Compare the network as read with the model, in float64, at random points inside a box and far outside.

    Raises:
        InputError: the model computes another function.
        UnsoundError: a block differs from the recorded operations that it was made of.
    """
    draw = torch.Generator().manual_seed(1)
    box = 3 * torch.rand(INSIDE, *network.shape, generator=draw, dtype=torch.float64) - 1
    far = FAR * torch.randn(OUTSIDE, *network.shape, generator=draw, dtype=torch.float64)
    points = torch.cat([box, far]).to(network.device)
    _check_blocks(network, points)
    logits, read = network.logits(points), network.run(points)[1]
    if logits.shape != read.shape:
        raise _another_function(f"logits of shape {tuple(logits.shape)} where {tuple(read.shape)} were read")
    # a model may cast its logits
    allowed = WRONG * rounding(network, points, logits.dtype)
    # comparisons with NaN are false
    if not ((logits - read).abs().amax(1) <= allowed).all():
        raise _another_function(f"logits that differ by {float((logits - read).abs().max()):.3g} from what was read")


def _another_function(difference: str) -> InputError:
    return InputError(
        "expected a network that treats every image on its own, deterministically and with the same operations for "
        f"all images, got {difference}; leave out what mixes images, draws at random, counts or branches"
    )


def _check_blocks(network: Reading, points: Tensor) -> None:
    """Check the transpose and constant of every block against the recorded operations' inputs of nonlinearities."""
    inputs, logits = network.run(points)
    outcomes = [points.flatten(1)]
    for nonlinearity, block, values in zip(network.nonlinearities, network.blocks, inputs, strict=False):
        shaped = Intervals(values, values).shaped(block.shape)
        outcomes.append(nonlinearity.intervals(shaped).flat()[0])
    draw = torch.Generator().manual_seed(2)
    for block, values, place in zip(network.blocks, (*inputs, logits), network.places, strict=True):
        rows = torch.randn(FUNCTIONALS, values.shape[1], generator=draw, dtype=torch.float64).to(values)
        expected = values @ rows.T
        actual, sizes = rows @ block.constant, rows.abs() @ block.constant.abs() + expected.abs()
        for source, part in block.transposed(rows).items():
            actual = actual + outcomes[source] @ part.T
            sizes = sizes + outcomes[source].abs() @ part.abs().T
        if not ((actual - expected).abs() <= SUMS * sizes).all():
            raise UnsoundError(
                f"expected the affine function before {place} to be what the model computes there, got values that "
                f"differ by {float((actual - expected).abs().max()):.3g}; no bound of this network can be trusted: "
                "report this with the model"
            )


def _computed(view: Classifier, points: Tensor, dtypes: list[torch.dtype]) -> tuple[Tensor, Tensor]:
    """The points rounded to the first of ``dtypes`` that the model accepts, and its logits there; both as float64."""
    for dtype in dtypes:
        # the comparison is made at the rounded points, which the model is given
        rounded = points.to(dtype)
        try:
            return rounded.double(), view.classify(rounded).double()
        except RuntimeError:
            if dtype is dtypes[-1]:
                raise
    raise AssertionError("images have a dtype")


def rounding_of(network: Reading, model: nn.Module, pixels: Tensor, radii: Tensor, dtype: torch.dtype) -> Tensor:
    """How much rounding in the model's own dtype may change the lead of another class: ``(B,)``.

    The model itself, with its own weights and precision, is compared with the network as read: at the images, at
    points around them and far outside.

    Args:
        model: the caller's; left untouched.
        pixels: ``(B, C, H, W)`` float64.
        radii: ``(B,)`` distances of the points around the images.
        dtype: dtype of the caller's images.

    Raises:
        InputError: a model in half precision, or one that computes another function than its copy in float64.
    """
    tensors = (*model.parameters(), *model.buffers())
    dtypes = list(dict.fromkeys([dtype, *(tensor.dtype for tensor in tensors if tensor.is_floating_point())]))
    dtype = max(dtypes, key=lambda candidate: torch.finfo(candidate).eps)
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        raise InputError(
            f"expected a model in float32 or float64 to prove bounds of, got {str(dtype).removeprefix('torch.')}, "
            "whose rounding moves the boundary; certify a float32 copy"
        )
    draw = torch.Generator().manual_seed(4)
    # the same direction for every image, whatever its batch
    move = (2 * torch.rand(network.shape, generator=draw, dtype=torch.float64) - 1).to(pixels)
    around = pixels + radii.view(-1, 1, 1, 1) * move / move.norm().clamp_min(1.0)
    far = FAR * torch.randn(OUTSIDE, *network.shape, generator=draw, dtype=torch.float64).to(pixels)
    points = torch.cat([pixels, around, far])
    with forked_generators(), frozen_view(model, (0.0, 1.0), "free", pixels.device) as view:
        points, logits = _computed(view, points, dtypes)
    read, estimate = network.run(points)[1], rounding(network, points, dtype)
    error = (logits - read).abs().amax(1)
    if not (error <= WRONG * estimate).all():
        raise InputError(
            "expected a model that computes the same in its own precision as a copy in float64, got logits that differ "
            f"by {float(error.max()):.3g}; leave out what depends on the precision, mixes images or draws at random"
        )
    count = len(pixels)
    seen = torch.maximum(error[:count], error[count : 2 * count])
    # two logits round, and at other points rounding may be twice what was seen
    return 2 * torch.maximum(estimate[:count], 2 * seen)
