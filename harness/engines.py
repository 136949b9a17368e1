"""Create an engine by its name on the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.config.options import ConfigError
from harness.config.registry import ENGINES, definition
from harness.tasks import Engine, InProcess
from harness.workers import Workers


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine on the command line; each engine refuses those that it does not support.

    Attributes:
        workers: number of workers; 0 leaves it to the engine.
        device: device of the network.
        gpus: GPUs of each task.
        threads: threads of each worker; None leaves it to the engine.
        unit_timeout: seconds that an estimator may take in a norm at an epoch; None for no limit.
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
    """Create the engine of a name in `harness.config.registry.ENGINES`; for the options see `EngineOptions`.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: the name is unknown, or the engine does not support an option.
    """
    if name not in ENGINES:
        raise ConfigError(f"expected an engine of {', '.join(ENGINES)}, got {name!r}; choose one of them")
    engine: Engine = definition(ENGINES[name])(EngineOptions(workers, device, gpus, threads, unit_timeout))
    return engine


def local_engine(options: EngineOptions) -> Engine:
    """The engine ``local``: this process with 0 workers, else that many processes of this machine.

    By default each worker gets its share of the cores. With a unit timeout and 0 workers, one worker with the threads
    of this process is used.

    Raises:
        EngineError: a unit timeout that is not above 0.
        ConfigError: GPUs are given.
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
    """The engine ``ray``: tasks on a Ray cluster, by default with one thread each.

    Raises:
        ConfigError: a unit timeout is given; no GPUs are given although the network is on CUDA; Ray is not installed;
            or there is no cluster.
    """
    if options.unit_timeout is not None:
        raise ConfigError(
            f"expected --unit-timeout with --engine local, got {options.unit_timeout:g} with ray; leave it out, or "
            "use --workers N"
        )
    if options.device.type == "cuda" and not options.gpus:
        raise ConfigError(
            "expected --gpus-per-worker for Ray's tasks with a network on CUDA, got 0; give it, such as 0.5, or "
            "--device cpu"
        )
    # imported here, as Ray is an extra
    from harness.on_ray import OnRay

    return OnRay(options.workers, gpus=options.gpus, threads=options.threads)
