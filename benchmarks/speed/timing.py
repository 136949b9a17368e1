"""Alternating timing of the sides, and the cost of passes of the bare network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from benchmarks.speed.problems import Problem

T = TypeVar("T")
# long enough to time passes of a millisecond accurately
LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Timed(Generic[T]):
    """The rounds of one side: wall and processor seconds, and the result of the first."""

    seconds: tuple[float, ...]
    processor: tuple[float, ...]
    result: T


@dataclass(frozen=True)
class Spread:
    """The median over rounds, the smallest and the largest."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of one value per round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Their time relative to ours, per round, so that a slower machine affects both."""
    return spread([their / our for their, our in zip(theirs, ours, strict=True)])


def take_turns(
    runs: Mapping[str, Callable[[], T]],
    repeats: int,
    device: torch.device,
    *,
    between: Callable[[], object] = lambda: None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timed[T]]:
    """Time every run once per round, in an order that reverses after each round.

    Args:
        runs: name -> timed function.
        device: a CUDA device is synchronised before the clock is read.
        between, after_round: called after every run and every round, outside the timed sections.
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
    """Seconds per image in full batches of the frozen network, for a forward and an input gradient of one logit gap."""

    forward: float
    backward: float

    def floor(self, steps: float, others: int) -> float:
        """Lower bound of DeepFool's seconds per image: ``steps + 1`` forwards, ``steps`` x ``others`` gradients.

        Args:
            steps: average per image.
            others: number of other classes.
        """
        return (steps + 1) * self.forward + steps * others * self.backward


def pass_costs(problem: Problem, candidates: int) -> PassCosts:
    """Measure both on the first batch, repeated for an accurate time.

    Args:
        candidates: number of classes, with one gradient for each except the first.
    """
    images = problem.images[: problem.batch_size]
    device = images.device
    model = problem.frozen
    top = min(candidates, problem.classes)
    forward = backward = 0.0
    rounds = 0
    _gradients(problem, top)  # the setup of a first call is not part of the cost of a pass
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
    """Seconds of one gradient for each of the most likely classes except the first, after an untimed forward."""
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
