"""A network as a graph of affine blocks and piecewise linear nonlinearities, through which bounds are propagated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attacks.certify.network.blocks import Block, Local, localise
from attacks.certify.network.intervals import Intervals, absolute, affine_intervals
from attacks.certify.network.nonlinearities import Leaky, MaxPool, Nonlinearity, nonlinearity_of
from attacks.certify.network.pooling import without_pooling
from attacks.certify.network.reading import check_reading
from attacks.certify.network.tracing import (
    Operation,
    Recording,
    Untraceable,
    Value,
    evaluation_copy,
    record,
)
from attacks.isolation.outputs import as_logits
from attacks.seeds import forked_generators
from attacks.types import InputError, UnsoundError, one_line

# largest number of entries that the functionals of all units of a block pass through, which takes seconds per image in
# convolutions; larger blocks keep their interval bounds
AFFORDED = 2**24

_SUPPORTED = (
    "Linear, convolutions, BatchNorm, Dropout, average and max pooling, Flatten, ReLU, LeakyReLU and arithmetic with "
    "constants and between branches"
)


class PiecewiseNetwork:
    """Affine blocks and the nonlinearities between them.

    Stage 0 is the image. Stage k is the output of nonlinearity k - 1, which follows block k - 1. The last block
    computes the logits. The operations that the model carries out are read (see `record`), not the types of its layers.
    The result is checked against the model before use (see `check_reading`).

    Attributes:
        model: a copy in float64 and evaluation mode.
        blocks: in the order of the forward pass.
        nonlinearities: one fewer than blocks.
        places: per block, the operation after it, for messages.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device, *, pooling: bool = True) -> None:
        """Read a model.

        Args:
            model: left untouched. shape: ``(C, H, W)`` of the images.
            pooling: whether max pooling is a nonlinearity of its own; otherwise it is read as ReLUs.

        Raises:
            InputError: an operation that is neither affine nor a supported nonlinearity, named with its layer; a model
                that cannot be recorded; or one that computes another function than the one that was read.
        """
        self.model, self.shape, self.device = evaluation_copy(model).to(device), shape, device
        with forked_generators():
            self._recording = self._recorded(pooling)
        self.blocks: list[Block] = []
        self.nonlinearities: list[Nonlinearity] = []
        self.places: list[str] = []
        self._nonlinearity_at: dict[int, int] = {}
        self._absolutes: dict[int, Operation] = {}
        self._locals: dict[int, Local | None] = {}
        with forked_generators():
            try:
                self._read()
                check_reading(self)
            except (InputError, UnsoundError):
                raise
            except Exception as error:
                raise refusal(f"operations that cannot be read ({one_line(error, most=200)})") from error

    def intervals(self, low: Tensor, high: Tensor, tighten: Callable[[int, Tensor, Tensor], Intervals]) -> Tensor:
        """Interval arithmetic from pixels ``(B, C, H, W)`` to logits, with ``tighten`` applied after each block.

        Args:
            tighten: (block, lower bounds, upper bounds ``(B, n)``) -> valid bounds that are no looser.

        Returns:
            Lower bounds ``(B, K)`` of the logits.
        """

        def compute(number: int, operation: Operation, look_up: Callable[[Value], Any]) -> Any:
            inputs = {value: look_up(value) for value in operation.values}
            nonlinearity = self._nonlinearity_at.get(number)
            if nonlinearity is None:
                return affine_intervals(operation, self._absolutes[number], inputs)
            (interval,) = inputs.values()
            tightened = tighten(nonlinearity, *interval.flat()).shaped(self.blocks[nonlinearity].shape)
            outcome = self.nonlinearities[nonlinearity].intervals(tightened)
            return Intervals(outcome.low[:, None], outcome.high[:, None])

        logits = self._recording.replay(Intervals(low[:, None], high[:, None]), compute)
        return tighten(len(self.nonlinearities), *logits.flat()).low

    def logits(self, images: Tensor) -> Tensor:
        """The model's own logits ``(B, K)`` of images ``(B, C, H, W)``."""
        with torch.no_grad():
            # a copy: the model may change its input in place
            logits: Tensor = as_logits(self.model(images.clone(memory_format=torch.contiguous_format)))
        return logits

    def run(self, images: Tensor, slopes: Sequence[Tensor] = ()) -> tuple[tuple[Tensor, ...], Tensor]:
        """The forward pass as it was read.

        Args:
            images: ``(B, C, H, W)`` float64.
            slopes: per nonlinearity ``(B, n_k)``: factors of its inputs that replace the nonlinearity.

        Returns:
            The inputs ``(B, n_k)`` of each nonlinearity, and the logits ``(B, K)``.
        """

        def of_one(image: Tensor, *factors: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            inputs: list[Tensor] = []

            def compute(number: int, operation: Operation, look_up: Callable[[Value], Any]) -> Any:
                nonlinearity = self._nonlinearity_at.get(number)
                if nonlinearity is None:
                    return operation(look_up)
                (value,) = operation.values
                inputs.append(look_up(value).flatten())
                return look_up(value) * factors[nonlinearity].view_as(look_up(value)) if factors else operation(look_up)

            logits = self._recording.replay(image[None], compute)
            return tuple(inputs), logits[0]

        inputs, logits = torch.vmap(of_one)(images, *slopes)
        return inputs, logits

    def sizes(self, images: Tensor) -> Tensor:
        """Per block, the largest sum of absolute values behind one of its results: ``(B, blocks)``."""
        sizes: list[Tensor] = []

        def around_zero(values: Tensor) -> Intervals:
            return Intervals(-values.abs(), values.abs())

        def keep(result: Intervals) -> None:
            low, high = result.flat()
            sizes.append(torch.maximum(-low, high).amax(1))

        inputs = self.run(images)[0]

        def compute(number: int, operation: Operation, look_up: Callable[[Value], Any]) -> Any:
            intervals = {value: look_up(value) for value in operation.values}
            nonlinearity = self._nonlinearity_at.get(number)
            if nonlinearity is None:
                return affine_intervals(operation, self._absolutes[number], intervals)
            keep(*intervals.values())
            shaped = Intervals(inputs[nonlinearity], inputs[nonlinearity]).shaped(self.blocks[nonlinearity].shape)
            return around_zero(self.nonlinearities[nonlinearity].intervals(shaped).low[:, None])

        keep(self._recording.replay(around_zero(images[:, None]), compute))
        return torch.stack(sizes, 1)

    def units(self, number: int) -> int:
        """The number of ReLUs that a nonlinearity takes."""
        nonlinearity, shape = self.nonlinearities[number], self.blocks[number].shape
        pixels = math.prod(nonlinearity.kernel) - 1 if isinstance(nonlinearity, MaxPool) else 1
        return pixels * math.prod(nonlinearity.shape(shape))

    def widest(self, block: int) -> int:
        """The largest number of entries of the image and of the results up to this block's."""
        return max(math.prod(self.shape), *(math.prod(earlier.shape) for earlier in self.blocks[: block + 1]))

    def tightened(self, block: int) -> bool:
        """Whether a functional of each of the block's units can be propagated backwards at acceptable cost."""
        passed = math.prod(self.shape) + sum(math.prod(earlier.shape) for earlier in self.blocks[:block])
        return 2 * math.prod(self.blocks[block].shape) * passed <= AFFORDED

    def local(self, block: int) -> Local | None:
        """See `localise`; computed once per block."""
        if block not in self._locals:
            smooth = all(isinstance(nonlinearity, Leaky) for nonlinearity in self.nonlinearities[:block])
            self._locals[block] = localise(self.blocks[: block + 1]) if smooth else None
        return self._locals[block]

    def _recorded(self, pooling: bool) -> Recording:
        """Record the model on two random images; both must give the same operations with the same constants."""
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(2, *self.shape, generator=draw, dtype=torch.float64).to(self.device)
        try:
            first, second = (record(self.model, image[None]) for image in images)
        except Untraceable as error:
            raise refusal(str(error)) from error
        except Exception as error:
            raise refusal(f"a forward pass that cannot be recorded ({one_line(error, most=200)})") from error
        if place := first.differs(second):
            raise refusal(f"{place} with numbers that depend on the image outside of recorded operations")
        return first if pooling else without_pooling(first, images[:1])

    def _read(self) -> None:
        leaves: list[Tensor] = []
        sources: dict[int, frozenset[int]] = {-1: frozenset({0})}

        def stage(shape: tuple[int, ...]) -> Tensor:
            leaves.append(torch.zeros(1, *shape, dtype=torch.float64, device=self.device, requires_grad=True))
            return leaves[-1]

        def close(result: Tensor, used: frozenset[int], place: str) -> None:
            if len(result) != 1:
                raise refusal(f"an image on another axis than the first, before {place}")
            if not result.numel():
                raise refusal(f"an empty result before {place}")
            if not result.isfinite().all():
                raise InputError("expected finite weights, got NaN or inf; check them (did training diverge?)")
            ascending = tuple(sorted(used))
            self.blocks.append(Block(ascending, result, tuple(leaves[source] for source in ascending)))
            self.places.append(place)

        def compute(number: int, operation: Operation, look_up: Callable[[Value], Any]) -> Any:
            used = frozenset[int]().union(*(sources[value.operation] for value in operation.values))
            if any(look_up(value) is None for value in operation.values):
                raise refusal(f"the places of a pool's largest pixels, used by {operation.place}")
            nonlinearity = nonlinearity_of(operation)
            if isinstance(nonlinearity, MaxPool) and look_up(operation.values[0]).ndim != 4:
                raise refusal(f"{operation.place} of an input that is not (1, C, H, W)")
            if isinstance(nonlinearity, MaxPool) and not nonlinearity.filled(look_up(operation.values[0])):
                raise refusal(f"{operation.place} with a window that lies wholly in the padding")
            if nonlinearity is not None:
                close(look_up(operation.values[0]), used, operation.place)
                self._nonlinearity_at[number] = len(self.nonlinearities)
                self.nonlinearities.append(nonlinearity)
                sources[number] = frozenset({len(self.nonlinearities)})
                outcome = stage(nonlinearity.shape(self.blocks[-1].shape))
                # the indices of a pool's largest pixels are not a piecewise linear function
                return (outcome, None) if operation.name == "max_pool2d_with_indices" else outcome
            changed = absolute(operation)
            if changed is None:
                several = sum(isinstance(argument, Value) for argument in operation.args) > 1
                raise refusal(operation.place + " of two results of the image" * several)
            self._absolutes[number], sources[number] = changed, used
            with torch.enable_grad():
                return operation(look_up)

        logits = self._recording.replay(stage(self.shape), compute)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(
                f"expected logits (B, K) of at least 2 classes, got {tuple(logits.shape)} of one image; "
                "return one logit per class"
            )
        close(logits, sources[self._recording.logits.operation], "the logits")


def refusal(reason: str) -> InputError:
    """The error for a network that cannot be read."""
    return InputError(f"expected a network of {_SUPPORTED}, got {reason}; linear bounds cannot be computed for it")
