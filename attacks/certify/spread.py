"""Affine operations on intervals: the middle goes through the operation, the half width through its absolute value."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from attacks.certify.kinks import Intervals
from attacks.certify.tracing import PRODUCTS, name_of

# of functions with weights, which arguments are the weights: they are what the half width is multiplied by
_WEIGHTS = {"linear": (1, "weight"), "conv1d": (1, "weight"), "conv2d": (1, "weight"), "batch_norm": (3, "weight")}
_SUMS = ("add", "iadd", "sub")


def spread(
    node: fx.Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    known: dict[fx.Node, Callable[..., Any]],
) -> Any:
    """The outcome of a node; an `Intervals` where an argument is one.

    Args:
        known: absolute values of modules that were made before.
    """
    middles: list[Any] = []

    def middle(value: Any) -> Any:
        if isinstance(value, Intervals):
            middles.append(value)
            return (value.low + value.high) / 2
        return type(value)(map(middle, value)) if isinstance(value, tuple | list) else value

    centre = function(*middle(args), **{key: middle(value) for key, value in options.items()})
    if not middles or not isinstance(centre, Tensor):
        return centre
    if node.op == "call_module":
        if node not in known:
            assert isinstance(function, nn.Module)
            known[node] = _absolute(function)
        half = known[node](*map(_half, args))
    else:
        half = _half_of_call(name_of(node), function, args, options)
    return Intervals(centre - half, centre + half)


def _half(value: Any) -> Any:
    """Half the width; 0 of a number or tensor that does not depend on the image."""
    if isinstance(value, Intervals):
        return (value.high - value.low) / 2
    if isinstance(value, tuple | list):
        return type(value)(map(_half, value))
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _half_of_call(name: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if name in PRODUCTS:
        return function(*(_half(one) if isinstance(one, Intervals) else _size(one) for one in args))
    if name in _SUMS:
        return operator.add(*(_half(one) if isinstance(one, Intervals | Tensor) else 0.0 for one in args[:2]))
    if name == "neg":
        return _half(args[0])
    if name in _WEIGHTS:
        return _half_of_weights(name, function, args, options)
    return function(*map(_half, args), **{key: _half(value) for key, value in options.items()})


def _half_of_weights(name: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Constants are 0, but for the weights, which are absolute, and the variance, which stays."""
    position, key = _WEIGHTS[name]
    halves = [_size(one) if at == position else _half(one) for at, one in enumerate(args)]
    named = {word: _size(one) if word == key else _half(one) for word, one in options.items()}
    if name == "batch_norm":
        if len(args) > 2:
            halves[2] = args[2]
        else:
            named["running_var"] = options["running_var"]
    return function(*halves, **named)


def _size(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) else abs(value) if isinstance(value, int | float) else value


def _absolute(module: nn.Module) -> nn.Module:
    """The layer whose matrix holds the absolute values and whose constant part is 0."""
    own = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in (*own.named_parameters(), *own.named_buffers()):
            if name == "weight":
                value.abs_()
            elif name in ("bias", "running_mean"):
                value.zero_()
        if type(own).__name__ == "Normalize":
            own.mean = [0.0] * len(own.std)  # type: ignore[assignment, arg-type]
    return own
