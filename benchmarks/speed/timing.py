"""Sides that take turns on one clock, and what passes of the bare network cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from benchmarks.speed.problems import Problem

T = TypeVar("T")
# long enough for a clock to be right about passes that take a millisecond
LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Timed(Generic[T]):
    """One side's rounds: wall and processor seconds, and what the first one returned."""

    seconds: tuple[float, ...]
    processor: tuple[float, ...]
    result: T


@dataclass(frozen=True)
class Spread:
    """A median over rounds, and the least and the most."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value a round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as long they took as we did, round by round: a machine that slows down slows both."""
    return spread([their / our for their, our in zip(theirs, ours, strict=True)])


def take_turns(
    runs: Mapping[str, Callable[[], T]],
    repeats: int,
    device: torch.device,
    *,
    between: Callable[[], object] = lambda: None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timed[T]]:
    """Time every run once a round, in an order that turns round after each.

    Args:
        runs: name -> what is timed.
        device: what a CUDA device has queued is waited for before the clock is read.
        between, after_round: called after every run and every round, in nobody's time.
    """
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results: dict[str, T] = {}
    for turn in range(repeats):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            began, busy = _now(device), time.process_time()
            result = runs[name]()
            clocks[name].append((_now(device) - began, time.process_time() - busy))
            results.setdefault(name, result)
            between()
        after_round()
    return {
        name: Timed(tuple(wall for wall, _ in clocks[name]), tuple(busy for _, busy in clocks[name]), results[name])
        for name in runs
    }


@dataclass(frozen=True)
class PassCosts:
    """Seconds an image in full batches of the frozen network: a forward, and an input gradient of one logit gap."""

    forward: float
    backward: float

    def floor(self, steps: float, others: int) -> float:
        """Seconds an image that DeepFool cannot go below: ``steps + 1`` forwards, ``steps`` x ``others`` gradients.

        Args:
            steps: of an image on average.
            others: classes besides its own.
        """
        return (steps + 1) * self.forward + steps * others * self.backward


def pass_costs(problem: Problem, candidates: int) -> PassCosts:
    """Measure both on the first batch, as many times as the clock needs.

    Args:
        candidates: how many classes are gone through, with one gradient each but for the first.
    """
    images = problem.images[: problem.batch_size]
    device = images.device
    model = problem.frozen
    top = min(candidates, problem.classes)
    forward = backward = 0.0
    rounds = 0
    _gradients(problem, top)  # what a first call sets up is no pass's cost
    while forward + backward < LEAST_SECONDS:
        began = _now(device)
        with torch.no_grad():
            model(images)
        forward += _now(device) - began
        backward += _gradients(problem, top)
        rounds += 1
    passes = rounds * len(images)
    return PassCosts(forward / passes, backward / (passes * (top - 1)))


def _gradients(problem: Problem, top: int) -> float:
    """Seconds of one gradient for each of the most likely classes but the first, after a forward that is not timed."""
    leaf = problem.images[: problem.batch_size].clone().requires_grad_()
    logits = problem.frozen(leaf)
    order = logits.detach().topk(top, dim=1).indices
    gaps = logits.gather(1, order[:, 1:]) - logits.gather(1, order[:, :1])
    totals = gaps.sum(0).unbind()
    began = _now(leaf.device)
    for k, total in enumerate(totals, 1):
        torch.autograd.grad(total, leaf, retain_graph=k < len(totals))
    return _now(leaf.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
