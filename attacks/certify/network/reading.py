"""Hold the reading of a network against the network itself, before and while anything is proved of it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from attacks.certify.network.blocks import Block
from attacks.certify.network.intervals import Intervals
from attacks.certify.network.nonlinearities import Kink
from attacks.isolation import Classifier, frozen_view
from attacks.seeds import forked_generators
from attacks.types import InputError, UnsoundError

# of random points: in a box around all pixels, and far outside of it
INSIDE, OUTSIDE, FAR = 8, 4, 10.0
# functionals of each block's result that are compared
FUNCTIONALS = 3
# of float64 sums, the part of the sum of sizes by which two orders of summation may differ
SUMS = 1e-10
# how many times its estimate rounding may be, before the difference is one of functions
WRONG = 64


class Reading(Protocol):
    """What was read of a model: see `PiecewiseNetwork`."""

    shape: tuple[int, ...]
    device: torch.device
    blocks: list[Block]
    kinks: list[Kink]
    places: list[str]

    def logits(self, images: Tensor) -> Tensor: ...

    def run(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]: ...

    def sizes(self, images: Tensor) -> Tensor: ...


def rounding(network: Reading, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """An estimate ``(B,)`` of what rounding in ``dtype`` adds to a logit of each image ``(B, C, H, W)``.

    Every block adds the unit roundoff (half of epsilon) of the largest sum of absolute values that it computes,
    relative to the largest number that comes of it. The last block adds it as it is.
    """
    inputs, _ = network.run(pixels)
    sizes = network.sizes(pixels)
    relative = torch.ones_like(sizes[:, 0])
    for values, size in zip(inputs, sizes.unbind(1), strict=False):
        relative = relative + size / values.abs().amax(1).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.finfo(dtype).eps / 2 * relative * sizes[:, -1]


def check_reading(network: Reading) -> None:
    """Compare what was read with the model, in float64, at random points inside of a box and far outside.

    Raises:
        InputError: the model computes something else.
        UnsoundError: a block is not what the operations compute that it was made of.
    """
    draw = torch.Generator().manual_seed(1)
    box = 3 * torch.rand(INSIDE, *network.shape, generator=draw, dtype=torch.float64) - 1
    far = FAR * torch.randn(OUTSIDE, *network.shape, generator=draw, dtype=torch.float64)
    points = torch.cat([box, far]).to(network.device)
    _check_blocks(network, points)
    said, read = network.logits(points), network.run(points)[1]
    if said.shape != read.shape:
        raise _another(f"logits of shape {tuple(said.shape)} where {tuple(read.shape)} were read")
    # a model may cast its logits
    allowed = WRONG * rounding(network, points, said.dtype)
    # comparisons with NaN are false
    if not ((said - read).abs().amax(1) <= allowed).all():
        raise _another(f"logits that differ by {float((said - read).abs().max()):.3g} from what was read")


def _another(what: str) -> InputError:
    return InputError(
        "expected a network that computes every image by itself, the same every time and by operations that its "
        f"values do not choose, got {what}; leave out what mixes images, draws at random, counts or branches"
    )


def _check_blocks(network: Reading, points: Tensor) -> None:
    """Every block's transpose and constant, against the inputs that the recorded operations give the next kink."""
    inputs, logits = network.run(points)
    outcomes = [points.flatten(1)]
    for kink, block, values in zip(network.kinks, network.blocks, inputs, strict=False):
        shaped = Intervals(values, values).shaped(block.shape)
        outcomes.append(kink.intervals(shaped).flat()[0])
    draw = torch.Generator().manual_seed(2)
    for block, values, place in zip(network.blocks, (*inputs, logits), network.places, strict=True):
        rows = torch.randn(FUNCTIONALS, values.shape[1], generator=draw, dtype=torch.float64).to(values)
        expected = values @ rows.T
        found, sizes = rows @ block.constant, rows.abs() @ block.constant.abs() + expected.abs()
        for source, part in block.transposed(rows).items():
            found = found + outcomes[source] @ part.T
            sizes = sizes + outcomes[source].abs() @ part.abs().T
        if not ((found - expected).abs() <= SUMS * sizes).all():
            raise UnsoundError(
                f"expected the affine function before {place} to be what the model computes there, got values that "
                f"differ by {float((found - expected).abs().max()):.3g}; no bound of this network can be trusted: "
                "report it with the model"
            )


def _computed(view: Classifier, points: Tensor, dtypes: list[torch.dtype]) -> tuple[Tensor, Tensor]:
    """The points in the first of ``dtypes`` that the model takes, and its logits of them, both then float64."""
    for dtype in dtypes:
        # what the model is given is what it is compared at
        rounded = points.to(dtype)
        try:
            return rounded.double(), view.classify(rounded).double()
        except RuntimeError:
            if dtype is dtypes[-1]:
                raise
    raise AssertionError("images have a dtype")


def rounding_of(network: Reading, model: nn.Module, pixels: Tensor, radii: Tensor, dtype: torch.dtype) -> Tensor:
    """How much nearer rounding in the model's own dtype may bring another class's logit, ``(B,)``.

    The model itself, with its own weights and precision, is compared with what was read: at the images, at points
    around them and far outside.

    Args:
        model: the caller's; left untouched. pixels: ``(B, C, H, W)`` float64. radii: ``(B,)`` of the points around.
        dtype: of the images that the caller gives it.

    Raises:
        InputError: a model in half precision, or one that computes something else than its copy in float64.
    """
    tensors = (*model.parameters(), *model.buffers())
    dtypes = list(dict.fromkeys([dtype, *(one.dtype for one in tensors if one.is_floating_point())]))
    dtype = max(dtypes, key=lambda one: torch.finfo(one).eps)
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        raise InputError(
            f"expected a model in float32 or float64 to prove bounds of, got {str(dtype).removeprefix('torch.')}, "
            "whose rounding moves the boundary; certify a float32 copy"
        )
    draw = torch.Generator().manual_seed(4)
    # the same for every image, whatever others it is looked at with
    move = (2 * torch.rand(network.shape, generator=draw, dtype=torch.float64) - 1).to(pixels)
    around = pixels + radii.view(-1, 1, 1, 1) * move / move.norm().clamp_min(1.0)
    far = FAR * torch.randn(OUTSIDE, *network.shape, generator=draw, dtype=torch.float64).to(pixels)
    points = torch.cat([pixels, around, far])
    with forked_generators(), frozen_view(model, (0.0, 1.0), "free", pixels.device) as view:
        points, said = _computed(view, points, dtypes)
    read, estimate = network.run(points)[1], rounding(network, points, dtype)
    error = (said - read).abs().amax(1)
    if not (error <= WRONG * estimate).all():
        raise InputError(
            "expected a model that computes the same in its own precision as a copy in float64, got logits that differ "
            f"by {float(error.max()):.3g}; leave out what depends on the precision, mixes images or draws at random"
        )
    count = len(pixels)
    seen = torch.maximum(error[:count], error[count : 2 * count])
    # two logits round, and rounding elsewhere may be twice what was seen
    return 2 * torch.maximum(estimate[:count], 2 * seen)
