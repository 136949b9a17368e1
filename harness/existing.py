"""Checkpoints that another training left, by epoch."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from harness.options import ConfigError

NUMBER = re.compile(r"\d+")
# epochs are in file names; a larger number there is a step or a date
LARGEST = 1_000_000


def existing_checkpoints(pattern: str) -> dict[int, Path]:
    """Files that a pattern such as ``ckpt/*.safetensors`` matches, by epoch, in order.

    The epoch is the last number in a file's name before its suffix (``epoch-010.pt``, ``model_10.safetensors``).

    Raises:
        ConfigError: no file, a name without a number, or a number twice.
    """
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not paths:
        raise ConfigError(f"expected files that --checkpoints matches, got none for {pattern!r}; quote the pattern")
    found: dict[int, Path] = {}
    for path in paths:
        numbers = NUMBER.findall(path.stem)
        if not numbers or int(numbers[-1]) > LARGEST:
            raise ConfigError(f"expected an epoch in the name of every checkpoint, got {path.name}; rename it")
        epoch = int(numbers[-1])
        if epoch in found:
            raise ConfigError(
                f"expected one checkpoint an epoch, got {found[epoch].name} and {path.name}; narrow --checkpoints"
            )
        found[epoch] = path
    return dict(sorted(found.items()))
