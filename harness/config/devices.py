"""Where to compute."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from attacks.isolation.unwrapping import unwrapped
from harness.config.options import ConfigError
from harness.config.run_config import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


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


def sized(config: RunConfig, device: torch.device) -> RunConfig:
    """The same with the images a pass of measuring, where it leaves that open.

    On the CPU 128: of 16 to 200, 100 to 200 are the fastest on a small convolutional network, smaller ones by what each
    call costs, larger ones by what falls out of the cache. On CUDA all images of a split, halved where memory runs out.
    """
    chosen = config.probe if device.type == "cuda" else 128
    return dataclasses.replace(config, measure_batch=config.measure_batch or chosen)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer of the network is; the CPU for one without either."""
    network = unwrapped(model)
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def set_up(config: RunConfig) -> None:
    """Settings of the whole process, which belongs to this command."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
