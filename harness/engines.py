"""Create an engine by its name on the command line."""

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
    """Create the engine ``name``.

    Args:
        name: ``local`` measures in this process or in ``workers`` processes, ``ray`` on a Ray cluster.
        workers: number of processes; 0 is this process, on Ray as many tasks as fit.
        device: device of the network.
        gpus: GPUs of each task, on Ray.
        threads: threads of each worker; by default a local worker gets its share of the cores, a Ray task 1.
        unit_timeout: see `harness.workers.Workers`; with 0 workers, one worker with this process's threads is used.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: a unit timeout on Ray; GPUs for local workers; no GPUs for Ray's tasks although the network is on
            CUDA; or no Ray cluster.
    """
    if name == "ray":
        if unit_timeout is not None:
            raise ConfigError(
                f"expected --unit-timeout with --engine local, got {unit_timeout:g} with ray; leave it out, or use "
                "--workers N"
            )
        if device.type == "cuda" and not gpus:
            raise ConfigError(
                "expected --gpus-per-worker for Ray's tasks with a network on CUDA, got 0; give it, such as 0.5, or "
                "--device cpu"
            )
        # imported here, as Ray is an extra
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
