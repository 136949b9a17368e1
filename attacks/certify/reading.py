"""Read a model as a `ReluNetwork`: trace it, and push a basis through what lies between two ReLUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from attacks.certify.network import ReluNetwork
from attacks.certify.region import Array
from attacks.certify.tracing import (
    AFFINE,
    LAYERS,
    PRODUCTS,
    constant_of,
    evaluation_copy,
    function_of,
    is_normalize,
    name_of,
    one_line,
    trace,
)
from attacks.estimator import InputError

# entries of one block's matrix: 128 MiB of float64
LARGEST = 2**24

_SUPPORTED = "Linear, Conv2d, BatchNorm, Dropout, average pooling, Flatten, ReLU and arithmetic with constants"


def read_network(model: nn.Module, shape: tuple[int, ...]) -> ReluNetwork:
    """The model's blocks in float64, as it computes in evaluation; the model is left untouched.

    Args:
        model: affine layers and ReLUs one after the other, in modules of any nesting.
        shape: ``(C, H, W)`` of the images.

    Raises:
        InputError: a layer that is neither affine nor a ReLU, a path around a ReLU, a block of more than
            ``LARGEST`` entries, or a model that cannot be traced.
    """
    own = evaluation_copy(model)
    reader = _Reader(own, shape)
    with torch.no_grad():
        network = reader.read()
        _check(network, own, shape)
    return network


def _refusal(what: str) -> InputError:
    return InputError(f"expected a network of {_SUPPORTED}, got {what}; exact margins cannot be had of it")


@dataclass(frozen=True)
class _Rows:
    """What a block makes of its inputs' origin and unit vectors: ``(1 + n, ...)``; the difference is its matrix."""

    block: int
    values: Tensor


class _Reader:
    """Runs the traced graph once, on `_Rows`."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.shape = model, shape
        self.weights: list[Array] = []
        self.biases: list[Array] = []

    def read(self) -> ReluNetwork:
        results: dict[fx.Node, Any] = {}
        for node in self._trace().nodes:
            arguments = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            if node.op == "output":
                return self._finish(arguments[0][0])
            try:
                results[node] = self._run(node, *arguments)
            except InputError:
                raise
            except Exception as error:
                raise _refusal(f"{one_line(error)} in {node.name} on images of shape {self.shape}") from error
        raise _refusal("no output")

    def _trace(self) -> fx.Graph:
        try:
            return trace(self.model)
        except Exception as error:
            raise _refusal(f"a forward pass that cannot be traced ({one_line(error)})") from error

    def _run(self, node: fx.Node, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return self._start(self.shape)
        if node.op == "get_attr":
            return constant_of(self.model, node)
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if isinstance(module, nn.ReLU):
                return self._relu(args[0])
            if not isinstance(module, LAYERS) and not is_normalize(module):
                raise _refusal(f"the layer {node.target}: {type(module).__name__}")
            return self._apply(module, args, options)
        name = name_of(node)
        if name in ("relu", "relu_"):
            return self._relu(args[0])
        if name not in AFFINE | PRODUCTS:
            raise _refusal(f"the operation {name}")
        if name in PRODUCTS and (isinstance(args[-1], _Rows) and ("div" in name or isinstance(args[0], _Rows))):
            raise _refusal(f"the operation {name} of two results of the image")
        return self._apply(function_of(node), args, options)

    def _apply(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call it on the rows themselves; what it makes of them belongs to their block."""
        blocks = set()

        def bare(value: Any) -> Any:
            if isinstance(value, _Rows):
                blocks.add(value.block)
                return value.values
            if isinstance(value, tuple | list):
                return type(value)(map(bare, value))
            return value

        bare_args, bare_options = bare(args), {key: bare(value) for key, value in options.items()}
        if len(blocks) > 1:
            raise _refusal("a path around a ReLU")
        result = function(*bare_args, **bare_options)
        return _Rows(blocks.pop(), result) if blocks and isinstance(result, Tensor) else result

    def _start(self, shape: tuple[int, ...]) -> _Rows:
        """The first rows of a new block."""
        size = math.prod(shape)
        if size * size > LARGEST:
            raise InputError(
                f"expected at most {math.isqrt(LARGEST)} pixels and units a layer, got {size}; take a smaller network"
            )
        basis = torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)])
        return _Rows(len(self.weights), basis.view(1 + size, *shape))

    def _relu(self, rows: object) -> _Rows:
        values = self._close(rows)
        return self._start(tuple(values.shape[1:]))

    def _close(self, rows: object) -> Tensor:
        """End the current block with these rows."""
        if not isinstance(rows, _Rows):
            raise _refusal("a ReLU or an output of what is no tensor of the image")
        if rows.block != len(self.weights):
            raise _refusal("a path around a ReLU")
        flat = rows.values.reshape(len(rows.values), -1).numpy()
        if not np.isfinite(flat).all():
            raise InputError("expected finite weights, got NaN or inf; check them (did training diverge?)")
        self.weights.append(np.ascontiguousarray((flat[1:] - flat[0]).T))
        self.biases.append(flat[0].copy())
        return rows.values

    def _finish(self, rows: object) -> ReluNetwork:
        self._close(rows)
        return ReluNetwork(weights=tuple(self.weights), biases=tuple(self.biases))


def _check(network: ReluNetwork, model: nn.Module, shape: tuple[int, ...]) -> None:
    """Compare with the model itself, on images that leave no ReLU always on: nothing may have been misread."""
    draw = torch.Generator().manual_seed(0)
    images = 3 * torch.rand(8, *shape, generator=draw, dtype=torch.float64) - 1
    expected = model(images).numpy()
    if network.classes < 2:
        raise InputError(f"expected at least 2 classes, got {network.classes} logits; return one logit a class")
    got = np.stack([network.logits(image.flatten().numpy()) for image in images])
    if expected.shape != got.shape or not np.allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max()):
        raise _refusal("operations that mix images or depend on more than the image")
