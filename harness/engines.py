"""Engines by the names that the command line gives them."""

from __future__ import annotations

import torch

from harness.options import ConfigError
from harness.tasks import Engine, InProcess
from harness.workers import Workers


def create_engine(
    name: str, workers: int, device: torch.device, *, gpus: float = 0.0, threads: int | None = None
) -> Engine:
    """The engine asked for: ``local`` with 0 workers is this process, with more so many processes; ``ray`` is Ray's.

    Args:
        device: where the network is.
        gpus: for each task on Ray.
        threads: of each worker; by default a local one has its share of the cores, one on Ray 1.

    Raises:
        ConfigError: GPUs for workers that are not Ray's, none for Ray's beside a network on one, or no such cluster.
    """
    if name == "ray":
        if device.type == "cuda" and not gpus:
            raise ConfigError(
                "expected --gpus-per-worker for Ray's tasks beside a network on CUDA, got 0; give it, such as 0.5, or "
                "--device cpu"
            )
        # here, as Ray is an extra
        from harness.on_ray import OnRay

        return OnRay(workers, gpus=gpus, threads=threads)
    if gpus:
        raise ConfigError(
            f"expected --gpus-per-worker with --engine ray, got {gpus:g} with {name}; local workers share the GPUs of "
            "--device cuda in turn: leave it out"
        )
    return Workers(workers, threads=threads) if workers else InProcess()
