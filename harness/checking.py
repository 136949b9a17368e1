"""What is in a run folder is whole, also what going on with the run would not read."""

from __future__ import annotations

from harness.probes import read_probe
from harness.rows import read_bounds
from harness.store import RunFolder


def check_files(folder: RunFolder) -> None:
    """Read the parts that only a report or a longer run reads, against their checksums.

    Raises:
        StoreError: a damaged one, or one in another's place; names it.
    """
    for split in folder.probe_splits():
        read_probe(folder, split)
    for path in folder.witness_files():
        folder.load_tensors(path)
    for path in folder.bound_parts():
        read_bounds(folder, path)
