"""What certifiers can read: a model's forward pass as a graph of affine operations and kinks."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from attacks.estimator import InputError
from attacks.input_gradient import unquicken

LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
# by name, as functions of torch and as methods of tensors; they act on each image alone
AFFINE = frozenset(
    {
        *("add", "iadd", "sub", "neg", "sum", "mean", "linear", "conv1d", "conv2d", "batch_norm", "avg_pool2d"),
        *("adaptive_avg_pool2d", "dropout", "cat", "stack", "full_like", "zeros_like", "flatten", "reshape", "view"),
        *("squeeze", "unsqueeze", "permute", "transpose", "contiguous", "clone", "size", "getattr", "getitem"),
    }
)
# affine in one argument where the others are constant
PRODUCTS = frozenset({"mul", "matmul", "truediv", "div"})


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own layers and torchvision's `Normalize`, which refuses to be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_normalize(m) or super().is_leaf_module(m, module_qualified_name)


def is_normalize(module: nn.Module) -> bool:
    """Whether it is torchvision's."""
    return type(module).__name__ == "Normalize" and type(module).__module__.startswith("torchvision.transforms")


def evaluation_copy(model: nn.Module) -> nn.Module:
    """The model in float64, on the CPU and in evaluation mode, sharing nothing with the caller's.

    Raises:
        InputError: it cannot be copied.
    """
    try:
        own = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    except Exception as error:
        raise InputError(
            f"expected a model that can be copied, got {one_line(error)}; build it of plain layers"
        ) from error
    unquicken(own)
    return own


def trace(model: nn.Module) -> fx.Graph:
    """The model's operations in order.

    Raises:
        Exception: of any kind, where the forward pass depends on the values of its input or takes other arguments.
    """
    return _Tracer().trace(model)


def name_of(node: fx.Node) -> str:
    """Of a function or a method: ``conv2d``, ``add``."""
    return node.target if isinstance(node.target, str) else node.target.__name__


def constant_of(model: nn.Module, node: fx.Node) -> object:
    """What a ``get_attr`` node stands for."""
    value: object = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def function_of(node: fx.Node) -> Any:
    """The callable of a function or method node."""
    return getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target


def one_line(error: Exception) -> str:
    """Kind and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
