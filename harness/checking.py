"""What is in a run folder is whole, also what going on with the run would not read."""

from __future__ import annotations

from harness.files import load_tensors, read_part
from harness.store import RunFolder


def check_files(folder: RunFolder) -> None:
    """Read the parts that only a report or a longer run reads, against their checksums.

    Raises:
        StoreError: a damaged one; names it.
    """
    for pattern in ("probes/[!.]*.safetensors", "witnesses/epoch-*/[!.]*.safetensors"):
        for path in sorted(folder.path.glob(pattern)):
            load_tensors(path)
    for path in folder.bound_parts():
        read_part(path)
