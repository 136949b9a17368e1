"""Where to compute."""

from __future__ import annotations

import torch
from torch import nn

from harness.config import ConfigError


def choose_device(name: str) -> torch.device:
    """The device asked for: ``auto``, ``cpu`` or ``cuda[:i]``.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"expected --device auto, cpu or cuda[:i], got {name!r}; choose one") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected --device auto, cpu or cuda[:i], got {name!r}; choose one")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"expected a CUDA device for --device {name}, got {there} of them; use --device cpu")
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for one without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
