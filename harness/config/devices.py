"""The device of a run, batch sizes that depend on it, and settings of the whole process."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import nn

from attacks.isolation.unwrapping import unwrapped
from harness.config.options import ConfigError
from harness.config.run_config import RunConfig


def choose_device(name: str) -> torch.device:
    """The device of a name: ``auto`` (CUDA if available), ``cpu`` or ``cuda[:i]``.

    Raises:
        ConfigError: another name, or a CUDA device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"expected --device auto, cpu or cuda[:i], got {name!r}; choose one") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected --device auto, cpu or cuda[:i], got {name!r}; choose one")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"expected a CUDA device for --device {name}, got {count} of them; use --device cpu")
    return device


def sized(config: RunConfig, device: torch.device) -> RunConfig:
    """The configuration with ``measure_batch`` set; a given value is kept.

    On the CPU the default is 128. Of 16 to 200 images per pass, 100 to 200 are the fastest on a small convolutional
    network: smaller batches pay the overhead of each call, larger ones fall out of the cache. On CUDA the default is
    all images of a split; the batch is halved when memory runs out.
    """
    default = config.probe if device.type == "cuda" else 128
    return dataclasses.replace(config, measure_batch=config.measure_batch or default)


def device_of(model: nn.Module) -> torch.device:
    """The device of the network's first parameter or buffer; the CPU for a network without either."""
    network = unwrapped(model)
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def set_up(config: RunConfig) -> None:
    """Apply the run's threads and determinism to the whole process."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads the variable when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
