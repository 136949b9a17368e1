"""Time the script's work on the networks of a finished run, alternating with ours, and compute both totals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from attacks.estimator import Margins, Status
from attacks.measure import measure
from attacks.registry import create
from attacks.types import Norm
from benchmarks.figure1 import script
from benchmarks.problems import Problem, run_problems
from benchmarks.speed.agreement import SAME
from harness.data.dataset import Dataset, Split
from harness.models.build import build
from harness.runs import Run
from harness.tracking.finished_run import options_of

T = TypeVar("T")
# timed epochs of the script's training; the median is used for all epochs
TRAINED = 3


@dataclass(frozen=True)
class Row:
    """One epoch, split and norm.

    Attributes:
        ours, theirs: seconds; ours with noisy starts, refinement and checks.
        average: of our margins before refinement, comparable with theirs.
        their_average: average over the images that Foolbox finds.
        found, their_found: numbers of found images.
        same: number of images that both find without noise and whose margins differ by less than `SAME`.
        both: number of images that both find without noise.
    """

    epoch: int
    split: str
    norm: Norm
    images: int
    ours: float
    theirs: float
    average: float
    their_average: float
    found: int
    their_found: int
    same: int
    both: int


@dataclass(frozen=True)
class Totals:
    """Seconds of the whole of Figure 1.

    Attributes:
        ours: wall time of ``harness.track`` from its start to its end, report included.
        training, errors, margins: of the script; margins between measured epochs are interpolated.
    """

    ours: float
    training: float
    errors: float
    margins: float

    @property
    def theirs(self) -> float:
        return self.training + self.errors + self.margins


def rows_of(run: Run, epochs: Sequence[int], norms: Sequence[Norm], estimator: str) -> Iterator[Row]:
    """Measure the run's checkpoints with both; the order alternates from row to row."""
    turn = 0
    for problem in run_problems(run, epochs, ("train", "test"), options_of(run)["probe"]):
        for norm in norms:
            sides: dict[str, Callable[[], Tensor | Margins]] = {
                "ours": lambda p=problem, n=norm: _ours(p, n, estimator),  # type: ignore[misc]
                "theirs": lambda p=problem, n=norm: script.margins(p.model, p.images, n),  # type: ignore[misc]
            }
            done = {name: _timed(sides[name]) for name in list(sides)[:: -1 if turn % 2 else 1]}
            turn += 1
            yield _row(problem, norm, done["ours"], done["theirs"])  # type: ignore[arg-type]


def totals(run: Run, dataset: Dataset, rows: Sequence[Row], ours: float) -> Totals:
    """Extrapolate the script's parts to the number of epochs of the run."""
    options = options_of(run)
    last = int(run.epochs["epoch"].max())
    train, test = (_tensors(split) for split in (dataset.train, dataset.test))
    model = build(options["model"], dataset.shape, dataset.classes, options["seed"])
    optimiser = torch.optim.Adam(model.parameters(), options["learning_rate"])
    trained, looked = [], []
    for _ in range(TRAINED):
        trained.append(_timed(lambda: script.train_epoch(model, optimiser, *train, options["batch_size"]))[0])
        looked.append(_timed(lambda: [script.error(model, *split) for split in (train, test)])[0])
    measured = sorted({row.epoch for row in rows})
    each = [sum(row.theirs for row in rows if row.epoch == epoch) for epoch in measured]
    return Totals(
        ours=ours,
        training=last * float(np.median(trained)),
        errors=(last + 1) * float(np.median(looked)),
        margins=float(np.interp(range(last + 1), measured, each).sum()),
    )


def pass_share(run: Run, norms: Sequence[Norm], estimator: str) -> float:
    """The share of forward and backward passes in the time of measuring the last epoch's test images."""
    spent, whole, entered = 0.0, 0.0, 0.0

    def enter(*_: object) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def leave(*_: object) -> None:
        nonlocal spent
        spent += time.perf_counter() - entered

    gradient = torch.autograd.grad

    def timed_gradient(*given: Any, **options: Any) -> Any:
        enter()
        found = gradient(*given, **options)
        leave()
        return found

    for problem in run_problems(run, (), ("test",), options_of(run)["probe"]):
        handles = problem.model.register_forward_pre_hook(enter), problem.model.register_forward_hook(leave)
        torch.autograd.grad = timed_gradient  # type: ignore[assignment]
        try:
            whole += sum(_timed(lambda n=norm, p=problem: _ours(p, n, estimator))[0] for norm in norms)  # type: ignore[misc]
        finally:
            torch.autograd.grad = gradient  # type: ignore[assignment]
            for handle in handles:
                handle.remove()
    return spent / whole


def _ours(problem: Problem, norm: Norm, estimator: str) -> Margins:
    return measure(
        problem.model,
        problem.images,
        create(estimator),
        norm,
        domain=problem.domain,
        noise_retries=problem.noise_retries,
        batch_size=problem.batch_size,
    )


def _row(problem: Problem, norm: Norm, ours: tuple[float, Margins], theirs: tuple[float, Tensor]) -> Row:
    margins, other = ours[1], theirs[1].double()
    plain = torch.tensor([status is Status.FOUND for status in margins.status])
    both = plain & other.isfinite()
    alike = (margins.attack_distance - other).abs() <= SAME * other
    found = margins.attack_distance.isfinite()
    return Row(
        epoch=problem.epoch or 0,
        split=problem.split,
        norm=norm,
        images=len(other),
        ours=ours[0],
        theirs=theirs[0],
        average=_mean(margins.attack_distance[found]),
        their_average=_mean(other[other.isfinite()]),
        found=int(found.sum()),
        their_found=int(other.isfinite().sum()),
        same=int((both & alike).sum()),
        both=int(both.sum()),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    return split.pixels(torch.arange(len(split))), split.labels


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result
