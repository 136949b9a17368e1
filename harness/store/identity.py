"""Check that a file belongs to its place in the run folder: its identity, file type and size of header."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# facts that identify a file; its path gives the same ones (see `harness.store.places.Place`)
IDENTITY = ("kind", "run", "epoch", "unit", "split")
# metadata entry of a safetensors file that holds all facts
FACTS_OF = "facts"
# metadata entries of a file: the checksum of its content, and those that pyarrow and pandas write
CHECKSUM = "sha256"
FORMAT = ("pandas", "ARROW:schema")
# largest header of a safetensors file in bytes (that library's limit); one tensor takes less than ENTRY of them
HEADER = 100_000_000
ENTRY = 1_000


class StoreError(ValueError):
    """A run folder that cannot be used as asked; the message is one line that says what to do."""


def check_regular(path: Path) -> None:
    """Check that a path is not a pipe, socket, device or folder; opening one could block forever.

    A missing file passes.

    Raises:
        StoreError: it is one; the message names the kind.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # the reader that opens it raises the error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        got = kinds.get(stat.S_IFMT(mode), "a device")
        raise StoreError(f"expected a file at {path}, got {got}; remove it and --resume")


def check_identity(path: Path, facts: Mapping[str, str], place: Mapping[str, str]) -> None:
    """Check that a file's facts agree with its place in the run folder.

    Args:
        facts: from the file's metadata. Missing ones, as in files of version 0.1.0, are not compared.
        place: the expected facts, from the path and the manifest.

    Raises:
        StoreError: they differ; the message names both.
    """
    other = [name for name in IDENTITY if name in facts and facts[name] != place.get(name, facts[name])]
    if other:
        # the first digits are enough of a digest
        short = [{**known, "run": known.get("run", "")[:12]} for known in (place, facts)]
        wanted, got = (", ".join(f"{name} {known[name]}" for name in other) for known in short)
        raise StoreError(f"expected {wanted} at {path}, got {got}; put the right file there, or delete it and --resume")


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors by name, and ``__metadata__``.

    Raises:
        ValueError: the header is damaged.
    """
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length)) if length <= HEADER else None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("not a safetensors header")
    return header


def expanded(metadata: Mapping[str, object]) -> dict[str, str]:
    """The facts in the metadata of a safetensors file.

    Raises:
        ValueError: the metadata is damaged.
    """
    facts = json.loads(str(metadata[FACTS_OF])) if FACTS_OF in metadata else metadata
    if not isinstance(facts, Mapping):
        raise ValueError("facts without names")
    return {str(name): str(value) for name, value in facts.items()}


def check_tensors(path: Path, most: int) -> None:
    """Check that a safetensors file's header is short enough for ``most`` tensors; reading each tensor costs time.

    Raises:
        StoreError: the header is longer; or the path is a pipe, a socket, a device or a folder.
    """
    check_regular(path)
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
    except OSError:
        return  # the reader of the whole file raises the error
    if path.stat().st_size >= length > most * ENTRY:
        raise StoreError(
            f"expected at most {most} tensors in {path}, got a header of {length} bytes; restore the file, or delete it"
        )
