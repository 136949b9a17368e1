"""Exact margins of small ReLU networks: the judge of every estimator where no closed form is known."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.arguments import check_choice, plain_bounds, plain_path, whole
from attacks.certify.branch_and_bound.bracket import TOLERANCE, Bracket, Budget, Ledger
from attacks.certify.branch_and_bound.cache import VERSION, Record, path_of, read_record, write_record
from attacks.certify.branch_and_bound.place import Place, flat, place
from attacks.certify.branch_and_bound.relu_network import read_network
from attacks.certify.branch_and_bound.search import Search
from attacks.certify.network.tracing import evaluation_copy
from attacks.checks import check_images, check_module, check_points
from attacks.isolation.outputs import Logits
from attacks.types import DOMAINS, NORMS, Domain, InputError, Norm

# well above the distance beyond the boundary that witnesses are looked for at
LEAST_GAP = 1e-7


@dataclass(frozen=True, kw_only=True)
class ExactMargins:
    """A bracket of each image's margin, one entry an image, on the CPU.

    Attributes:
        lower: ``(N,)`` float64 in pixel units: no point of the domain that is nearer has another class; inf where
            no point has, 0 on a tie.
        upper: ``(N,)`` float64: the distance of ``witness``; inf without one.
        witness: ``(N, C, H, W)`` float64, inside the domain and of another class; the image itself without one, and
            on a tie.
        label: ``(N,)`` int64, the predicted class that the margin is of.
        solved: ``(N,)`` bool: ``lower >= upper * (1 - gap)``.
        nodes: ``(N,)`` int64, parts of the input space that were bounded. seconds: ``(N,)`` float64; of the search
            that found the bracket, where it comes from the cache.
    """

    lower: Tensor
    upper: Tensor
    witness: Tensor
    label: Tensor
    solved: Tensor
    nodes: Tensor
    seconds: Tensor

    @property
    def margin(self) -> Tensor:
        """``(N,)`` float64, too large by at most ``gap``; NaN where the bracket is open; inf without boundary."""
        return torch.where(self.solved, self.upper, math.nan)


def exact_margins(
    model: nn.Module,
    images: Tensor,
    norm: Norm,
    *,
    domain: Domain = "box",
    bounds: tuple[float, float] = (0.0, 1.0),
    witnesses: Tensor | None = None,
    gap: float = 1e-6,
    nodes: int = 100_000,
    seconds: float | None = None,
    cache: str | Path | None = None,
) -> ExactMargins:
    """The distance of each image to the boundary of its predicted class, of a network of affine layers and ReLUs.

    Branch and bound over the ReLUs (see `attacks.certify.branch_and_bound.tree`). Every lower bound holds in exact
    arithmetic for the network in float64. Every upper bound belongs to a point that the model itself, in float64 and
    evaluation mode, puts into another class. Networks of up to about 150 units take about a second per image, some
    images a minute; of larger and of convolutional networks, many brackets stay open. What is proved falls short by
    what rounding might hide, so that margins below about 1e-4 of the pixel range stay open at the default ``gap``: by
    1e-3 of themselves at 1e-6.

    The results are the same every time for the same arguments, but where ``seconds`` ends a search or a cache
    knows better.

    Args:
        model: see `read_network`; pixels in ``bounds`` -> logits. Left untouched.
        images: ``(N, C, H, W)`` float in ``bounds``.
        norm: ``l2`` or ``linf``.
        domain: ``box``, only points inside ``bounds`` count; ``free``, all do.
        witnesses: ``(N, C, H, W)`` points that may be of another class, to start from; those that are none are of no
            harm. The search finds its own in any case.
        gap: relative distance of the bounds at which a margin is solved, at least 1e-7.
        nodes: parts of the input space to bound for an image, at most; a thousand take about a second.
        seconds: to spend on an image, at most; None for no limit.
        cache: folder of earlier results, made where missing. One that is solved is used again; one that is not,
            only where no more nodes and seconds are asked for, and is gone on from otherwise. A damaged file is
            no result, and every witness is classified again.

    Raises:
        InputError: images outside ``bounds``, arguments of the wrong shape or size, or a model that is no such network.
        UnsoundError: a bug of the solver.
    """
    check_module(model)
    check_images(images, bounds)
    bounds = plain_bounds(bounds)
    check_choice("norm", norm, NORMS)
    check_choice("domain", domain, DOMAINS)
    nodes = whole("nodes", nodes, 1)
    _check(gap, seconds)
    if witnesses is not None:
        check_points("witnesses", witnesses, images)
    folder = None if cache is None else plain_path("cache", cache)
    network, own = read_network(model, tuple(images.shape[1:])), Logits(evaluation_copy(model))
    question = {"solver": VERSION, "network": network.fingerprint(), "norm": norm, "domain": domain}
    question |= {"bounds": [float(limit) for limit in bounds], "gap": float(gap)}
    budget = Budget(nodes=nodes, seconds=math.inf if seconds is None else float(seconds))
    answers = []
    for row, image in enumerate(images):
        here = place(own, image, domain, bounds)
        ledger = Ledger(network, here.pixels, here.label, here.region(norm), here.changes, gap=gap)
        if witnesses is not None:
            ledger.offer(flat(witnesses[row]) - here.pixels)
        answers.append(_solve(here, ledger, budget, question, folder))
    return _join(answers, gap)


@dataclass(frozen=True)
class _Answer:
    here: Place
    bracket: Bracket
    seconds: float


def _solve(here: Place, ledger: Ledger, budget: Budget, question: dict[str, Any], cache: Path | None) -> _Answer:
    """What is known of an image's margin after such an effort, now or earlier."""
    if here.tied:
        return _Answer(here, Bracket(lower=0.0, upper=0.0, move=np.zeros_like(here.pixels), nodes=0), 0.0)
    if cache is None:
        return _run(here, ledger, budget)
    question = {**question, "image": hashlib.sha256(here.pixels.tobytes()).hexdigest()}
    path = path_of(cache, question)
    record = read_record(path, question)
    if record is not None and _confirmed(record, here, ledger):
        ledger.resume(record.bracket())
        if ledger.solved or record.budget.covers(budget):
            return _Answer(here, ledger.bracket(), record.seconds)
    answer = _run(here, ledger, budget)
    write_record(path, question, Record.of(answer.bracket, answer.seconds, budget))
    return answer


def _run(here: Place, ledger: Ledger, budget: Budget) -> _Answer:
    began = time.monotonic()
    bracket = Search(ledger).run(budget)
    return _Answer(here, bracket, time.monotonic() - began)


def _confirmed(record: Record, here: Place, ledger: Ledger) -> bool:
    """Whether a record's point has another class still, at the distance that it is said to have."""
    if math.isinf(record.upper):
        return True
    move = np.array(record.move)
    return (
        move.shape == here.pixels.shape
        and math.isclose(ledger.whole.length(move), record.upper, rel_tol=TOLERANCE)
        and here.changes(move)
    )


def _join(answers: list[_Answer], gap: float) -> ExactMargins:
    brackets = [answer.bracket for answer in answers]
    lower = torch.tensor([bracket.lower for bracket in brackets], dtype=torch.float64)
    upper = torch.tensor([bracket.upper for bracket in brackets], dtype=torch.float64)
    return ExactMargins(
        lower=lower,
        upper=upper,
        witness=torch.stack([answer.here.image(answer.bracket.move) for answer in answers]),
        label=torch.tensor([answer.here.label for answer in answers]),
        solved=lower >= upper * (1 - gap),
        nodes=torch.tensor([bracket.nodes for bracket in brackets]),
        seconds=torch.tensor([answer.seconds for answer in answers], dtype=torch.float64),
    )


def _check(gap: float, seconds: float | None) -> None:
    if not isinstance(gap, int | float) or not LEAST_GAP <= gap < 1:
        raise InputError(f"expected a gap of at least {LEAST_GAP:g} and below 1, got {gap!r}; choose one between")
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise InputError(f"expected seconds above 0, got {seconds!r}; allow some effort, or None for no limit")
