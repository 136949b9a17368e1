"""Exact margins of small ReLU networks by branch and bound, the reference for estimators without a closed form."""

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

# well above the distance beyond the boundary at which witnesses are searched for
LEAST_GAP = 1e-7


@dataclass(frozen=True, kw_only=True)
class ExactMargins:
    """A bracket of each image's margin, one entry per image, on the CPU.

    Attributes:
        lower: ``(N,)`` float64 in pixel units: no nearer point of the domain has another class. inf where no point
            of the domain has another class, 0 on a tie.
        upper: ``(N,)`` float64: the distance of ``witness``; inf without a witness.
        witness: ``(N, C, H, W)`` float64, inside the domain and of another class; the image itself without a witness
            and on a tie.
        label: ``(N,)`` int64, the predicted class, to whose boundary the margin is the distance.
        solved: ``(N,)`` bool: ``lower >= upper * (1 - gap)``.
        nodes: ``(N,)`` int64, parts of the input space that were bounded.
        seconds: ``(N,)`` float64 wall time; that of the original search where the bracket comes from the cache.
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
    """The distance of each image to the boundary of its predicted class, for a network of affine layers and ReLUs.

    LeakyReLU, max pooling and paths around layers are read as ReLUs too.

    Branch and bound over the ReLUs (see `attacks.certify.branch_and_bound.tree`). Every lower bound holds in exact
    arithmetic for the network in float64. Every upper bound belongs to a point that the model itself, in float64 and
    evaluation mode, puts into another class. Networks of up to about 150 units take about a second per image, some
    images a minute. For larger and for convolutional networks, many brackets stay open. Lower bounds are reduced by an
    allowance for rounding, so that margins below about 1e-4 of the pixel range stay open at the default ``gap``; a
    margin of 1e-6 stays open by 1e-3 of itself.

    The results are deterministic, except where ``seconds`` ends a search or a cache holds a better bracket.

    Args:
        model: see `read_network`; pixels in ``bounds`` -> logits. Left untouched.
        images: ``(N, C, H, W)`` float in ``bounds``.
        norm: ``l2`` or ``linf``.
        domain: ``box``: only points inside ``bounds`` count; ``free``: all points count.
        witnesses: ``(N, C, H, W)`` points that may be of another class, to start from. Points that are not are
            ignored. The search also finds its own.
        gap: relative difference of the bounds at which a margin counts as solved, at least 1e-7.
        nodes: the most parts of the input space to bound per image; a thousand take about a second.
        seconds: the most wall time per image; None for no limit.
        cache: folder of earlier results, created if missing. A solved result is used again. An unsolved one is used
            if no more nodes and seconds are asked for, and otherwise continued. A damaged file is ignored, and every
            witness is classified again.

    Raises:
        InputError: images outside ``bounds``, arguments of the wrong shape or size, or a model that cannot be read.
        UnsoundError: the bounds contradict one another: a bug of the solver.
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
    network, float64_model = read_network(model, tuple(images.shape[1:])), Logits(evaluation_copy(model))
    question = {"solver": VERSION, "network": network.fingerprint(), "norm": norm, "domain": domain}
    question |= {"bounds": [float(limit) for limit in bounds], "gap": float(gap)}
    budget = Budget(nodes=nodes, seconds=math.inf if seconds is None else float(seconds))
    answers = []
    for row, image in enumerate(images):
        start = place(float64_model, image, domain, bounds)
        ledger = Ledger(network, start.pixels, start.label, start.region(norm), start.changes, gap=gap)
        if witnesses is not None:
            ledger.offer(flat(witnesses[row]) - start.pixels)
        answers.append(_solve(start, ledger, budget, question, folder))
    return _join(answers, gap)


@dataclass(frozen=True)
class _Answer:
    start: Place
    bracket: Bracket
    seconds: float


def _solve(start: Place, ledger: Ledger, budget: Budget, question: dict[str, Any], cache: Path | None) -> _Answer:
    """The bracket of one image's margin: from the cache where that suffices, else from a search."""
    if start.tied:
        return _Answer(start, Bracket(lower=0.0, upper=0.0, move=np.zeros_like(start.pixels), nodes=0), 0.0)
    if cache is None:
        return _run(start, ledger, budget)
    question = {**question, "image": hashlib.sha256(start.pixels.tobytes()).hexdigest()}
    path = path_of(cache, question)
    record = read_record(path, question)
    if record is not None and _confirmed(record, start, ledger):
        ledger.resume(record.bracket())
        if ledger.solved or record.budget.covers(budget):
            return _Answer(start, ledger.bracket(), record.seconds)
    answer = _run(start, ledger, budget)
    write_record(path, question, Record.of(answer.bracket, answer.seconds, budget))
    return answer


def _run(start: Place, ledger: Ledger, budget: Budget) -> _Answer:
    began = time.monotonic()
    bracket = Search(ledger).run(budget)
    return _Answer(start, bracket, time.monotonic() - began)


def _confirmed(record: Record, start: Place, ledger: Ledger) -> bool:
    """Whether a record's witness still has another class and the recorded distance."""
    if math.isinf(record.upper):
        return True
    move = np.array(record.move)
    return (
        move.shape == start.pixels.shape
        and math.isclose(ledger.whole.length(move), record.upper, rel_tol=TOLERANCE)
        and start.changes(move)
    )


def _join(answers: list[_Answer], gap: float) -> ExactMargins:
    brackets = [answer.bracket for answer in answers]
    lower = torch.tensor([bracket.lower for bracket in brackets], dtype=torch.float64)
    upper = torch.tensor([bracket.upper for bracket in brackets], dtype=torch.float64)
    return ExactMargins(
        lower=lower,
        upper=upper,
        witness=torch.stack([answer.start.image(answer.bracket.move) for answer in answers]),
        label=torch.tensor([answer.start.label for answer in answers]),
        solved=lower >= upper * (1 - gap),
        nodes=torch.tensor([bracket.nodes for bracket in brackets]),
        seconds=torch.tensor([answer.seconds for answer in answers], dtype=torch.float64),
    )


def _check(gap: float, seconds: float | None) -> None:
    if not isinstance(gap, int | float) or not LEAST_GAP <= gap < 1:
        raise InputError(f"expected a gap of at least {LEAST_GAP:g} and below 1, got {gap!r}; choose one between")
    if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
        raise InputError(f"expected seconds above 0, got {seconds!r}; give a larger number, or None for no limit")
