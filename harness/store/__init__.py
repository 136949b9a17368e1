"""The run folder: a manifest and immutable parts; the directory listing is the state."""

from harness.store.columns import BOUND_COLUMNS, MARGIN_COLUMNS
from harness.store.folder import LOCK, RunFolder
from harness.store.identity import StoreError
from harness.store.manifest import environment, now
from harness.store.places import Unit

__all__ = ["BOUND_COLUMNS", "LOCK", "MARGIN_COLUMNS", "RunFolder", "StoreError", "Unit", "environment", "now"]
