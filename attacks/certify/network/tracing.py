"""Record a model's forward pass on one image as ATen operations, with hooks run and in-place operations made pure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.input_gradient import unquicken
from attacks.isolation.outputs import as_logits
from attacks.isolation.unwrapping import check_whole, run_by_copies, unwrapped
from attacks.types import InputError, one_line

# The result depends on the argument's shape only.
_CONSTANT = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero"}
)
# The result equals the argument: autograd would lose the dependence, or there is nothing to compute.
_SAME = frozenset({"detach", "alias", "lift_fresh", "clone"})
# `view` requires strides that the arguments of a batch may not have
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_EXACT = (torch.float32, torch.float64)


class Untraceable(Exception):
    """An operation whose result a graph of operations cannot describe; the message names it and its layer."""


@dataclass(frozen=True)
class Value:
    """Output number ``output`` of operation number ``operation``; operation -1 is the image."""

    operation: int
    output: int = 0


@dataclass(frozen=True)
class Operation:
    """One ATen operation that depends on the image.

    Attributes:
        function: the callable that computes it. name: without the overload, such as ``convolution``.
        args, options: its arguments, with a `Value` in the place of every tensor that depends on the image.
        layer: the module that computed it, such as ``2: Sigmoid``; empty for the model's own forward method.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    layer: str

    @cached_property
    def values(self) -> tuple[Value, ...]:
        """The arguments that depend on the image, each once."""
        values: dict[Value, None] = {}
        filled((self.args, tuple(self.options.values())), lambda value: values.setdefault(value))
        return tuple(values)

    @property
    def place(self) -> str:
        """The operation and its layer, for messages."""
        return f"the operation {self.name} in " + (f"the layer {self.layer}" if self.layer else "the forward pass")

    def __call__(self, results: Callable[[Value], Any]) -> Any:
        """Compute the operation with ``results`` in the place of its values."""
        args, options = filled(self.args, results), filled(tuple(self.options.values()), results)
        return self.function(*args, **dict(zip(self.options, options, strict=True)))

    def of_batch(self, parts: Mapping[Value, Tensor]) -> Any:
        """Compute the operation for B images independently; arguments and results gain a leading batch dimension."""

        def of_one(*tensors: Tensor) -> Any:
            return self(dict(zip(parts, tensors, strict=True)).__getitem__)

        return torch.vmap(of_one)(*parts.values())


@dataclass(frozen=True)
class Recording:
    """The operations that the logits depend on, in order, and the logits."""

    operations: tuple[Operation, ...]
    logits: Value

    def differs(self, other: Recording) -> str:
        """The place of the first operation that differs from another image's recording; '' if there is none."""
        for mine, its in zip_longest(self.operations, other.operations):
            if mine is None or its is None or mine.name != its.name:
                return (mine or its).place
            if not _equal((mine.args, tuple(mine.options.items())), (its.args, tuple(its.options.items()))):
                return str(mine.place)
        return "" if self.logits == other.logits else "the logits"

    def replay(self, image: Any, compute: Callable[[int, Operation, Callable[[Value], Any]], Any]) -> Any:
        """Evaluate the recorded graph with another meaning of values, such as intervals.

        Args:
            image: takes the place of the image ``(1, C, H, W)``.
            compute: (number of the operation, the operation, look-up of its arguments) -> its result.

        Returns:
            The result in the place of the logits ``(1, K)``.
        """
        results: dict[int, Any] = {-1: image}

        def look_up(value: Value) -> Any:
            result = results[value.operation]
            return result[value.output] if isinstance(result, tuple | list) else result

        for number, operation in enumerate(self.operations):
            results[number] = compute(number, operation, look_up)
        return look_up(self.logits)


def record(model: nn.Module, image: Tensor) -> Recording:
    """Run the model on an image and record the operations.

    Args:
        model: see `evaluation_copy`. image: ``(1, C, H, W)`` float64, in the model's units.

    Raises:
        Untraceable: the path through the model depends on the image's values, or a result is drawn at random.
        Exception: any exception that the model raises.
    """
    recorder = _Recorder(image)
    # a model may change its input in place
    forward = functionalize(lambda pixels: as_logits(model(pixels.clone())))
    with torch.no_grad(), recorder.layers_of(model), recorder:
        logits = forward(image)
    return recorder.recording(logits)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd, after in-place operations and views were made pure."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Tensors are kept alive: the id of a freed one could be reused.
        self._known: dict[int, tuple[Tensor, Value]] = {id(image): (image, Value(-1))}
        self._operations: list[Operation] = []
        self._layers: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and torch would take seconds to load its compiler
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func is torch.ops.aten.copy.default:
            # the overwritten values do not matter
            func, args, options = torch.ops.aten.expand.default, (args[1], list(result.shape)), {}
        operation = Operation(
            torch.reshape if func in _VIEWS else func,
            "reshape" if func in _VIEWS else func.overloadpacket.__name__,
            self._marked(tuple(args)),
            {key: self._marked(value) for key, value in options.items()},
            self._layers[-1] if self._layers else "",
        )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untraceable(f"{operation.place}, which draws at random")
        if not operation.values or operation.name in _CONSTANT:
            return result
        if operation.name == "fill" and not isinstance(operation.args[1], Value):
            return result
        if func._schema.is_mutable:
            # other operations may read that tensor, which does not count as depending on the image
            raise Untraceable(f"{operation.place}, in place on a constant")
        if operation.name in _SAME or (operation.name == "_to_copy" and result.dtype in _EXACT):
            self._keep(result, operation.values[0])
            return result
        for output, tensor in enumerate(result if isinstance(result, tuple | list) else (result,)):
            if not isinstance(tensor, Tensor):
                raise Untraceable(f"{operation.place}, which makes a number of the image's values")
            self._keep(tensor, Value(len(self._operations), output))
        self._operations.append(operation)
        return result

    @contextmanager
    def layers_of(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that computes; the model's own hooks count as part of their module."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                enter = partial(self._enter, f"{name}: {type(module).__name__}" if name else "")
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def recording(self, logits: object) -> Recording:
        """The recorded operations that these logits depend on, renumbered."""
        if not isinstance(logits, Tensor):
            raise Untraceable(f"{type(logits).__name__} as the result")
        if id(logits) not in self._known:
            raise Untraceable("logits that do not depend on the image through recorded operations")
        end = self._known[id(logits)][1]
        needed, pending = set[int](), [end.operation]
        while pending:
            number = pending.pop()
            if number >= 0 and number not in needed:
                needed.add(number)
                pending += [value.operation for value in self._operations[number].values]
        place = {number: new for new, number in enumerate(sorted(needed))} | {-1: -1}

        def moved(value: Value) -> Value:
            return Value(place[value.operation], value.output)

        kept = [self._operations[number] for number in sorted(needed)]
        renumbered = [
            Operation(
                operation.function,
                operation.name,
                filled(operation.args, moved),
                {key: filled(value, moved) for key, value in operation.options.items()},
                operation.layer,
            )
            for operation in kept
        ]
        return Recording(tuple(renumbered), moved(end))

    def _enter(self, layer: str, module: nn.Module, args: object) -> None:
        self._layers.append(layer)

    def _leave(self, module: nn.Module, args: object, result: object) -> None:
        self._layers.pop()

    def _keep(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = tensor, value

    def _marked(self, argument: Any) -> Any:
        """The argument with `Value` in the place of tensors that depend on the image, constants in float64."""
        if isinstance(argument, Tensor):
            if id(argument) in self._known:
                return self._known[id(argument)][1]
            return argument.double() if argument.is_floating_point() else argument
        return type(argument)(map(self._marked, argument)) if isinstance(argument, tuple | list) else argument


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
        return same and bool(((value == other) | ((value != value) & (other != other))).all())
    if isinstance(value, tuple | list):
        return isinstance(other, tuple | list) and len(value) == len(other) and all(map(_equal, value, other))
    return bool(value == other)


def filled(argument: Any, results: Callable[[Value], Any]) -> Any:
    """An argument, such as a nested list, with ``results(value)`` in the place of every `Value`."""
    if isinstance(argument, Value):
        return results(argument)
    if isinstance(argument, tuple | list):
        return type(argument)(filled(item, results) for item in argument)
    return argument


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in float64, on the CPU and in evaluation mode, that shares nothing with the caller's.

    Raises:
        InputError: it cannot be copied.
    """
    check_whole(model)
    network = unwrapped(model)
    if place := run_by_copies(network):
        raise InputError(
            f"expected a model that can be copied, got {place}, a function that would compute with the original's "
            "weights; define it in a class"
        )
    try:
        duplicate = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
    except Exception as error:
        raise InputError(
            f"expected a model that can be copied, got {one_line(error, most=200)}; build it of plain layers"
        ) from error
    unquicken(duplicate)
    return duplicate
