"""Best-first branch and bound over the ReLUs on one ball of moves.

Bunel et al. 2020, Branch and Bound for Piecewise Linear Neural Network Verification,
https://www.jmlr.org/papers/v21/19-468.html, for a distance instead of a decision. Departs from it: the bound of a part
is the distance to the intersection of the half-spaces of the class's lead and of the units with a sign, all of them
linear in the image; and the half-space that proves this bound tightens the bounds of all units.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from attacks.certify.branch_and_bound.bracket import Ledger
from attacks.certify.branch_and_bound.distance import Shortest, shortest_move
from attacks.certify.branch_and_bound.region import TINY, Array, HalfSpace, Region
from attacks.certify.branch_and_bound.relaxation import (
    Bounds,
    Lines,
    Surroundings,
    interval_bounds,
    steeper_slopes,
    tighten,
    upper_lines,
)

# relative distance beyond the boundary at which witnesses are searched for, small compared with any gap
AIM = 1e-8
MOST_AIM = 1e-3
# a root is tightened by its own half-space until the bound grows by less than this factor
GAIN = 1.01
MOST_TIGHTENINGS = 8


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The moves of the ball that end in class ``other`` and agree with the signs; all are longer than ``bound``.

    Attributes:
        signs: per hidden layer ``(n_l,)``: 1 for units that are on, -1 off, 0 for either.
        bounds: bounds of all units at these moves.
        slopes: per hidden layer ``(n_l,)``, see `upper_lines`.
        within: a half-space that contains all these moves; None if none is known.
        split: layer and unit to split at; None before the part is bounded.
    """

    other: int
    signs: tuple[Array, ...]
    bounds: Bounds
    slopes: tuple[Array, ...]
    bound: float = 0.0
    within: HalfSpace | None = None
    split: tuple[int, int] | None = None


class Tree:
    """The open parts of one ball; ``floor`` is the smallest bound of a closed part, inf if all closed parts are empty.

    Args:
        ledger: receives witnesses and lower bounds, and holds the budget.
        region: the ball.

    Raises:
        OutOfBudget: the budget ended while the roots were bounded; `search` raises it too.
    """

    def __init__(self, ledger: Ledger, region: Region) -> None:
        self._ledger = ledger
        self._around = Surroundings(network=ledger.network, image=ledger.image, region=region)
        self.radius = region.radius
        self.open: list[tuple[float, int, _Part]] = []
        self.floor = math.inf
        self._order = itertools.count()
        self._plant()

    def least(self) -> float:
        """The proved lower bound: no point of another class is nearer."""
        return min([self._horizon, self.floor, *(entry[0] for entry in self.open[:1])])

    def search(self) -> None:
        """Split the part of the smallest bound until that bound suffices."""
        while self.open:
            self._ledger.prove(self.least())
            if self.open[0][0] >= self._enough:
                break
            part = heapq.heappop(self.open)[2]
            for sign in (1, -1):
                self._keep(self._half(part, sign))
        self._ledger.prove(self.least())

    @property
    def _horizon(self) -> float:
        return min(self._ledger.upper, self.radius)

    @property
    def _enough(self) -> float:
        return self._horizon * (1 - self._ledger.gap)

    def _keep(self, part: _Part | None) -> None:
        if part is not None:
            heapq.heappush(self.open, (part.bound, next(self._order), part))

    def _close(self, bound: float) -> None:
        self.floor = min(self.floor, bound)

    def _plant(self) -> None:
        """Bound one root per other class, tightened repeatedly by the half-space that proves its bound."""
        network = self._around.network
        bounds = tighten(self._around, interval_bounds(self._around), first=1)
        signs = tuple(np.zeros(len(bias)) for bias in network.biases[:-1])
        slopes = tuple(steeper_slopes(bounds, layer) for layer in range(network.hidden))
        for other in range(network.classes):
            if other == self._ledger.label:
                continue
            part = self._bounded(_Part(other=other, signs=signs, bounds=bounds, slopes=slopes))
            for _ in range(MOST_TIGHTENINGS):
                if part is None or not part.bound > 0:
                    break
                before = part.bound
                part = self._bounded(self._tightened(part))
                if part is not None and part.bound < GAIN * before:
                    break
            self._keep(part)

    def _half(self, part: _Part, sign: int) -> _Part | None:
        """The half of a part with its split unit on (1) or off (-1); None if that half is closed."""
        assert part.split is not None
        layer, unit = part.split
        low, high = part.bounds.low[layer].copy(), part.bounds.high[layer].copy()
        (low if sign > 0 else high)[unit] = 0.0
        bounds = part.bounds.replace(layer, low, high)
        half = replace(part, signs=_signed(part.signs, {layer: {unit: sign}}), bounds=bounds)
        # without a half-space, layers up to that of the unit are not affected
        half = self._tightened(half, 0 if part.within is not None else layer + 1)
        return None if half.bounds.empty() else self._bounded(half)

    def _tightened(self, part: _Part, first: int = 0) -> _Part:
        return replace(part, bounds=tighten(self._around, part.bounds, part.within, first))

    def _bounded(self, part: _Part) -> _Part | None:
        """Bound a part and choose where to split it; None if the part is closed."""
        self._ledger.spend()
        linear = part.bounds.stable()
        lines, shortest = self._relaxed(part, precise=linear)
        bound = max(part.bound, shortest.bound)
        if bound >= self._enough:
            self._close(bound)
            return None
        outputs = self._ledger.offer(shortest.move)
        within = shortest.aggregate if shortest.bound > 0 else part.within
        part = replace(part, bound=bound, within=within)
        # the bounds hold for moves of the part only; the shortest move is not one if its units have other signs
        wrong = _wrong_signs(part, outputs) if linear else {}
        if bound < self._enough and wrong:
            return self._bounded(replace(part, signs=_signed(part.signs, wrong)))
        if bound >= self._enough or linear:
            self._close(bound)
            return None
        slopes = tuple((output > 0).astype(np.float64) for output in outputs[:-1])
        return replace(part, slopes=slopes, split=_split(part.bounds, lines, shortest))

    def _relaxed(self, part: _Part, precise: bool) -> tuple[Lines, Shortest]:
        """The shortest move into the half-spaces of the class's lead and of the signed units."""
        network, region = self._around.network, self._around.region
        functional = network.lead(part.other, self._ledger.label)[None]
        lines = upper_lines(self._around, part.bounds, part.slopes, functional, network.hidden, part.signs)
        # the lead counts as reached where rounding may hide it: aim slightly beyond both
        hidden = 3 * float(np.abs(functional[0]) @ self._around.doubts[-1])
        size = max(float(region.dual(lines.rows[:1])[0]), TINY)
        aim = AIM * self.radius + min(hidden / size, MOST_AIM * self.radius)
        target = self._enough
        shortest = shortest_move(
            region, lines.rows, -lines.offsets, known=part.bound, target=target, precise=precise, aim=aim
        )
        return lines, shortest


def _signed(signs: tuple[Array, ...], more: dict[int, dict[int, int]]) -> tuple[Array, ...]:
    """The signs with those of further units, by layer and unit."""
    result = list(signs)
    for layer, units in more.items():
        result[layer] = result[layer].copy()
        result[layer][list(units)] = list(units.values())
    return tuple(result)


def _wrong_signs(part: _Part, outputs: list[Array]) -> dict[int, dict[int, int]]:
    """Units without a sign whose output contradicts their bounds, by layer, with the sign that the bounds allow."""
    wrong: dict[int, dict[int, int]] = {}
    for layer, (output, signs) in enumerate(zip(outputs, part.signs, strict=False)):
        on, off = part.bounds.low[layer] >= 0, part.bounds.high[layer] <= 0
        if part.bounds.linear:
            on, off = on & ~part.bounds.linear[layer], off & ~part.bounds.linear[layer]
        units = np.flatnonzero((signs == 0) & ((on & (output < 0)) | (off & (output > 0))))
        if len(units):
            wrong[layer] = {int(unit): 1 if on[unit] else -1 for unit in units}
    return wrong


def _split(bounds: Bounds, lines: Lines, shortest: Shortest) -> tuple[int, int]:
    """The layer and number of the unstable unit whose chord contributes most to the weighted lines."""
    weights = shortest.weights.copy()
    # where the signs alone prove the bound, the class's lead still counts
    weights[0] = max(weights[0], weights.max() / 3, 1e-9)
    best, choice = 0.0, (-1, -1)
    for layer, slack in enumerate(lines.slack):
        score = np.where(bounds.unstable(layer), weights[: len(slack)] @ slack, 0.0)
        unit = int(score.argmax())
        if score[unit] > best:
            best, choice = float(score[unit]), (layer, unit)
    if choice[0] < 0:
        width = [
            np.where(bounds.unstable(layer), np.minimum(-low, high), 0.0)
            for layer, (low, high) in enumerate(zip(bounds.low, bounds.high, strict=True))
        ]
        layer = int(np.argmax([w.max() for w in width]))
        choice = layer, int(width[layer].argmax())
    return choice
