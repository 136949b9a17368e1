"""Track margins of images while a network trains.

Names load on first use, so that ``python -m harness.track --help`` needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.measure import measure as measure
    from harness.loggers import Logger as Logger
    from harness.loggers import MLflow as MLflow
    from harness.loggers import TensorBoard as TensorBoard
    from harness.loggers import WandB as WandB
    from harness.loggers import create_logger as create_logger
    from harness.measuring.rows import measure_margins as measure_margins
    from harness.on_ray import OnRay as OnRay
    from harness.runs import Run as Run
    from harness.runs import read_run as read_run
    from harness.runs import read_runs as read_runs
    from harness.store import RunFolder as RunFolder
    from harness.store import StoreError as StoreError
    from harness.store import Unit as Unit
    from harness.tasks import Engine as Engine
    from harness.tasks import EngineError as EngineError
    from harness.tasks import InProcess as InProcess
    from harness.tasks import Outcome as Outcome
    from harness.tasks import Task as Task
    from harness.tracking.tracker import MarginTracker as MarginTracker
    from harness.workers import Workers as Workers


def _is_ours() -> bool:
    try:
        return importlib.util.find_spec("attacks.estimator") is not None
    except ModuleNotFoundError:  # a plain attacks.py
        return False


if not _is_ours():
    raise ImportError(
        f"expected margin-harness's package 'attacks', got {importlib.import_module('attacks').__file__}; "
        "another package of that name comes first on the path: remove it or start elsewhere"
    )

_HOME = {
    "Engine": "harness.tasks",
    "EngineError": "harness.tasks",
    "InProcess": "harness.tasks",
    "Logger": "harness.loggers",
    "MLflow": "harness.loggers",
    "MarginTracker": "harness.tracking.tracker",
    "OnRay": "harness.on_ray",
    "Outcome": "harness.tasks",
    "Run": "harness.runs",
    "RunFolder": "harness.store",
    "StoreError": "harness.store",
    "Task": "harness.tasks",
    "TensorBoard": "harness.loggers",
    "Unit": "harness.store",
    "WandB": "harness.loggers",
    "Workers": "harness.workers",
    "create_logger": "harness.loggers",
    "measure": "attacks.measure",
    "measure_margins": "harness.measuring.rows",
    "read_run": "harness.runs",
    "read_runs": "harness.runs",
}

__all__ = [
    "Engine",
    "EngineError",
    "InProcess",
    "Logger",
    "MLflow",
    "MarginTracker",
    "OnRay",
    "Outcome",
    "Run",
    "RunFolder",
    "StoreError",
    "Task",
    "TensorBoard",
    "Unit",
    "WandB",
    "Workers",
    "create_logger",
    "measure",
    "measure_margins",
    "read_run",
    "read_runs",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
