"""The exact L-infinity margin of a ReLU network by mixed-integer programming: an independent check of `exact`.

Tjeng et al. 2019, Evaluating Robustness of Neural Networks with Mixed Integer Programming,
https://arxiv.org/abs/1711.07356, with plain interval bounds, solved by HiGHS. It shares only the reading of the network
with the search, and is slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack

from attacks.certify.branch_and_bound.region import Array
from attacks.certify.branch_and_bound.relu_network import ReluNetwork

# HiGHS stops at absolute gaps of about 1e-6 for any requested tolerance
RELATIVE_GAP = 1e-6
INFEASIBLE = 2


@dataclass(frozen=True, kw_only=True)
class Program:
    """HiGHS' result for the margin of one image.

    Attributes:
        lower, upper: bounds of the margin, to HiGHS' tolerances; inf if no other class is within reach.
        move: ``(n,)`` perturbation of length ``upper``; zeros if there is none.
    """

    lower: float
    upper: float
    move: Array


def linf_margin(
    network: ReluNetwork, image: Array, low: Array, high: Array, *, reach: float, seconds: float = 60.0
) -> Program:
    """The smallest L-infinity distance at which another class has the largest logit.

    Args:
        image: ``(n,)`` flattened.
        low, high: ``(n,)`` bounds of each pixel's perturbation; infinite in the free domain.
        reach: largest distance searched, inclusive; smaller values give tighter bounds.
        seconds: time limit per class.
    """
    predicted = int(network.logits(image).argmax())
    best = Program(lower=math.inf, upper=math.inf, move=np.zeros_like(image))
    for other in range(network.classes):
        if other == predicted:
            continue
        model = _Model(network, image, np.maximum(low, -reach), np.minimum(high, reach))
        solution = model.solve(network.lead(other, predicted), reach, seconds)
        nearer = solution if solution.upper < best.upper else best
        best = Program(lower=min(best.lower, solution.lower), upper=nearer.upper, move=nearer.move)
    return best


class _Model:
    """The variables ``(d, t, a_0, q_0, a_1, q_1, ...)``: perturbation, its length, units after ReLU, their activity."""

    def __init__(self, network: ReluNetwork, image: Array, low: Array, high: Array) -> None:
        self.pixels = len(image)
        widths = [len(bias) for bias in network.biases[:-1]]
        self.size = self.pixels + 1 + 2 * sum(widths)
        self.least, self.most = np.zeros(self.size), np.ones(self.size)
        self.whole = np.zeros(self.size)
        self.least[: self.pixels], self.most[: self.pixels] = low, high
        self.constraints: list[LinearConstraint] = []
        inputs, shift, first = slice(0, self.pixels), image, self.pixels + 1
        for layer, (weight, bias, width) in enumerate(zip(network.weights, network.biases, widths, strict=False)):
            after, on = slice(first, first + width), slice(first + width, first + 2 * width)
            linear = network.linear[layer] if network.linear else np.zeros(width, dtype=bool)
            self._relu(weight, bias + weight @ shift, linear, inputs, after, on)
            inputs, shift, first = after, np.zeros(width), first + 2 * width
        self.last, self.offset = (network.weights[-1], inputs), network.biases[-1] + network.weights[-1] @ shift

    def solve(self, functional: Array, reach: float, seconds: float) -> Program:
        """The shortest perturbation with ``functional @ logits >= 0``."""
        weight, inputs = self.last
        lead = self._row((inputs, (functional @ weight)[None]))
        positive = LinearConstraint(lead, lb=-float(functional @ self.offset))
        eye, length = eye_array(self.pixels), slice(self.pixels, self.pixels + 1)
        moved, ones = slice(0, self.pixels), np.ones((self.pixels, 1))
        sides = [LinearConstraint(self._row((moved, sign * eye), (length, -ones)), ub=0.0) for sign in (1.0, -1.0)]
        self.most[self.pixels] = reach * (1 + RELATIVE_GAP)
        cost = np.zeros(self.size)
        cost[self.pixels] = 1.0
        result = milp(
            cost,
            integrality=self.whole,
            bounds=Bounds(self.least, self.most),
            constraints=[*self.constraints, *sides, positive],
            options={"time_limit": seconds, "mip_rel_gap": RELATIVE_GAP},
        )
        none = np.zeros(self.pixels)
        if result.status == INFEASIBLE:
            return Program(lower=math.inf, upper=math.inf, move=none)
        # without binary variables it is a linear program, for which no dual bound is reported
        known = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
        lower = 0.0 if known is None else float(known)
        if result.x is None:
            return Program(lower=lower, upper=math.inf, move=none)
        return Program(lower=lower, upper=float(result.fun), move=result.x[: self.pixels])

    def _relu(
        self, weight: Array, bias: Array, linear: NDArray[np.bool_], inputs: slice, after: slice, on: slice
    ) -> None:
        """``a = max(z, 0)``, or z itself, for ``z = W v + b``, with interval bounds l and u of z.

        ``a >= z``, ``a <= z - l (1 - q)``, ``a <= u q`` with q 0 or 1, and ``a >= 0``; where a is z, q is 1 and free
        of the last two.
        """
        least, most = self.least[inputs], self.most[inputs]
        positive, negative = np.maximum(weight, 0.0), np.minimum(weight, 0.0)
        low, high = positive @ least + negative @ most + bias, positive @ most + negative @ least + bias
        self.least[after], self.most[after] = np.where(linear, low, 0.0), np.where(linear, high, np.maximum(high, 0.0))
        # units that are always active or inactive need no binary variable
        self.most[on] = linear | (high > 0)
        self.least[on] = linear | ((low >= 0) & (high > 0))
        self.whole[on] = 1
        eye = eye_array(len(bias))
        below, above = np.minimum(low, 0.0), np.maximum(high, 0.0)
        self.constraints += [
            LinearConstraint(self._row((inputs, -weight), (after, eye)), lb=bias),
            LinearConstraint(self._row((inputs, -weight), (after, eye), (on, np.diag(-below))), ub=bias - below),
            LinearConstraint(self._row((after, eye), (on, np.diag(-above))), ub=0.0),
        ]

    def _row(self, *blocks: tuple[slice, Any]) -> csr_array:
        """Rows of the constraint matrix that are nonzero only in these columns, from left to right."""
        parts, at, rows = [], 0, blocks[0][1].shape[0]
        for columns, block in blocks:
            parts += [csr_array((rows, columns.start - at)), csr_array(block)]
            at = columns.stop
        return hstack([*parts, csr_array((rows, self.size - at))]).tocsr()
