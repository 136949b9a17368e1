"""Tasks and the engines that run them: one estimator in one norm on images of one split."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from attacks.estimator import Estimator, Margins
from attacks.measure import MeasureOptions, measure_with
from attacks.pool import Pool
from attacks.types import Norm
from harness.config.devices import device_of
from harness.store import Unit


@dataclass(frozen=True)
class Task:
    """A shard of a unit; all that measuring it takes, but for the network.

    Attributes:
        split, first: whose images these are, and the place of the first one in the probe.
        images: ``(N, C, H, W)`` on the CPU. seeds: one per image. start: like ``images``, or None.
        options: how they are measured. The caller has checked the model.
        pool: classified images on the CPU for an estimator that uses them.
    """

    unit: Unit
    split: str
    first: int
    estimator: Estimator
    images: Tensor
    seeds: tuple[int, ...]
    start: Tensor | None
    options: MeasureOptions
    pool: Pool | None = None

    def __str__(self) -> str:
        return f"{self.unit}, {self.split} images {self.first} to {self.first + len(self.images) - 1}"


@dataclass(frozen=True)
class Outcome:
    """A task's margins, and the seconds that they took."""

    margins: Margins
    seconds: float


@dataclass(frozen=True)
class Overdue:
    """A task that was stopped: since its unit's first task began, these seconds have passed."""

    seconds: float


class Engine(Protocol):
    """Where tasks are run; the run folder is written by the caller alone."""

    @property
    def parallel(self) -> bool:
        """Whether tasks run in parallel; then it gets many small tasks at a time."""

    @property
    def count(self) -> int:
        """How many run at a time."""

    def run(
        self, model: nn.Module, tasks: Sequence[Task], on_progress: Callable[[int], None]
    ) -> Iterator[tuple[Task, Outcome | Overdue]]:
        """Run the tasks, in any order; yield each as it ends, or is stopped by an engine that limits a unit's time.

        Args:
            on_progress: called with the number of images that are done more.

        Raises:
            InputError, EstimatorError: what `attacks.measure.measure` raises.
            EngineError: the engine cannot run them.
        """

    def close(self) -> None:
        """Give back what the engine holds."""


class EngineError(ValueError):
    """Workers that cannot be had or do not live; the message is one line that says what to do."""


class InProcess:
    """Runs one task after the other, where the caller is."""

    parallel = False
    count = 1

    def run(
        self, model: nn.Module, tasks: Sequence[Task], on_progress: Callable[[int], None]
    ) -> Iterator[tuple[Task, Outcome]]:
        """See `Engine`."""
        for task in tasks:
            yield task, run_task(model, task, on_progress)

    def close(self) -> None:
        """Nothing is held."""


def run_task(model: nn.Module, task: Task, on_progress: Callable[[int], None] | None = None) -> Outcome:
    """Measure a task's images with the network, where that is."""
    began, device = time.perf_counter(), device_of(model)
    margins = measure_with(
        model,
        task.images.to(device),
        task.estimator,
        _norm(task.unit.norm),
        task.options,
        seeds=task.seeds,
        start=None if task.start is None else task.start.to(device),
        pool=None if task.pool is None else task.pool.to(device),
        on_progress=on_progress,
        checked=True,
    )
    return Outcome(margins, time.perf_counter() - began)


def _norm(text: str) -> Norm:
    return "l2" if text == "l2" else "linf"


@dataclass(frozen=True)
class ProcessSettings:
    """What a process that measures must have in common with this one, to round as it does."""

    threads: int
    deterministic: bool
    warn_only: bool
    precision: str
    dtype: torch.dtype
    cudnn: tuple[bool, bool, bool]

    @classmethod
    def here(cls, threads: int | None = None) -> ProcessSettings:
        """This process's, but for the threads, where they are given."""
        cudnn = torch.backends.cudnn
        return cls(
            threads or torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic),
        )

    def apply(self) -> None:
        """Make them this process's."""
        if self.deterministic:
            # cuBLAS reads it when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_float32_matmul_precision(self.precision)
        torch.set_default_dtype(self.dtype)
        cudnn = torch.backends.cudnn
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = self.cudnn
