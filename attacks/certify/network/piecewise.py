"""A network as affine blocks between kinks, wired in any way: what linear bounds are propagated through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attacks.certify.network.blocks import Block, Local, localise
from attacks.certify.network.intervals import Intervals, absolute, spread
from attacks.certify.network.nonlinearities import Kink, Leaky, MaxPool, kink_of
from attacks.certify.network.reading import check_reading
from attacks.certify.network.tracing import (
    Operation,
    Recording,
    Untraceable,
    Value,
    evaluation_copy,
    one_line,
    record,
)
from attacks.isolation.outputs import as_logits
from attacks.seeds import forked_generators
from attacks.types import InputError, UnsoundError

# entries that the functionals of all units of a block pass through: seconds an image in convolutions; the bounds of
# larger blocks are left to intervals
AFFORDED = 2**24

_SUPPORTED = (
    "Linear, convolutions, BatchNorm, Dropout, average and max pooling, Flatten, ReLU, LeakyReLU and arithmetic with "
    "constants and between branches"
)


class PiecewiseNetwork:
    """Stage 0 is the image, stage k the outcome of kink k - 1, which follows block k - 1; the last block's are logits.

    What is read are the operations that the model carries out (see `record`), not what its layers are called; the
    reading is held against the model before it is used.

    Attributes:
        model: a copy in float64 and evaluation mode. blocks: in the order of the forward pass. kinks: one fewer.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        """Read a model.

        Args:
            model: left untouched. shape: ``(C, H, W)`` of the images.

        Raises:
            InputError: an operation that is neither affine nor a known kink, named with its layer; a model that cannot
                be recorded; or one that computes something else than what was read.
        """
        self.model, self.shape, self.device = evaluation_copy(model).to(device), shape, device
        with forked_generators():
            self._recording = self._recorded()
        self.blocks: list[Block] = []
        self.kinks: list[Kink] = []
        self.places: list[str] = []
        self._kink_at: dict[int, int] = {}
        self._absolutes: dict[int, Operation] = {}
        self._locals: dict[int, Local | None] = {}
        with forked_generators():
            try:
                self._read()
                check_reading(self)
            except (InputError, UnsoundError):
                raise
            except Exception as error:
                raise refusal(f"operations that cannot be read ({one_line(error)})") from error

    def intervals(self, low: Tensor, high: Tensor, tighten: Callable[[int, Tensor, Tensor], Intervals]) -> Tensor:
        """Interval arithmetic from pixels ``(B, C, H, W)`` to logits, with each block's result offered to ``tighten``.

        Args:
            tighten: block, bounds ``(B, n)`` -> bounds that hold as well and are no looser.

        Returns:
            Least logits ``(B, K)``.
        """

        def compute(number: int, operation: Operation, found: Callable[[Value], Any]) -> Any:
            inputs = {value: found(value) for value in operation.values}
            kink = self._kink_at.get(number)
            if kink is None:
                return spread(operation, self._absolutes[number], inputs)
            (given,) = inputs.values()
            tightened = tighten(kink, *given.flat()).shaped(self.blocks[kink].shape)
            outcome = self.kinks[kink].intervals(tightened)
            return Intervals(outcome.low[:, None], outcome.high[:, None])

        logits = self._recording.replay(Intervals(low[:, None], high[:, None]), compute)
        return tighten(len(self.kinks), *logits.flat()).low

    def logits(self, images: Tensor) -> Tensor:
        """Of images ``(B, C, H, W)``, by the model itself: ``(B, K)``."""
        with torch.no_grad():
            # a copy: the model may work in place on what it is given
            logits: Tensor = as_logits(self.model(images.clone(memory_format=torch.contiguous_format)))
        return logits

    def run(self, images: Tensor, slopes: Sequence[Tensor] = ()) -> tuple[tuple[Tensor, ...], Tensor]:
        """The forward pass that was read.

        Args:
            images: ``(B, C, H, W)`` float64.
            slopes: ``(B, n_k)`` of each kink: what every input is multiplied by in its place.

        Returns:
            The inputs ``(B, n_k)`` of each kink, and the logits ``(B, K)``.
        """

        def of_one(image: Tensor, *given: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            inputs: list[Tensor] = []

            def compute(number: int, operation: Operation, found: Callable[[Value], Any]) -> Any:
                kink = self._kink_at.get(number)
                if kink is None:
                    return operation(found)
                (value,) = operation.values
                inputs.append(found(value).flatten())
                return found(value) * given[kink].view_as(found(value)) if given else operation(found)

            logits = self._recording.replay(image[None], compute)
            return tuple(inputs), logits[0]

        inputs, logits = torch.vmap(of_one)(images, *slopes)
        return inputs, logits

    def sizes(self, images: Tensor) -> Tensor:
        """The largest sum of absolute values that a number of each block is made of, ``(B, blocks)``."""
        sizes: list[Tensor] = []

        def around_zero(values: Tensor) -> Intervals:
            return Intervals(-values.abs(), values.abs())

        def keep(result: Intervals) -> None:
            low, high = result.flat()
            sizes.append(torch.maximum(-low, high).amax(1))

        inputs = self.run(images)[0]

        def compute(number: int, operation: Operation, found: Callable[[Value], Any]) -> Any:
            given = {value: found(value) for value in operation.values}
            kink = self._kink_at.get(number)
            if kink is None:
                return spread(operation, self._absolutes[number], given)
            keep(*given.values())
            shaped = Intervals(inputs[kink], inputs[kink]).shaped(self.blocks[kink].shape)
            return around_zero(self.kinks[kink].intervals(shaped).low[:, None])

        keep(self._recording.replay(around_zero(images[:, None]), compute))
        return torch.stack(sizes, 1)

    def widest(self, block: int) -> int:
        """The most entries that the image or a result up to this block's has."""
        return max(math.prod(self.shape), *(math.prod(one.shape) for one in self.blocks[: block + 1]))

    def tightened(self, block: int) -> bool:
        """Whether carrying back a functional of each of its units can be afforded."""
        passed = math.prod(self.shape) + sum(math.prod(one.shape) for one in self.blocks[:block])
        return 2 * math.prod(self.blocks[block].shape) * passed <= AFFORDED

    def local(self, block: int) -> Local | None:
        """See `localise`; found when first asked for."""
        if block not in self._locals:
            smooth = all(isinstance(kink, Leaky) for kink in self.kinks[:block])
            self._locals[block] = localise(self.blocks[: block + 1]) if smooth else None
        return self._locals[block]

    def _recorded(self) -> Recording:
        """What the model computes of an image; of another one it must be the same, with the same constants."""
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(2, *self.shape, generator=draw, dtype=torch.float64).to(self.device)
        try:
            first, second = (record(self.model, image[None]) for image in images)
        except Untraceable as error:
            raise refusal(str(error)) from error
        except Exception as error:
            raise refusal(f"a forward pass that cannot be recorded ({one_line(error)})") from error
        if place := first.differs(second):
            raise refusal(f"{place} with numbers that depend on the image outside of recorded operations")
        return first

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

        def compute(number: int, operation: Operation, found: Callable[[Value], Any]) -> Any:
            used = frozenset[int]().union(*(sources[value.operation] for value in operation.values))
            if any(found(value) is None for value in operation.values):
                raise refusal(f"the places of a pool's largest pixels, used by {operation.place}")
            kink = kink_of(operation)
            if isinstance(kink, MaxPool) and found(operation.values[0]).ndim != 4:
                raise refusal(f"{operation.place} of what is no (1, C, H, W)")
            if kink is not None:
                close(found(operation.values[0]), used, operation.place)
                self._kink_at[number] = len(self.kinks)
                self.kinks.append(kink)
                sources[number] = frozenset({len(self.kinks)})
                outcome = stage(kink.shape(self.blocks[-1].shape))
                # the places of the largest pixels of a pool are no piecewise linear function
                return (outcome, None) if operation.name == "max_pool2d_with_indices" else outcome
            changed = absolute(operation)
            if changed is None:
                several = sum(isinstance(one, Value) for one in operation.args) > 1
                raise refusal(operation.place + " of two results of the image" * several)
            self._absolutes[number], sources[number] = changed, used
            with torch.enable_grad():
                return operation(found)

        logits = self._recording.replay(stage(self.shape), compute)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(
                f"expected logits (B, K) of at least 2 classes, got {tuple(logits.shape)} of one image; "
                "return one logit per class"
            )
        close(logits, sources[self._recording.logits.operation], "the logits")


def refusal(what: str) -> InputError:
    """An error for a network that cannot be read."""
    return InputError(f"expected a network of {_SUPPORTED}, got {what}; linear bounds cannot be had of it")
