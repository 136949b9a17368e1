"""Compare what a file says of itself with its place in the run folder, and refuse what cannot be a file of a run."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# what a file is, which its place says too (see `harness.store.places.Place`)
IDENTITY = ("kind", "run", "epoch", "unit", "split")
FACTS_OF = "facts"  # the entry of a safetensors file that holds all of them, where the library writes no others
HEADER = 100_000_000  # bytes of a safetensors header, at most, as that library has it
ENTRY = 1_000  # of which a tensor takes less


class StoreError(ValueError):
    """A run folder that cannot be used as asked; the message is one line that says what to do."""


def check_regular(path: Path) -> None:
    """Refuse a pipe, socket, device or folder in the place of a file: opening one may wait for ever.

    Raises:
        StoreError: names it.
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
    """Refuse a file that says of itself that it is another one than its place says.

    What a file does not say, as one of version 0.1.0, is not compared.

    Raises:
        StoreError: names what both say.
    """
    other = [name for name in IDENTITY if name in facts and facts[name] != place.get(name, facts[name])]
    if other:
        # the first digits tell a digest
        short = [{**said, "run": said.get("run", "")[:12]} for said in (place, facts)]
        wanted, got = (", ".join(f"{name} {said[name]}" for name in other) for said in short)
        raise StoreError(f"expected {wanted} at {path}, got {got}; put the right file there, or delete it and --resume")


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors by name, and ``__metadata__``.

    Raises:
        ValueError: damaged.
    """
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        found = json.loads(handle.read(length)) if length <= HEADER else None
    if not isinstance(found, dict) or not isinstance(found.get("__metadata__", {}), dict):
        raise ValueError("not a safetensors header")
    return found


def expanded(metadata: Mapping[str, object]) -> dict[str, str]:
    """The facts in the metadata of a safetensors file.

    Raises:
        ValueError: damaged.
    """
    found = json.loads(str(metadata[FACTS_OF])) if FACTS_OF in metadata else metadata
    if not isinstance(found, Mapping):
        raise ValueError("facts of no names")
    return {str(name): str(value) for name, value in found.items()}


def check_tensors(path: Path, most: int) -> None:
    """Refuse a safetensors file with more tensors than it can have: reading each costs time.

    Raises:
        StoreError: its header is longer than that many tensors need; or it is a pipe, a socket, a device or a folder.
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
