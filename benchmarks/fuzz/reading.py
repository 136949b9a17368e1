"""What a reader is, and when two of its results are the same."""

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
    """One kind of file.

    Attributes:
        make: writes a whole one into an empty folder and returns its path.
        read: reads what lies at a path; `fingerprint` tells two results apart.
        refuses: what it may raise, in one line.
        checked: a damaged file that is read has to give the same as the whole one.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    checked: bool = False


def fingerprint(value: object) -> str:
    """A text that is the same for equal values of what readers return."""
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
