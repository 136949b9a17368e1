"""Tasks and networks on their way to another process of the same run.

They are pickled, as they are objects of any class; nothing that is read from a file ever is.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import cast

from torch import nn

from harness.tasks import EngineError, Outcome, ProcessSettings, Task, run_task


def packed_model(model: nn.Module, dumps: Callable[[object], bytes] = pickle.dumps) -> bytes:
    """A model for another process.

    Args:
        dumps: a pickler.

    Raises:
        EngineError: it cannot be sent.
    """
    try:
        return dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise EngineError(
            f"expected a model that can be sent to another process, got {type(model).__name__}: {error}; define it and "
            "its parts at the top of a module, or measure without workers"
        ) from None


def packed_task(task: Task) -> bytes:
    """A task for another process: of its images, not all that they were cut from."""
    start = None if task.start is None else task.start.clone()
    try:
        return pickle.dumps(replace(task, images=task.images.clone(), start=start))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise EngineError(
            f"expected an estimator that can be sent to another process, got {task.unit.estimator}: {error}; define it "
            "at the top of a module, or measure without workers"
        ) from None


def measured(network: bytes, task: bytes, device: str, settings: ProcessSettings) -> Outcome:
    """In the other process: measure the task's images with the network."""
    settings.apply()
    return run_task(_unpacked(network, device), cast(Task, pickle.loads(task)))


# an epoch has one network, and many tasks
@lru_cache(maxsize=1)
def _unpacked(network: bytes, device: str) -> nn.Module:
    return cast(nn.Module, pickle.loads(network)).to(device)
