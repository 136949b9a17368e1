"""Read a model as a `ReluNetwork`: trace it, and push a basis through what lies between two ReLUs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from attacks.certify.network import ReluNetwork
from attacks.certify.region import Array
from attacks.estimator import InputError

# entries of one block's matrix: 128 MiB of float64
LARGEST = 2**24

_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
# by name, as functions of torch and as methods of tensors; they act on each image alone
_AFFINE = frozenset(
    {
        *("add", "sub", "neg", "sum", "mean", "linear", "conv1d", "conv2d", "batch_norm", "avg_pool2d", "dropout"),
        *("cat", "stack", "full_like", "zeros_like", "flatten", "reshape", "view", "squeeze", "unsqueeze"),
        *("permute", "transpose", "contiguous", "clone", "size", "getattr", "getitem"),
    }
)
# affine in one argument where the others are constant
_PRODUCTS = frozenset({"mul", "matmul", "truediv", "div"})
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


def evaluation_copy(model: nn.Module) -> nn.Module:
    """The model in float64, on the CPU and in evaluation mode, sharing nothing with the caller's.

    Raises:
        InputError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model).cpu().double().eval()
    except Exception as error:
        raise InputError(
            f"expected a model that can be copied, got {_line(error)}; build it of plain layers"
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _refusal(what: str) -> InputError:
    return InputError(f"expected a network of {_SUPPORTED}, got {what}; exact margins cannot be had of it")


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own layers and torchvision's `Normalize`, which refuses to be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_normalize(m) or super().is_leaf_module(m, module_qualified_name)


def _is_normalize(module: nn.Module) -> bool:
    return type(module).__name__ == "Normalize" and type(module).__module__.startswith("torchvision.transforms")


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
                raise _refusal(f"{_line(error)} in {node.name} on images of shape {self.shape}") from error
        raise _refusal("no output")

    def _trace(self) -> fx.Graph:
        try:
            return _Tracer().trace(self.model)
        except Exception as error:
            raise _refusal(f"a forward pass that cannot be traced ({_line(error)})") from error

    def _run(self, node: fx.Node, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return self._start(self.shape)
        if node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if isinstance(module, nn.ReLU):
                return self._relu(args[0])
            if not isinstance(module, _LAYERS) and not _is_normalize(module):
                raise _refusal(f"the layer {node.target}: {type(module).__name__}")
            return self._apply(module, args, options)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if name in ("relu", "relu_"):
            return self._relu(args[0])
        if name not in _AFFINE | _PRODUCTS:
            raise _refusal(f"the operation {name}")
        if name in _PRODUCTS and (isinstance(args[-1], _Rows) and ("div" in name or isinstance(args[0], _Rows))):
            raise _refusal(f"the operation {name} of two results of the image")
        function: Any = getattr(Tensor, name) if node.op == "call_method" else node.target
        return self._apply(function, args, options)

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
