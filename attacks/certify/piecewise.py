"""A network as affine blocks between kinks, wired in any way: what linear bounds are propagated through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from attacks.certify.kinks import Intervals, Kink, Leaky, kink_of_call, kink_of_module
from attacks.certify.local import Local, localise
from attacks.certify.spread import spread
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

# entries that the functionals of all units of a block pass through: seconds an image in convolutions; the bounds of
# larger blocks are left to intervals
AFFORDED = 2**24

_SUPPORTED = (
    "Linear, Conv2d, BatchNorm, Dropout, average and max pooling, Flatten, ReLU, LeakyReLU and arithmetic with "
    "constants and between branches"
)


@dataclass(frozen=True)
class Block:
    """An affine function of the outputs of one or more stages; its transpose is one vector-Jacobian product.

    Attributes:
        sources: the stages, ascending.
        result: ``(1, ...)`` of the stages at zero: the constant part, with its graph.
        leaves: the zeros, one a source.
    """

    sources: tuple[int, ...]
    result: Tensor
    leaves: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's result."""
        return tuple(self.result.shape[1:])

    @cached_property
    def constant(self) -> Tensor:
        """``(n,)``."""
        return self.result.detach().flatten()

    def transposed(self, rows: Tensor) -> dict[int, Tensor]:
        """What functionals ``(R, n)`` of the result are of the sources: ``(R, n_s)`` each."""
        with torch.enable_grad():
            parts = torch.autograd.grad(
                self.result,
                self.leaves,
                rows.reshape(-1, *self.result.shape),
                is_grads_batched=True,
                retain_graph=True,
                create_graph=rows.requires_grad,
            )
        return {source: part.flatten(1) for source, part in zip(self.sources, parts, strict=True)}


class PiecewiseNetwork:
    """Stage 0 is the image, stage k the outcome of kink k - 1, which follows block k - 1; the last block's are logits.

    Attributes:
        blocks: in the order of the forward pass. kinks: one fewer.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
        """Read a model.

        Args:
            model: left untouched. shape: ``(C, H, W)`` of the images.

        Raises:
            InputError: an operation that is neither affine nor a known kink, or a model that cannot be traced.
        """
        self.model, self.shape, self.device = evaluation_copy(model).to(device), shape, device
        try:
            self._graph = trace(self.model)
        except Exception as error:
            raise _refusal(f"a forward pass that cannot be traced ({one_line(error)})") from error
        self.blocks: list[Block] = []
        self.kinks: list[Kink] = []
        self._spreads: dict[fx.Node, Callable[..., Any]] = {}
        self._locals: dict[int, Local | None] = {}
        self._read()

    def intervals(self, low: Tensor, high: Tensor, tighten: Callable[[int, Tensor, Tensor], Intervals]) -> Tensor:
        """Interval arithmetic from pixels ``(B, C, H, W)`` to logits, with each block's result offered to ``tighten``.

        Args:
            tighten: block, bounds ``(B, n)`` -> bounds that hold as well and are no looser.

        Returns:
            Least logits ``(B, K)``.
        """
        results: dict[fx.Node, Any] = {}
        block = 0
        for node in self._graph.nodes:
            args, options = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            if node.op == "placeholder":
                results[node] = Intervals.between(low, high)
            elif node.op == "get_attr":
                results[node] = constant_of(self.model, node)
            elif node.op == "output":
                return tighten(block, *args[0].flat()).low
            elif (kink := self._kink(node)) is not None:
                tightened = tighten(block, *args[0].flat()).shaped(self.blocks[block].shape)
                results[node] = kink.intervals(tightened)
                block += 1
            else:
                results[node] = spread(node, self._callable(node), args, options, self._spreads)
        raise AssertionError("a traced graph ends with its output")

    def logits(self, images: Tensor) -> Tensor:
        """Of images ``(B, C, H, W)``: ``(B, K)``."""
        with torch.no_grad():
            logits: Tensor = self.model(images)
        return logits

    def run(self, images: Tensor, at_kink: Callable[[int, Tensor], Tensor]) -> Tensor:
        """A forward pass in which ``at_kink(kink, inputs (B, ...))`` takes every kink's place.

        Args:
            images: ``(B, C, H, W)`` float64.

        Returns:
            Logits ``(B, K)``.
        """
        results: dict[fx.Node, Any] = {}
        kinks = 0
        for node in self._graph.nodes:
            args, options = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            if node.op == "placeholder":
                results[node] = images
            elif node.op == "get_attr":
                results[node] = constant_of(self.model, node)
            elif node.op == "output":
                logits: Tensor = args[0]
                return logits
            elif self._kink(node) is not None:
                results[node] = at_kink(kinks, args[0])
                kinks += 1
            else:
                results[node] = self._callable(node)(*args, **options)
        raise AssertionError("a traced graph ends with its output")

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

    def _read(self) -> None:
        results: dict[fx.Node, Any] = {}
        stages: dict[fx.Node, frozenset[int]] = {}
        leaves: list[Tensor] = []

        def stage(shape: tuple[int, ...]) -> Tensor:
            leaves.append(torch.zeros(1, *shape, dtype=torch.float64, device=self.device, requires_grad=True))
            return leaves[-1]

        def close(value: object, used: frozenset[int]) -> None:
            if not isinstance(value, Tensor) or not used:
                raise _refusal("a kink or an output of what is no tensor of the image")
            if not value.isfinite().all():
                raise InputError("expected finite weights, got NaN or inf; check them (did training diverge?)")
            sources = tuple(sorted(used))
            self.blocks.append(Block(sources, value, tuple(leaves[source] for source in sources)))

        for node in self._graph.nodes:
            used = frozenset[int]().union(*(stages[one] for one in node.all_input_nodes))
            args, options = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            kink = self._kink(node)
            if node.op == "placeholder":
                results[node], stages[node] = stage(self.shape), frozenset({0})
            elif node.op == "get_attr":
                results[node], stages[node] = constant_of(self.model, node), used
            elif node.op == "output":
                close(args[0], used)
            elif kink is not None:
                close(args[0], used)
                self.kinks.append(kink)
                results[node], stages[node] = stage(kink.shape(self.blocks[-1].shape)), frozenset({len(self.kinks)})
            else:
                self._check(node, stages)
                try:
                    with torch.enable_grad():
                        results[node] = self._callable(node)(*args, **options)
                except Exception as error:
                    raise _refusal(f"{one_line(error)} in {node.name} on images of shape {self.shape}") from error
                # a size is the same for every image
                stages[node] = used if isinstance(results[node], Tensor | tuple | list) else frozenset()

    def _kink(self, node: fx.Node) -> Kink | None:
        if node.op == "call_module":
            return kink_of_module(self.model.get_submodule(str(node.target)))
        return kink_of_call(name_of(node), node) if node.op in ("call_function", "call_method") else None

    def _callable(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))
        # an addition in place would change a leaf
        function: Any = torch.add if name_of(node) == "iadd" else function_of(node)
        return function  # type: ignore[no-any-return]

    def _check(self, node: fx.Node, stages: dict[fx.Node, frozenset[int]]) -> None:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if not isinstance(module, LAYERS) and not is_normalize(module):
                raise _refusal(f"the layer {node.target}: {type(module).__name__}")
            return
        name = name_of(node)
        if name not in AFFINE | PRODUCTS:
            raise _refusal(f"the operation {name}")
        moving = [isinstance(one, fx.Node) and bool(stages[one]) for one in node.args]
        if "alpha" in node.kwargs:
            raise _refusal(f"the operation {name} with alpha")
        if name in PRODUCTS and (sum(moving) > 1 or ("div" in name and moving[-1])):
            raise _refusal(f"the operation {name} of two results of the image")


def _refusal(what: str) -> InputError:
    return InputError(f"expected a network of {_SUPPORTED}, got {what}; linear bounds cannot be had of it")
