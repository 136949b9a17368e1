"""The run folder: a manifest and immutable parts; the directory listing is the state."""

from harness.store.folder import BOUND_COLUMNS, LOCK, MARGIN_COLUMNS, RunFolder
from harness.store.identity import StoreError
from harness.store.manifest import environment, now
from harness.store.places import Unit

__all__ = ["BOUND_COLUMNS", "LOCK", "MARGIN_COLUMNS", "RunFolder", "StoreError", "Unit", "environment", "now"]
