"""Engines by the names that the command line gives them."""

from __future__ import annotations

import torch

from harness.config.options import ConfigError
from harness.tasks import Engine, InProcess
from harness.workers import Workers


def create_engine(
    name: str,
    workers: int,
    device: torch.device,
    *,
    gpus: float = 0.0,
    threads: int | None = None,
    unit_timeout: float | None = None,
) -> Engine:
    """The engine asked for: ``local`` with 0 workers is this process, with more so many processes; ``ray`` is Ray's.

    Args:
        device: where the network is.
        gpus: for each task on Ray.
        threads: of each worker; by default a local one has its share of the cores, one on Ray 1.
        unit_timeout: see `harness.workers.Workers`; with 0 workers it takes one, with the threads of this process.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: a unit timeout on Ray, GPUs for workers that are not Ray's, none for Ray's with a network on one,
            or no such cluster.
    """
    if name == "ray":
        if unit_timeout is not None:
            raise ConfigError(
                f"expected --unit-timeout with --engine local, got {unit_timeout:g} with ray; leave it out, or take "
                "--workers N"
            )
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
    if unit_timeout is not None and not workers:
        workers, threads = 1, threads or torch.get_num_threads()
    return Workers(workers, threads=threads, unit_timeout=unit_timeout) if workers else InProcess()
