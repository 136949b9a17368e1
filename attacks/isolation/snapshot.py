"""Snapshots of a network's weights, buffers, flags and attributes, to restore them."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Snapshot:
    """The modules' classes and attributes, and copies of the parameters' and buffers' values.

    `restore` compares all values, which takes about a millisecond per million parameters on the CPU.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self._classes = [(module, type(module)) for module in modules]
        # `vars` holds the registered tensors, modules and hooks in dicts, which stay the same objects
        dicts = [vars(module) for module in modules]
        dicts += [value for held in dicts for value in held.values() if isinstance(value, dict)]
        self._dicts = [(held, dict(held)) for held in dicts]
        lists = [value for module in modules for value in vars(module).values() if isinstance(value, list)]
        self._lists = [(held, list(held)) for held in lists]
        self._parameters = [(p, p.requires_grad, p.grad, _Value(p)) for p in network.parameters()]
        self._buffers = [_Value(buffer) for buffer in network.buffers()]

    def restore(self) -> bool:
        """Restore everything that has changed; returns whether values of parameters had changed."""
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for held, kept in self._dicts:
            if len(held) != len(kept) or (kept and not _same_items(held, kept)):
                held.clear()
                held.update(kept)
        for items, before in self._lists:
            if len(items) != len(before) or not all(map(is_, items, before)):
                items[:] = before
        # values before flags: a leaf that requires a gradient cannot be written
        changed = [value.restore() for _, _, _, value in self._parameters]
        for parameter, wanted, gradient, _ in self._parameters:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for buffer in self._buffers:
            buffer.restore()
        return any(changed)


class _Value:
    """A tensor, its memory, and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory, self.copy = tensor, tensor.data, tensor.detach().clone()

    def restore(self) -> bool:
        """Restore the value in the original memory; returns whether it had changed."""
        changed = not _same(self.tensor.detach(), self.copy)
        if not _same_place(self.tensor, self.memory):
            self.tensor.data = self.memory
        # through `data`, which keeps graphs valid whose backward pass the caller has yet to run
        if changed and not _same(self.memory, self.copy):
            self.memory.copy_(self.copy)
        return changed


def _same_items(held: dict[Any, Any], kept: dict[Any, Any]) -> bool:
    return all(map(is_, held.values(), kept.values())) and list(held) == list(kept)


def _same_place(one: Tensor, other: Tensor) -> bool:
    return _form(one) == _form(other) and (
        one.layout is not torch.strided or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the bits are equal, so that NaN equals itself."""
    return _form(one) == _form(other) and torch.equal(_bits(one), _bits(other))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _bits(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    if dense.is_quantized:
        return dense.int_repr()
    return dense.contiguous().flatten().view(INTEGERS[dense.element_size()])
