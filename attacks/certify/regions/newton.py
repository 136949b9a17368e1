"""Batched projected Newton method for the shortest move into an intersection of half-spaces and a box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.geometry import dual_norm
from attacks.types import Norm

TINY = float(torch.finfo(torch.float64).tiny)
# largest violation of a constraint relative to the length
ACCURACY = 1e-9
# the same in all rounds before the last softness
ROUGHLY = 1e-2
# damping added to the diagonal, relative to its largest entry: initial, smallest and largest value
RIDGE = 1e-5, 1e-11, 1e3
ITERATIONS = 100
HALVINGS = 6
# Softness per round in L-infinity: the largest cost of the squared move, as a fraction of the length, which is added to
# the largest entry. A small softness does not change the solution (Mangasarian & Meyer 1979, Nonlinear perturbation of
# linear programs) but takes more steps. The first value lengthens moves by about 1e-4 of their length in practice.
FAST = (0.03, 0.1, 0.03)
SHARP = (0.01, 0.003, 0.001, 0.0003)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Solutions of B problems.

    Attributes:
        moves: ``(B, n)``. weights: ``(B, m)`` multipliers of the constraints, not negative, up to a common factor.
        solved: ``(B,)`` bool; false where a bound showed that no move is short enough, or the iterations ran out.
    """

    moves: Tensor
    weights: Tensor
    solved: Tensor


def nearest_moves(
    rows: Tensor,
    gaps: Tensor,
    low: Tensor,
    high: Tensor,
    norm: Norm,
    *,
    start: Tensor,
    known: Tensor,
    softness: tuple[float, ...] = FAST,
) -> Solution:
    """The shortest moves d with ``rows @ d >= gaps`` and ``low <= d <= high``.

    Projected Newton steps (Bertsekas 1982, https://doi.org/10.1137/0320018) on the dual, whose variables are the
    constraints' weights. The dual is concave and piecewise quadratic, so that the steps end at the exact solution. In
    L-infinity the squared move is added at a small price, which makes the dual piecewise quadratic.

    Args:
        rows: ``(B, m, n)`` float64; a row of zeros with a negative gap stands for no constraint. gaps: ``(B, m)``.
        low, high: ``(B, n)``, at most and at least 0; infinite without a box.
        start: ``(B, m)`` weights to start from.
        known: ``(B,)`` lengths; a problem is given up when it has no shorter move.
        softness: of L-infinity, in turn. Where the last value occurs earlier, later rounds treat unsolved rows only.
    """
    size = torch.stack([dual_norm(row, norm) for row in rows.unbind(1)], 1)
    size = torch.where(size > 0, size, 1.0)
    problem = _Problem(rows / size[..., None], gaps / size, low, high, known, norm)
    weights, solved = start * size, torch.zeros_like(known, dtype=torch.bool)
    if norm == "linf":
        weights = problem.raised(weights)
    pending = torch.arange(len(known), device=known.device)
    rounds = (0.0,) if norm == "l2" else softness
    for value in rounds:
        last = value == rounds[-1]
        accuracy = ACCURACY if last else ROUGHLY
        weights[pending], settled, hopeless = problem.select(pending).solve(weights[pending], value, accuracy)
        if last:
            solved[pending] = settled
            pending = pending[~settled & ~hopeless]
        if not len(pending):
            break
    moves = problem.respond(weights, rounds[-1]).moves
    return Solution(moves=moves, weights=weights / size, solved=solved)


@dataclass(frozen=True)
class _Response:
    """The optimal moves ``(B, n)`` for given weights, the dual's value ``(B,)`` and its curvature.

    The pixels ``free`` ``(B, n)`` respond to the weights. The pixels of ``lead`` ``(B, n)``, +-1 or 0, are all at the
    largest entry, which responds to the sum of their pulls.
    """

    moves: Tensor
    value: Tensor
    free: Tensor
    lead: Tensor | None


class _Problem:
    """B problems with rows of dual norm 1, so that gaps are lengths."""

    def __init__(self, rows: Tensor, gaps: Tensor, low: Tensor, high: Tensor, known: Tensor, norm: Norm) -> None:
        self.rows, self.gaps, self.low, self.high, self.known, self.norm = rows, gaps, low, high, known, norm

    def select(self, chosen: Tensor) -> _Problem:
        """The problems of these rows."""
        rows, gaps, known = self.rows[chosen], self.gaps[chosen], self.known[chosen]
        return _Problem(rows, gaps, self.low[chosen], self.high[chosen], known, self.norm)

    def solve(self, weights: Tensor, softness: float, accuracy: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``(B, m)``, whether they are optimal, and whether no move can be short enough: ``(B,)`` bool."""
        weights, solved = weights.clone(), torch.zeros_like(self.known, dtype=torch.bool)
        given_up = solved.clone()
        live = torch.arange(len(weights), device=weights.device)
        problem, current = self, weights.clone()
        answer, ridge = problem.respond(current, softness), torch.full_like(self.known, RIDGE[0])
        for _ in range(ITERATIONS):
            missing = problem.gaps - (problem.rows @ answer.moves[..., None])[..., 0]
            error = torch.where(current > 0, missing.abs(), missing.clamp_min(0.0)).amax(1)
            done = error <= accuracy * problem.known
            hopeless = answer.value >= problem._enough(softness)
            weights[live], solved[live], given_up[live] = current, done & ~hopeless, hopeless
            going = torch.nonzero(~done & ~hopeless).flatten()
            if not len(going):
                break
            if len(going) < len(live):
                live, problem, current, missing = live[going], problem.select(going), current[going], missing[going]
                answer, ridge = problem.respond(current, softness), ridge[going]
            step = problem._step(current, missing, answer, softness, ridge)
            current, answer, share = problem._advance(current, step, missing, answer, softness)
            # Levenberg's damping, for systems that few free pixels or parallel constraints make singular
            ridge = torch.where(share == 1, ridge / 10, ridge / share).clamp(*RIDGE[1:])
        return weights, solved, given_up

    def raised(self, weights: Tensor) -> Tensor:
        """L-infinity weights scaled up until they move a pixel; if all are 0, that of the largest gap is raised."""
        farthest = torch.zeros_like(weights).scatter(1, self.gaps.argmax(1, keepdim=True), 1.0)
        weights = torch.where((weights > 0).any(1, keepdim=True), weights, farthest)
        pull = (weights[:, None] @ self.rows)[:, 0].abs().sum(1, keepdim=True)
        return weights * ((1 + 1e-3) / pull.clamp_min(TINY)).clamp(1.0, 1e3)

    def respond(self, weights: Tensor, softness: float) -> _Response:
        """The optimal moves for weights ``(B, m)``."""
        pull = (weights[:, None] @ self.rows)[:, 0]
        gain = (weights * self.gaps).sum(1)
        if self.norm == "l2":
            moves = pull.clamp(self.low, self.high)
            value = gain - (moves * (pull - moves / 2)).sum(1)
            return _Response(moves, value, moves == pull, None)
        price = self._price(softness)
        size, room = pull.abs(), torch.where(pull > 0, self.high, -self.low)
        length, inside = _largest(size, torch.minimum(size / price[:, None], room), price)
        step = torch.minimum(torch.minimum(size / price[:, None], room), length[:, None])
        value = gain + length + (step * (price[:, None] * step / 2 - size)).sum(1)
        lead = (size / price[:, None] > length[:, None]) & (room > length[:, None]) & inside[:, None]
        free = (size > 0) & (size / price[:, None] <= length[:, None]) & (size / price[:, None] < room)
        return _Response(pull.sign() * step, value, free, pull.sign() * lead)

    def _price(self, softness: float) -> Tensor:
        """The price of half the squared move: it costs at most ``softness`` times the length."""
        return softness * 2 / (self.rows.shape[2] * self.known.clamp_min(TINY))

    def _enough(self, softness: float) -> Tensor:
        """The dual value above which no move can be shorter than ``known``."""
        nearly = 1 - 1e-7
        return nearly * self.known.square() / 2 if self.norm == "l2" else nearly * (1 + softness) * self.known

    def _step(self, weights: Tensor, missing: Tensor, answer: _Response, softness: float, ridge: Tensor) -> Tensor:
        """The Newton step ``(B, m)`` of the weights that are not held at 0."""
        moving = (weights > 0) | (missing > 0)
        order = answer.free.to(torch.uint8).argsort(dim=1, descending=True)[:, : int(answer.free.sum(1).max())]
        bent = self.rows.gather(2, order[:, None].expand(-1, self.rows.shape[1], -1))
        bent = bent * answer.free.gather(1, order)[:, None]
        curvature = bent @ bent.mT
        if answer.lead is not None:
            along = (self.rows @ answer.lead[..., None])[..., 0]
            count = answer.lead.abs().sum(1).clamp_min(1.0)
            curvature = curvature + along[:, :, None] * along[:, None, :] / count[:, None, None]
            curvature = curvature / self._price(softness)[:, None, None]
        curvature = curvature * (moving[:, :, None] & moving[:, None, :])
        diagonal = curvature.diagonal(dim1=1, dim2=2)
        # the curvature of a row of norm 1 with all pixels free; without free pixels the dual is linear, and steps grow
        # as the damping falls
        usual = (
            torch.ones_like(ridge[:, None])
            if answer.lead is None
            else (1 / (self.rows.shape[2] * self._price(softness)))[:, None]
        )
        most = diagonal.amax(1, keepdim=True).clamp_min(usual)
        diagonal += torch.where(moving, ridge[:, None] * most, most)
        # damping grows where rounding makes a step 0
        step: Tensor = torch.linalg.solve_ex(curvature, (missing * moving)[..., None])[0][..., 0]
        return torch.where(moving & step.isfinite(), step, 0.0)

    def _advance(
        self, weights: Tensor, step: Tensor, missing: Tensor, answer: _Response, softness: float
    ) -> tuple[Tensor, _Response, Tensor]:
        """Backtracking line search (Armijo's rule): the new weights, their response, and the fraction of the step."""
        share = torch.ones(len(weights), 1, dtype=weights.dtype, device=weights.device)
        for _ in range(HALVINGS):
            trial = (weights + share * step).clamp_min(0.0)
            response = self.respond(trial, softness)
            promised = 1e-4 * (missing * (trial - weights)).sum(1)
            short = response.value < answer.value + promised - 1e-14 * answer.value.abs()
            if not short.any():
                return trial, response, share[:, 0]
            share = torch.where(short[:, None], share / 4, share)
        trial = torch.where(short[:, None], weights, trial)
        return trial, self.respond(trial, softness), share[:, 0]


def _largest(size: Tensor, limit: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """The length t at which ``sum of (size - price * t) over limit > t`` falls to 1, and whether it does so smoothly.

    The sum is the gain per unit of length of the pixels that t holds back; a unit of length costs 1.

    Args:
        size, limit: ``(B, n)``. price: ``(B,)``.

    Returns:
        ``(B,)`` each; false where t is a pixel's room, beyond which the sum jumps below 1.
    """
    limit, order = limit.sort(1, descending=True)
    total = size.gather(1, order).cumsum(1)
    count = torch.arange(1, size.shape[1] + 1, dtype=size.dtype, device=size.device)
    finite = limit.clamp_max(torch.finfo(size.dtype).max / size.shape[1])
    enough = total - count * price[:, None] * finite >= 1
    # the number of pixels that are held back just above the length; the next pixel's limit is below it
    held = torch.where(enough.any(1), enough.to(torch.uint8).argmax(1), size.shape[1])
    before = torch.cat([torch.zeros_like(total[:, :1]), total], 1).gather(1, held[:, None])[:, 0]
    floor = torch.cat([limit, torch.zeros_like(limit[:, :1])], 1).gather(1, held[:, None])[:, 0]
    smooth = (before - 1) / (held.clamp_min(1) * price)
    inside = (held > 0) & (smooth > floor)
    return torch.where(inside, smooth, floor), inside & (smooth < math.inf)
