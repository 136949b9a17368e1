"""Best-first branch and bound over the ReLUs for the distance to the nearest point of another class."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass

import numpy as np

from attacks.certify.distance import Shortest, shortest_move
from attacks.certify.network import ReluNetwork
from attacks.certify.region import Array, HalfSpace, Region
from attacks.certify.relaxation import Bounds, Lines, interval_bounds, tighten, upper_lines
from attacks.estimator import Norm

# relative distance beyond the boundary at which witnesses are looked for, small beside any gap
AIM = 1e-8
# a tree whose root proves less than this part of the radius is grown at smaller radii first
PROMISING = 0.5


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """What a search has proved of the margin of one image.

    Attributes:
        lower: no point of another class lies nearer; inf where there is none in the whole domain.
        upper: the length of ``move``; inf without one.
        move: ``(n,)`` to a point of another class, or None.
        nodes: parts of the input space that were bounded.
        finished: whether the search ended by itself, not by its budget.
    """

    lower: float
    upper: float
    move: Array | None
    nodes: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class _Node:
    """The moves to class ``other`` that agree with the splits: all of those within the radius are longer than ``bound``."""

    other: int
    signs: tuple[Array, ...]
    bounds: Bounds
    slopes: tuple[Array, ...]
    bound: float = 0.0
    within: HalfSpace | None = None
    split: tuple[int, int] | None = None


class OutOfBudget(Exception):
    """The node or time budget is spent."""


class Search:
    """The margin of one image's predicted class.

    Args:
        image: ``(n,)`` flattened.
        low, high: ``(n,)`` how far each pixel may move; infinite in the free domain.
        reach: how far to look, at most.
        gap: relative distance between lower and upper bound at which the margin counts as solved.
    """

    def __init__(
        self,
        network: ReluNetwork,
        image: Array,
        norm: Norm,
        low: Array,
        high: Array,
        *,
        reach: float,
        gap: float,
        nodes: int,
        seconds: float,
    ) -> None:
        self.network, self.image, self.gap, self.reach = network, image, gap, reach
        self.whole = Region(norm=norm, radius=reach, low=low, high=high)
        self.own = int(network.logits(image).argmax())
        self.upper, self.move = math.inf, np.zeros(0)
        self.lower, self.nodes = 0.0, 0
        self.most_nodes, self.deadline = nodes, time.monotonic() + seconds

    def offer(self, move: Array) -> list[Array]:
        """Keep a move if it changes the class and is the shortest so far; the blocks' outputs there."""
        move = np.clip(move, self.whole.low, self.whole.high)
        outputs = self.network.blocks(self.image + move)
        length = self.whole.length(move)
        if length < self.upper and int(outputs[-1].argmax()) != self.own:
            self.upper, self.move = length, move
        return outputs

    def run(self) -> Bracket:
        """Search at the radius of the best witness, or, where its root proves little, at growing ones below it."""
        try:
            self._climb()
            finished = True
        except OutOfBudget:
            finished = False
        known = math.isfinite(self.upper)
        lower = min(self.lower, self.upper)
        if finished and not known and np.isfinite(self.whole.high).all():
            lower = math.inf
        return Bracket(
            lower=lower, upper=self.upper, move=self.move if known else None, nodes=self.nodes, finished=finished
        )

    def _climb(self) -> None:
        full = min(self.upper, self.reach)
        tree = _Tree(self, full)
        if tree.least() < PROMISING * full:
            radius = full / 4
            trial = _Tree(self, radius)
            while trial.open and radius > 1e-3 * full:
                radius /= 2
                trial = _Tree(self, radius)
            growth = 1.25
            while radius < 0.95 * min(self.upper, self.reach):
                before = self.nodes
                trial.search()
                growth = 1.25 if self.nodes == before else 1.1
                radius *= growth
                trial = _Tree(self, min(radius, self.upper, self.reach))
            tree = _Tree(self, min(self.upper, self.reach))
        tree.search()


class _Tree:
    """The open parts of one ball: every closed one is proved to hold no witness nearer than the radius or the best."""

    def __init__(self, search: Search, radius: float) -> None:
        self.search_, self.radius = search, radius
        self.region = Region(norm=search.whole.norm, radius=radius, low=search.whole.low, high=search.whole.high)
        self.open: list[tuple[float, int, _Node]] = []
        self.floor = math.inf
        self._plant()

    def least(self) -> float:
        """Nothing in the ball is nearer than this."""
        best = min(self.search_.upper, self.radius)
        return min([best, self.floor, *(node[0] for node in self.open[:1])])

    def enough(self) -> float:
        return min(self.search_.upper, self.radius) * (1 - self.search_.gap)

    def search(self) -> None:
        while self.open:
            self.search_.lower = max(self.search_.lower, self.least())
            bound, _, node = heapq.heappop(self.open)
            if bound >= self.enough():
                self.floor = min(self.floor, bound)
                self.open.clear()
                break
            try:
                children = [self._child(node, sign) for sign in (1, -1)]
            except OutOfBudget:
                self._push(node)
                raise
            for child in children:
                if child is not None:
                    self._push(child)
        self.search_.lower = max(self.search_.lower, self.least())

    def _push(self, node: _Node) -> None:
        heapq.heappush(self.open, (node.bound, id(node), node))

    def _plant(self) -> None:
        s = self.search_
        bounds = interval_bounds(s.network, s.image, self.region)
        bounds = tighten(s.network, s.image, self.region, bounds, first=1)
        signs = tuple(np.zeros(len(bias), dtype=np.int8) for bias in s.network.biases[:-1])
        slopes = tuple((high > -low).astype(np.float64) for low, high in zip(bounds.low, bounds.high, strict=True))
        for other in range(s.network.classes):
            if other == s.own:
                continue
            node = self._bounded(_Node(other=other, signs=signs, bounds=bounds, slopes=slopes))
            for _ in range(8):
                if node is None or not node.bound > 0:
                    break
                before = node.bound
                node = self._bounded(self._tightened(node))
                if node is not None and node.bound < 1.01 * before:
                    break
            if node is not None:
                self._push(node)

    def _tightened(self, node: _Node, first: int = 0) -> _Node:
        s = self.search_
        bounds = tighten(s.network, s.image, self.region, node.bounds, node.within, first)
        return _Node(
            other=node.other, signs=node.signs, bounds=bounds, slopes=node.slopes, bound=node.bound, within=node.within
        )

    def _child(self, node: _Node, sign: int) -> _Node | None:
        assert node.split is not None
        layer, unit = node.split
        low, high = node.bounds.low[layer].copy(), node.bounds.high[layer].copy()
        (low if sign > 0 else high)[unit] = 0.0
        own = node.signs[layer].copy()
        own[unit] = sign
        signs = (*node.signs[:layer], own, *node.signs[layer + 1 :])
        child = _Node(
            other=node.other,
            signs=signs,
            bounds=node.bounds.replace(layer, low, high),
            slopes=node.slopes,
            bound=node.bound,
            within=node.within,
        )
        child = self._tightened(child, 0 if node.within is not None else layer + 1)
        return None if child.bounds.empty() else self._bounded(child)

    def _bounded(self, node: _Node) -> _Node | None:
        """Bound a node's moves and choose where to split it; None where it is closed."""
        s = self.search_
        if s.nodes >= s.most_nodes or time.monotonic() > s.deadline:
            raise OutOfBudget
        s.nodes += 1
        functional = np.zeros((1, s.network.classes))
        functional[0, node.other], functional[0, s.own] = 1.0, -1.0
        lines = upper_lines(
            s.network, s.image, node.bounds, node.slopes, functional, s.network.hidden, node.signs
        )
        linear = not any(node.bounds.unstable(layer).any() for layer in range(s.network.hidden))
        target = self.enough()
        found = shortest_move(
            self.region,
            lines.rows,
            -lines.offsets,
            known=node.bound,
            target=target,
            precise=linear,
            aim=AIM * self.radius,
        )
        bound = max(node.bound, found.bound)
        if bound >= target:
            self.floor = min(self.floor, bound)
            return None
        outputs = s.offer(found.move)
        if linear or bound >= self.enough():
            self.floor = min(self.floor, bound)
            return None
        return _Node(
            other=node.other,
            signs=node.signs,
            bounds=node.bounds,
            slopes=tuple((output > 0).astype(np.float64) for output in outputs[:-1]),
            bound=bound,
            within=found.aggregate if found.bound > 0 else node.within,
            split=self._split(node.bounds, lines, found),
        )

    def _split(self, bounds: Bounds, lines: Lines, found: Shortest) -> tuple[int, int]:
        """The unstable unit whose chord adds most to the weighted lines."""
        weights = found.weights.copy()
        # where the splits alone prove the bound, the classes' difference still counts
        weights[0] = max(weights[0], weights.max() / 3, 1e-9)
        best, choice = 0.0, (-1, -1)
        for layer, slack in enumerate(lines.slack):
            score = np.where(bounds.unstable(layer), weights[: len(slack)] @ slack, 0.0)
            unit = int(score.argmax())
            if score[unit] > best:
                best, choice = float(score[unit]), (layer, unit)
        if choice[0] < 0:
            width = [np.minimum(-low, high) for low, high in zip(bounds.low, bounds.high, strict=True)]
            layer = int(np.argmax([w.max() for w in width]))
            choice = layer, int(width[layer].argmax())
        return choice
