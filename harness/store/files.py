"""Write files atomically, and delete what killed writers left."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from attacks.types import one_line
from harness.store.identity import StoreError

# names of safetensors' own temporary files, and the folders that can contain them
SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
OF_TENSORS = ("probes", "checkpoints", "witnesses", "shards", "unsound")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: ``write`` fills a temporary file, which is synced and renamed to ``path``.

    Raises:
        StoreError: the file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {one_line(error, most=200)}; make room or give permission, then resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # some systems cannot open a directory for syncing
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing an existing one."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed writers; only for the one process that writes to the folder."""
    for temporary in folder.rglob(".*tmp*"):
        of_safetensors = temporary.relative_to(folder).parts[0] in OF_TENSORS and SAFETENSORS.fullmatch(temporary.name)
        if temporary.suffix == ".tmp" or of_safetensors:
            with contextlib.suppress(OSError):
                temporary.unlink()
