"""Unwrap networks from torch's wrappers, and detect networks that cannot be copied or measured."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attacks.types import InputError

# class -> attribute that holds the network; by name, as importing the classes takes seconds
WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
SHARDED = "torch.distributed.fsdp."
# attributes of every module that hold no functions, and that of `Module.compile`, which is not copied
REGISTERED = frozenset(
    {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"}
)
PLAIN = (bool, int, float, str, bytes, type(None), Tensor)
# the most objects that are followed from one attribute, and the most items of a container
OBJECTS, ITEMS = 5000, 1000


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without compiled, DataParallel, DistributedDataParallel and AveragedModel wrappers, at any depth.

    Tensors are shared with ``model``, which stays as it is. A network without wrappers is returned itself.
    """
    network = innermost(model)
    return _bared(network, {}) if any(_place(type(module)) for module in network.modules()) else network


def innermost(model: nn.Module) -> nn.Module:
    """The network inside the wrappers around ``model``; its modules may be wrapped too."""
    while place := _place(type(model)):
        model = getattr(model, place)
    return model


def _place(kind: type) -> str:
    """The attribute in which a module of this class wraps another; '' if the class is not a wrapper."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((WRAPPERS[name] for name in names if name in WRAPPERS), "")


def _bared(model: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A module with the same attributes and tensors, without wrappers at any depth."""
    model = innermost(model)
    if id(model) not in done:
        # parametrized modules do not support `copy.copy`
        done[id(model)] = shell = object.__new__(type(model))
        modules = {name: None if child is None else _bared(child, done) for name, child in model._modules.items()}
        vars(shell).update(vars(model) | {"_modules": modules})
    return done[id(model)]


def check_whole(model: nn.Module) -> None:
    """Refuse a model without all of its weights.

    Raises:
        InputError: lazy layers without weights yet, weights on the meta device, or sharded weights.
    """
    for name, module in model.named_modules():
        if any(f"{base.__module__}.".startswith(SHARDED) for base in type(module).__mro__):
            raise InputError(
                f"expected a model with all of its weights here, got sharded ones in {_layer(name, module)}; "
                "gather them into a plain model on one rank"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"expected a model with weights, got {name} of a lazy layer that has seen no image; "
                "call the model on a batch first"
            )
        if type(tensor).__module__.startswith("torch.distributed."):
            raise InputError(
                f"expected a model with all of its weights here, got {name} as a {type(tensor).__name__}; "
                "gather it into a plain model on one rank"
            )
        if tensor.is_meta:
            raise InputError(f"expected a model with weights, got {name} on the meta device; load its weights first")


def run_by_copies(model: nn.Module) -> str:
    """The first attribute through which a deep copy of the model would run the model itself; '' if there is none.

    Copying keeps functions as they are. A function that refers to a module or tensor of the model, such as a hook or
    ``model.forward = f``, runs the original model when the copy calls it.
    """
    ids = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in REGISTERED or isinstance(value, PLAIN) or (isinstance(value, dict) and not value):
                continue
            if (key == "forward" and isinstance(value, FunctionType)) or _leads_to(ids, value):
                return f"{name}.{key}" if name else key
    return ""


def _leads_to(ids: set[int], value: object) -> bool:
    """Whether a function in ``value`` refers to an object whose id is in ``ids``."""
    waiting, seen = [(value, False)], set[tuple[int, bool]]()
    while waiting:
        item, inside = waiting.pop()
        if (id(item), inside) in seen:
            continue
        seen.add((id(item), inside))
        if isinstance(item, weakref.ref):
            item, inside = item(), True
        if inside and (id(item) in ids or (isinstance(item, nn.Module) and _shares(ids, item))):
            return True
        if len(seen) > OBJECTS:
            return inside  # too many objects to decide; a wrong yes costs only the copy
        further = inside or isinstance(item, FunctionType)
        waiting += [
            (part, further) for part in _parts(item, inside) if further or not isinstance(part, (*PLAIN, nn.Module))
        ]
    return False


def _shares(ids: set[int], module: nn.Module) -> bool:
    return any(id(child) in ids for child in module.modules())


def _parts(item: object, inside: bool) -> Iterator[object]:
    """The objects that a container, a function or, inside a function, an object refers to."""
    if isinstance(item, dict | list | tuple | set | frozenset):
        if len(item) <= ITEMS:
            yield from item.values() if isinstance(item, dict) else item
    elif isinstance(item, MethodType):
        yield from (item.__func__, item.__self__)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, FunctionType):
        for cell in item.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
        yield from (item.__defaults__ or (), item.__kwdefaults__ or {}, vars(item))
        if not str(item.__globals__.get("__name__")).startswith("torch."):
            names = (item.__globals__.get(name) for name in _names(item.__code__))
            yield from (value for value in names if isinstance(value, nn.Module | FunctionType | MethodType))
    elif inside and not isinstance(item, type | ModuleType | nn.Module | Tensor):
        yield from getattr(item, "__dict__", {}).values()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _layer(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name}".strip()
