"""Freeze a network for attacks: a copy that shares the caller's weights, or the caller's network, later restored."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from attacks.input_gradient import quicken
from attacks.isolation.snapshot import Snapshot
from attacks.isolation.unwrapping import check_whole, innermost, run_by_copies, unwrapped

# ids of modules and parameters that are frozen in place -> the thread that uses them
_TAKEN: dict[int, int] = {}
_TURN = threading.Condition()


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the network of ``model`` in eval mode, without gradients of weights and uncompiled.

    The network is a copy that shares the parameters' storage if the model can be copied. Otherwise it is the model
    itself, which no other thread may use meanwhile; threads that freeze it wait for each other.

    Raises:
        InputError: see `check_whole`.
    """
    check_whole(model)
    network = None
    if not run_by_copies(model):
        try:
            network = _frozen_copy(unwrapped(model))
        except Exception:
            network = None  # not every module can be copied (non-leaf tensors, locks, open handles)
    with ExitStack() as stack:
        stack.enter_context(_COMPILER.eager())
        if network is None:
            stack.enter_context(_alone(model))
            network = stack.enter_context(_frozen_in_place(model))
        yield network


def _frozen_copy(network: nn.Module) -> nn.Module:
    # autograd refuses to save tensors that were made in inference mode
    plain = {id(p): p.clone() if p.is_inference() else p.detach() for p in network.parameters()}
    shared = {key: nn.Parameter(p, requires_grad=False) for key, p in plain.items()}
    frozen_copy = copy.deepcopy(network, dict[int, object](shared)).eval()
    quicken(frozen_copy)
    return frozen_copy


@contextmanager
def _frozen_in_place(model: nn.Module) -> Iterator[nn.Module]:
    before = Snapshot(model)
    try:
        model.eval()
        for p in model.parameters():
            p.requires_grad_(False)
            # an attack that computes gradients of weights would add them to the caller's
            p.grad = None
        for module in list(model.modules()):
            for name, child in module._modules.items():
                module._modules[name] = None if child is None else innermost(child)
        network = innermost(model)
        quicken(network)
        yield network
    finally:
        before.restore()


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread has any of the model's modules or parameters frozen in place."""
    ids, thread = {id(part) for part in (*model.modules(), *model.parameters())}, threading.get_ident()
    with _TURN:
        _TURN.wait_for(lambda: all(_TAKEN.get(key, thread) == thread for key in ids))
        taken = ids - _TAKEN.keys()
        _TAKEN.update(dict.fromkeys(taken, thread))
    try:
        yield
    finally:
        with _TURN:
            for key in taken:
                del _TAKEN[key]
            _TURN.notify_all()


class _Stance:
    """Disables torch's compiler while any thread measures: compiled graphs allow one backward pass only."""

    def __init__(self) -> None:
        self._users, self._lock = 0, threading.Lock()
        self._eager = ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled
            yield
            return
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._eager.close()


_COMPILER = _Stance()
