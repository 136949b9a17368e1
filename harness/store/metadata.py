"""Read the facts in a file's metadata."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from harness.store.identity import FORMAT, check_regular, expanded, header_of
from harness.store.tensors import trainer_and_facts


def facts_of(path: Path) -> dict[str, str]:
    """The facts in a file's metadata, without reading the rest; empty if they cannot be read.

    Raises:
        StoreError: the path is a pipe, a socket, a device or a folder.
    """
    check_regular(path)
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
            return {key.decode(): value.decode() for key, value in metadata.items() if key.decode() not in FORMAT}
        if path.suffix == ".safetensors":
            return expanded(header_of(path).get("__metadata__", {}))
        return trainer_and_facts(path)[1]
    except Exception:  # reading the whole file later reports the error
        return {}
