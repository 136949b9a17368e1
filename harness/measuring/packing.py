"""Pickle tasks and networks for another process of the same run.

Tasks hold objects of any class. Nothing that is read from a file is ever unpickled.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import nn

from attacks.isolation.unwrapping import run_by_copies, unwrapped
from attacks.types import one_line
from harness.config.devices import device_of
from harness.tasks import EngineError, Outcome, ProcessSettings, Task, run_task

Pickler = Callable[[object], bytes]


def packed_model(model: nn.Module, dumps: Pickler = pickle.dumps) -> bytes:
    """A model for another process, without wrappers and on the CPU, as that may have other devices.

    Raises:
        EngineError: it cannot be sent.
    """
    network = unwrapped(model)
    if function := run_by_copies(network):
        raise EngineError(
            f"expected a model that can be sent to another process, got {type(network).__name__} with {function}, a "
            "function that runs the model which is here; make it a method of the class, or measure without workers"
        )
    try:
        return dumps(network if device_of(network).type == "cpu" else copy.deepcopy(network).cpu())
    except Exception as error:  # picklers raise many kinds
        raise EngineError(
            f"expected a model that can be sent to another process, got {type(model).__name__}: {one_line(error)}; "
            "define it and its parts at the top of a module, or measure without workers"
        ) from None


def packed_task(task: Task, dumps: Pickler = pickle.dumps) -> bytes:
    """A task for another process: of its images, not all that they were cut from.

    Raises:
        EngineError: its estimator cannot be sent.
    """
    start = None if task.start is None else task.start.clone()
    try:
        return dumps(replace(task, images=task.images.clone(), start=start))
    except Exception as error:
        raise EngineError(
            f"expected an estimator that can be sent to another process, got {task.unit.estimator}: {one_line(error)}"
            "; define it at the top of a module, or measure without workers"
        ) from None


class Packed:
    """A network that arrived packed; it is unpacked once for a device."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._network: nn.Module | None = None
        self._device = ""

    def answer(
        self, task: bytes, device: str, settings: ProcessSettings, on_begin: Callable[[], object] = lambda: None
    ) -> bytes:
        """The packed `Outcome` of a packed task, or what it raised, as an exception that can be sent.

        Args:
            on_begin: called when all is unpacked, before the estimator.
        """
        try:
            return pickle.dumps(self.measured(task, device, settings, on_begin))
        except Exception as error:
            return pickle.dumps(sendable(error))

    def measured(
        self, task: bytes, device: str, settings: ProcessSettings, on_begin: Callable[[], object] = lambda: None
    ) -> Outcome:
        """Measure a packed task's images with the network.

        Raises:
            EngineError: the network or the estimator is of a class that is not here.
        """
        settings.apply()
        try:
            if self._network is None or self._device != device:
                self._network, self._device = cast(nn.Module, pickle.loads(self.content)).to(device), device
            unpacked = cast(Task, pickle.loads(task))
        except (AttributeError, ImportError) as error:
            raise EngineError(
                f"expected workers that can import the model and the estimator, got {one_line(error)}; define them "
                "in a module (a notebook is not one), or measure without workers"
            ) from error
        on_begin()
        return run_task(self._network, unpacked)


def sendable(error: Exception) -> Exception:
    """The exception itself, or one in its place where it does not come back from a pickle."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return EngineError(f"expected margins, got {one_line(error)} in a worker; fix it, or measure without workers")
