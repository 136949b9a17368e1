"""Engines by the names that the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.config.options import ConfigError
from harness.config.registry import ENGINES, definition
from harness.tasks import Engine, InProcess
from harness.workers import Workers


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says of engines; each refuses what it cannot follow.

    Attributes:
        workers: how many; 0 leaves it to the engine.
        device: where the network is.
        gpus: for each task.
        threads: of each worker; None leaves it to the engine.
        unit_timeout: seconds for an estimator in a norm at an epoch; None for no limit.
    """

    workers: int
    device: torch.device
    gpus: float = 0.0
    threads: int | None = None
    unit_timeout: float | None = None


def create_engine(
    name: str,
    workers: int,
    device: torch.device,
    *,
    gpus: float = 0.0,
    threads: int | None = None,
    unit_timeout: float | None = None,
) -> Engine:
    """The engine of this name in `harness.config.registry.ENGINES`; for the options see `EngineOptions`.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: no such engine, or options that it cannot follow.
    """
    if name not in ENGINES:
        raise ConfigError(f"expected an engine of {', '.join(ENGINES)}, got {name!r}; choose one of them")
    engine: Engine = definition(ENGINES[name])(EngineOptions(workers, device, gpus, threads, unit_timeout))
    return engine


def local_engine(options: EngineOptions) -> Engine:
    """This process with 0 workers, else that many processes of this machine; a unit timeout takes at least one.

    By default each worker has its share of the cores; the only one of a unit timeout has the threads of this process.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: GPUs are asked for.
    """
    if options.gpus:
        raise ConfigError(
            f"expected --gpus-per-worker with --engine ray, got {options.gpus:g} with local; local workers share the "
            "GPUs of --device cuda in turn: leave it out"
        )
    workers, threads = options.workers, options.threads
    if options.unit_timeout is not None and not workers:
        workers, threads = 1, threads or torch.get_num_threads()
    return Workers(workers, threads=threads, unit_timeout=options.unit_timeout) if workers else InProcess()


def ray_engine(options: EngineOptions) -> Engine:
    """Ray's tasks, by default with one thread each.

    Raises:
        ConfigError: a unit timeout, no GPUs with a network on one, no Ray, or no such cluster.
    """
    if options.unit_timeout is not None:
        raise ConfigError(
            f"expected --unit-timeout with --engine local, got {options.unit_timeout:g} with ray; leave it out, or "
            "take --workers N"
        )
    if options.device.type == "cuda" and not options.gpus:
        raise ConfigError(
            "expected --gpus-per-worker for Ray's tasks beside a network on CUDA, got 0; give it, such as 0.5, or "
            "--device cpu"
        )
    # here, as Ray is an extra
    from harness.on_ray import OnRay

    return OnRay(options.workers, gpus=options.gpus, threads=options.threads)
