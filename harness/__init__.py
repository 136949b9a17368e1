"""Track margins of images while a network trains.

Names load on first use, so that ``python -m harness.track --help`` needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.measuring.rows import measure_margins
    from harness.tracking.tracker import MarginTracker


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

_HOME = {"MarginTracker": "harness.tracking.tracker", "measure_margins": "harness.measuring.rows"}

__all__ = ["MarginTracker", "measure_margins"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
