"""The shortest move into an intersection of half-spaces and the box, with a lower bound from its dual weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog, nnls
from scipy.sparse import coo_array, csr_array, eye_array, hstack, vstack

from attacks.certify.branch_and_bound.region import ROUNDING, TINY, Array, HalfSpace, Region

# cost of a unit of violation in units of length; violations keep every linear program feasible
PENALTY = 1e3
# a reweighted bound above this fraction of the target is worth a linear program
NEARLY = 0.985


@dataclass(frozen=True, kw_only=True)
class Shortest:
    """A lower bound of the length of every move of the region that meets the constraints, and its proof.

    Attributes:
        bound: lower bound of the length; inf where no move meets the constraints.
        move: ``(n,)``, close to the shortest; it may miss a constraint slightly or leave the ball.
        weights: ``(m,)``, the dual weights of the constraints, not negative.
        aggregate: the weighted sum of the constraints; the bound is the exact distance to this half-space.
    """

    bound: float
    move: Array
    weights: Array
    aggregate: HalfSpace


def shortest_move(
    region: Region, rows: Array, gaps: Array, *, known: float, target: float, precise: bool, aim: float = 0.0
) -> Shortest:
    """The shortest move d of the region with ``rows @ d >= gaps``.

    In L2, least-distance programming (Lawson & Hanson, Solving Least Squares Problems, 1974, chapter 23), repeated for
    the free pixels until the set of pixels at the box stays the same. In L-infinity, the same with reweighted pixels,
    which is fast and about 0.2% below the optimum, and a linear program where that matters. The bound is computed from
    the weights that a solver returns, by `Region.nearest` of the weighted sum, so that it holds whether or not the
    solver has converged.

    Args:
        rows: ``(m, n)``. gaps: ``(m,)``.
        known: a lower bound of the length, to start from.
        target: a bound that is sufficient.
        precise: solve to optimality whatever the bound is.
        aim: distance beyond the first constraint at which the move is aimed.
    """
    scale = region.dual(rows)
    scale[scale == 0] = 1.0
    problem = _Problem(region, rows / scale[:, None], gaps / scale, aim)
    if len(rows) == 1 and region.norm == "l2":
        best = problem.weighted(np.ones(1))
    elif region.norm == "l2":
        best = problem.solve_l2()
    else:
        best = problem.solve_linf(known, target)
        if precise or NEARLY * target <= best.bound < target:
            exact = problem.solve_program()
            if exact is not None and (precise or exact.bound >= best.bound):
                best = exact
    return Shortest(bound=best.bound, move=best.move, weights=best.weights / scale, aggregate=best.aggregate)


class _Problem:
    """A problem of `shortest_move` with rows of dual norm 1, so that gaps are lengths."""

    def __init__(self, region: Region, rows: Array, gaps: Array, aim: float) -> None:
        self.region, self.rows, self.gaps = region, rows, gaps
        self.aimed = gaps.copy()
        self.aimed[0] += aim

    def weighted(self, weights: Array, move: Array | None = None) -> Shortest:
        """The bound that these weights prove; by default with the shortest move into their half-space.

        ``doubt`` bounds the rounding error of the weighted sum at moves of the region.
        """
        doubt = ROUNDING * float(weights @ np.abs(self.gaps) + weights.sum() * self.region.radius)
        aggregate = HalfSpace(normal=weights @ self.rows, gap=float(weights @ self.gaps) - doubt)
        length, nearest = self.region.nearest(aggregate)
        bound = length * (1 - ROUNDING)
        if move is None:
            further = HalfSpace(normal=aggregate.normal, gap=float(weights @ self.aimed))
            move = self.region.nearest(further)[1] if np.isfinite(bound) else nearest
        return Shortest(bound=bound, move=move, weights=weights, aggregate=aggregate)

    def solve_l2(self) -> Shortest:
        """Least squares in the pixels that are not at the box, until the set of these pixels stays the same."""
        low, high = self.region.low, self.region.high
        held, move = np.zeros(len(low), dtype=bool), np.zeros(len(low))
        best = self.weighted(np.zeros(len(self.gaps)))
        for _ in range(8):
            weights = _least_distance(self.rows[:, ~held], self.aimed - self.rows[:, held] @ move[held])
            if weights is None:
                break
            candidate = self.weighted(weights)
            best = candidate if candidate.bound >= best.bound else best
            left = 1.0 - float(weights @ (self.aimed - self.rows[:, held] @ move[held]))
            # 0 is left where the free pixels alone cannot meet the constraints: all pixels move to the box
            reach = (weights @ self.rows) / max(left, ROUNDING)
            outside = (reach <= low) | (reach >= high)
            if (outside == held).all():
                break
            held, move = outside, np.clip(reach, low, high)
        return best

    def solve_linf(self, known: float, target: float) -> Shortest:
        """Iteratively reweighted least squares, whose weights approximate the largest absolute value."""
        best = self.weighted(np.zeros(len(self.gaps)))
        length, pull = max(known, 1e-3 * self.region.radius), np.zeros(0)
        for attempt in range(4):
            low, high = np.maximum(self.region.low, -length), np.minimum(self.region.high, length)
            middle, half = (low + high) / 2, (high - low) / 2
            # in the first attempt, as if the pull on every pixel were the inverse of its room
            floor = 10.0 ** -(1 + attempt) * pull.max(initial=0.0)
            variance = half / np.maximum(pull, floor) if len(pull) else half * half
            root = np.sqrt(variance / max(variance.max(), TINY))
            weights = _least_distance(self.rows * root, self.aimed - self.rows @ middle)
            if weights is None:
                break
            candidate = self.weighted(weights)
            pull = np.abs(candidate.aggregate.normal)
            if candidate.bound >= best.bound:
                best = candidate
            if best.bound >= target or not pull.max() > 0:
                break
            length = max(length, best.bound)
        return best

    def solve_program(self) -> Shortest | None:
        """HiGHS on ``min t + PENALTY s`` with ``rows @ d + s >= gaps`` and ``|d_i| <= t``; None if HiGHS fails."""
        m, n = self.rows.shape
        ones, eye = np.ones((n, 1)), eye_array(n)
        zeros = coo_array((n, 1))
        matrix = vstack(
            [
                hstack([csr_array(-self.rows), coo_array((m, 1)), -np.ones((m, 1))]),
                hstack([eye, -ones, zeros]),
                hstack([-eye, -ones, zeros]),
            ]
        )
        sides = np.stack([np.append(self.region.low, [0.0, 0.0]), np.append(self.region.high, [np.inf, np.inf])], 1)
        result = linprog(
            np.append(np.zeros(n), [1.0, PENALTY]),
            A_ub=matrix.tocsr(),
            b_ub=np.append(-self.aimed, np.zeros(2 * n)),
            bounds=sides,
            method="highs-ds",
            options={"presolve": False, "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if result.status != 0:
            return None
        return self.weighted(np.maximum(-result.ineqlin.marginals[:m], 0.0), result.x[:n])


def _least_distance(rows: Array, gaps: Array) -> Array | None:
    """Dual weights of ``min ||d||_2`` with ``rows @ d >= gaps``, up to a factor; None if the solver fails."""
    ends = np.zeros(rows.shape[1] + 1)
    ends[-1] = 1.0
    try:
        weights: Array = nnls(np.vstack([rows.T, gaps]), ends)[0]
    except RuntimeError:
        return None
    return weights
