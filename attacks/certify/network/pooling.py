"""Max pooling as affine operations and ReLUs: ``max(a, b) = a + relu(b - a)``, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attacks.certify.network.nonlinearities import MaxPool, nonlinearity_of
from attacks.certify.network.tracing import Operation, Recording, Value, filled

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "reshape": torch.reshape,
    "index": torch.ops.aten.index.Tensor,
    "sub": torch.ops.aten.sub.Tensor,
    "add": torch.ops.aten.add.Tensor,
    "relu": torch.ops.aten.relu.default,
    "cat": torch.ops.aten.cat.default,
}


def without_pooling(recording: Recording, image: Tensor) -> Recording:
    """The same function without max pooling; each window takes one ReLU per pixel but the first.

    Poolings stay whose input is not ``(1, C, H, W)``, whose second result, the places of the largest pixels, is used,
    or of which a window lies outside the input.

    Args:
        image: ``(1, C, H, W)`` float64, any image.
    """
    used = {value for operation in recording.operations for value in operation.values}
    unfolding = _Unfolding()

    def compute(number: int, operation: Operation, look_up: Callable[[Value], Any]) -> Any:
        result, pool = operation(look_up), nonlinearity_of(operation)
        windows = []
        if isinstance(pool, MaxPool) and result[0].ndim == 4 and Value(number, 1) not in used:
            windows = pool.windows(look_up(operation.values[0]))
        if windows and all(windows):
            unfolding.unfold(number, operation, windows, look_up(operation.values[0]), result[0])
        else:
            unfolding.keep(number, operation, len(result) if isinstance(result, tuple | list) else 1)
        return result

    recording.replay(image, compute)
    return Recording(tuple(unfolding.operations), unfolding.moved[recording.logits])


class _Unfolding:
    """The new operations, and where they have the results of the recorded ones."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.moved = {Value(-1): Value(-1)}

    def keep(self, number: int, operation: Operation, outputs: int) -> None:
        """Take over an operation."""
        args = filled(operation.args, self.moved.__getitem__)
        options = {key: filled(value, self.moved.__getitem__) for key, value in operation.options.items()}
        self._add(operation.function, operation.name, args, operation.layer, options)
        for output in range(outputs):
            self.moved[Value(number, output)] = Value(len(self.operations) - 1, output)

    def unfold(
        self, number: int, operation: Operation, windows: list[list[int]], inputs: Tensor, outputs: Tensor
    ) -> None:
        """Replace a pooling of ``inputs`` ``(1, C, H, W)`` to ``outputs``, with the places of each window's pixels."""

        def add(name: str, *args: Any) -> Value:
            return self._add(_FUNCTIONS[name], name, args, operation.layer)

        def pick(values: Value, places: list[int]) -> Value:
            return add("index", values, [None, torch.tensor(places, device=inputs.device)])

        candidates = add("reshape", self.moved[operation.values[0]], (1, inputs.numel()))
        while any(len(window) > 1 for window in windows):
            firsts = [place for window in windows for place in window[: len(window) // 2 * 2 : 2]]
            seconds = [place for window in windows for place in window[1::2]]
            alone = [window[-1] for window in windows if len(window) % 2]
            first = pick(candidates, firsts)
            larger = add("add", first, add("relu", add("sub", pick(candidates, seconds), first)))
            candidates = add("cat", [larger, pick(candidates, alone)], 1) if alone else larger
            windows = _renumbered(windows)
        shape = tuple(outputs.shape)
        self.moved[Value(number)] = add("reshape", pick(candidates, [place for (place,) in windows]), shape)

    def _add(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        layer: str,
        options: dict[str, Any] | None = None,
    ) -> Value:
        self.operations.append(Operation(function, name, args, options or {}, layer))
        return Value(len(self.operations) - 1)


def _renumbered(windows: list[list[int]]) -> list[list[int]]:
    """The windows after one round: first all pairs, then what was left alone."""
    pairs, result, alone = sum(len(window) // 2 for window in windows), [], 0
    number = 0
    for window in windows:
        places = list(range(number, number + len(window) // 2))
        number += len(places)
        if len(window) % 2:
            places.append(pairs + alone)
            alone += 1
        result.append(places)
    return result
