"""A reader of files, and fingerprints that distinguish its results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn


@dataclass(frozen=True)
class Reader:
    """A kind of file and the function that reads it.

    Attributes:
        make: writes an undamaged file into an empty folder and returns its path.
        read: reads the file at a path.
        refuses: the errors that it may raise, with a message of one line.
        checked: the file has checksums, so a damaged file must be refused or give the values of the undamaged one.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    checked: bool = False


def corpus_name(name: str) -> str:
    """Return the name of a reader's folder in the corpus."""
    return name.replace(" ", "-").replace("'", "").replace(",", "")


def fingerprint(value: object) -> str:
    """Return a text that is equal for equal values of the types that readers return."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        content = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(content).hexdigest()}"
    if isinstance(value, nn.Module):
        return fingerprint(dict(value.state_dict()))
    if isinstance(value, pd.DataFrame):
        return value.to_csv(index=False, float_format="%r")
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{fingerprint(one)}" for key, one in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(fingerprint, value)) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fingerprint({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return repr(value)
