"""Interval arithmetic for affine operations (centre-radius form), and the table of affine operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attacks.certify.network.tracing import Operation, Value


def affine_intervals(operation: Operation, absolute: Operation, inputs: Mapping[Value, Intervals]) -> Any:
    """Interval bounds of an affine operation's results: ``|(A x + b) - (A c + b)| <= |A| |x - c|``.

    Args:
        absolute: the operation of absolute values; see `absolute`.
        inputs: bounds of the arguments that depend on the image, ``(B, 1, ...)``.

    Returns:
        An `Intervals` ``(B, 1, ...)``, or a tuple of them where the operation has several results.
    """
    centre = operation.of_batch({value: (bounds.low + bounds.high) / 2 for value, bounds in inputs.items()})
    radius = absolute.of_batch({value: (bounds.high - bounds.low) / 2 for value, bounds in inputs.items()})
    if isinstance(centre, Tensor):
        return Intervals(centre - radius, centre + radius)
    return tuple(Intervals(c - r, c + r) for c, r in zip(centre, radius, strict=True))


def absolute(operation: Operation) -> Operation | None:
    """The operation with absolute values in its matrix and no constant part; None if the operation is not affine."""
    rule = _RULES.get(operation.name)
    return None if rule is None else rule(operation)


def _moved(operation: Operation) -> Operation | None:
    """For operations that move, copy or add entries of their arguments with non-negative weights."""
    if any(isinstance(option, torch.dtype) and not option.is_floating_point for option in operation.options.values()):
        return None
    return replace(operation, args=_zeros(operation.args))


def _averaged(operation: Operation) -> Operation | None:
    divisor = operation.args[6] if len(operation.args) > 6 else None
    return None if divisor is not None and divisor < 0 else _moved(operation)


def _picked(operation: Operation) -> Operation | None:
    """Indexing by constant indices."""
    return None if any(map(_of_image, operation.args[1])) else operation


def _padded(operation: Operation) -> Operation:
    values, padding, *_ = operation.args
    return replace(operation, args=(values, padding, 0.0))


def _added(operation: Operation) -> Operation:
    first, second = operation.args[:2]
    options = {"alpha": abs(operation.options.get("alpha", 1))}
    return replace(operation, function=torch.add, args=(_zero(first), _zero(second)), options=options)


def _subtracted_from(operation: Operation) -> Operation:
    """``rsub(x, y)`` is ``y - alpha x``."""
    alpha = operation.args[2] if len(operation.args) > 2 else operation.options.get("alpha", 1)
    subtracted, other = operation.args[:2]
    if isinstance(other, Tensor | Value):
        return replace(operation, function=torch.add, args=(_zero(other), subtracted), options={"alpha": abs(alpha)})
    return replace(operation, function=torch.mul, args=(subtracted, abs(alpha)), options={})


def _negated(operation: Operation) -> Operation:
    return replace(operation, function=torch.clone, options={})


def _scaled(operation: Operation) -> Operation | None:
    """A product with constants; None for a product of two results of the image and for a rounded quotient."""
    of_image = [argument for argument in operation.args if isinstance(argument, Value)]
    if len(of_image) > 1 or operation.options.get("rounding_mode"):
        return None
    if operation.name == "div" and not isinstance(operation.args[0], Value):
        return None
    return replace(operation, args=tuple(map(_size, operation.args)))


def _added_product(operation: Operation) -> Operation | None:
    """``addmm`` and similar: a constant or a result of the image, plus a product with a constant."""
    bias, *factors = operation.args
    if all(isinstance(factor, Value) for factor in factors):
        return None
    options = {key: abs(value) for key, value in operation.options.items()}
    return replace(operation, args=(_zero(bias), *map(_size, factors)), options=options)


def _convolved(operation: Operation) -> Operation | None:
    values, weight, bias, *rest = operation.args
    if not isinstance(values, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        return None
    return replace(operation, args=(values, weight.abs(), _zero(bias), *rest))


def _normalised(operation: Operation) -> Operation | None:
    """Batch norm with its running statistics."""
    values, weight, bias, mean, variance, *rest = operation.args
    if (operation.name != _LEGITIMATE and rest[0]) or mean is None or any(map(_of_image, operation.args[1:])):
        return None
    return replace(operation, args=(values, _size(weight), _zero(bias), _zero(mean), variance, *rest))


def _of_image(argument: object) -> bool:
    return isinstance(argument, Value)


def _zero(argument: Any) -> Any:
    """0 in the place of a constant; arguments that depend on the image stay."""
    if isinstance(argument, Tensor):
        return torch.zeros_like(argument)
    return 0 if isinstance(argument, int | float) else argument


def _zeros(argument: Any) -> Any:
    """0 in the place of constant tensors, also in lists; sizes and dimensions stay."""
    if isinstance(argument, tuple | list):
        return type(argument)(map(_zeros, argument))
    return _zero(argument) if isinstance(argument, Tensor) else argument


def _size(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument if argument.dtype == torch.bool else argument.abs()
    return abs(argument) if isinstance(argument, int | float) else argument


_LEGITIMATE = "_native_batch_norm_legit_no_training"
_RULES: Mapping[str, Callable[[Operation], Operation | None]] = {
    **dict.fromkeys(("reshape", "permute", "transpose", "t", "expand", "squeeze"), _moved),
    **dict.fromkeys(("unsqueeze", "slice", "select", "cat", "stack"), _moved),
    **dict.fromkeys(("split", "split_with_sizes", "unbind", "slice_scatter", "select_scatter", "flip"), _moved),
    **dict.fromkeys(("sum", "mean", "avg_pool1d", "_adaptive_avg_pool2d"), _moved),
    "avg_pool2d": _averaged,
    "index": _picked,
    "constant_pad_nd": _padded,
    **dict.fromkeys(("add", "sub"), _added),
    "rsub": _subtracted_from,
    "neg": _negated,
    **dict.fromkeys(("mul", "div", "mm", "bmm", "mv", "dot"), _scaled),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_product),
    "convolution": _convolved,
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", _LEGITIMATE), _normalised),
}


@dataclass(frozen=True)
class Intervals:
    """Lower and upper bounds of values: ``(B, ...)`` each."""

    low: Tensor
    high: Tensor

    def flat(self) -> tuple[Tensor, Tensor]:
        """Both bounds as ``(B, n)``."""
        return self.low.reshape(len(self.low), -1), self.high.reshape(len(self.high), -1)

    def shaped(self, shape: tuple[int, ...]) -> Intervals:
        """The bounds with shape ``(B, *shape)``."""
        return Intervals(self.low.view(-1, *shape), self.high.view(-1, *shape))
