"""The distance to the nearest point of another class, bracketed from both sides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from attacks.certify.branch_and_bound.approach import approach
from attacks.certify.branch_and_bound.region import Array, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork
from attacks.certify.branch_and_bound.tree import OutOfBudget, Tree
from attacks.estimator import UnsoundError

# relative: how far rounding may put the length of a move below what is proved of it
TOLERANCE = 1e-9
# a tree whose root proves less than this part of the radius is grown at smaller radii first
PROMISING = 0.5


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend: parts of the input space that are bounded, and wall time."""

    nodes: int
    seconds: float = math.inf

    def covers(self, other: Budget) -> bool:
        """Whether the other allows no more."""
        return other.nodes <= self.nodes and other.seconds <= self.seconds


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """What a search has proved of the margin of one image.

    Attributes:
        lower: no point of another class lies nearer; inf where there is none at all.
        upper: the length of ``move``; inf without one.
        move: ``(n,)`` to a point of another class; of zeros without one.
        nodes: parts of the input space that were bounded.
    """

    lower: float
    upper: float
    move: Array
    nodes: int


class Search:
    """Branch and bound over the ReLUs for one image's margin; see `Tree`.

    Args:
        image: ``(n,)`` flattened. own: its class.
        region: the domain, and how far to look at most.
        changes: whether a move ``(n,)`` ends in another class, in the model's own judgement.
        gap: relative distance between lower and upper bound at which the margin is solved.
    """

    def __init__(
        self,
        network: ReluNetwork,
        image: Array,
        own: int,
        region: Region,
        changes: Callable[[Array], bool],
        *,
        gap: float,
    ) -> None:
        self.network, self.image, self.own, self.whole, self.gap = network, image, own, region, gap
        self.upper, self.lower, self.move = math.inf, 0.0, np.zeros_like(image)
        self._changes = changes
        self._nodes, self._most_nodes, self._deadline = 0, 0, math.inf

    @property
    def horizon(self) -> float:
        """What is nearer than this is of interest."""
        return min(self.upper, self.whole.radius)

    def spend(self) -> None:
        """Account for one part of the input space.

        Raises:
            OutOfBudget: there is nothing left to spend.
        """
        if self._nodes >= self._most_nodes or time.monotonic() > self._deadline:
            raise OutOfBudget
        self._nodes += 1

    def offer(self, move: Array) -> list[Array]:
        """Keep a move if it changes the class and is the shortest so far; the blocks' outputs there."""
        move = np.clip(move, self.whole.low, self.whole.high)
        outputs, length = self.network.blocks(self.image + move), self.whole.length(move)
        if length < self.upper and int(outputs[-1].argmax()) != self.own and self._changes(move):
            self.upper, self.move = length, move
        return outputs

    def prove(self, lower: float) -> None:
        """Keep a lower bound if it is the best so far."""
        self.lower = max(self.lower, lower)

    @property
    def solved(self) -> bool:
        """Whether the bracket is as narrow as it shall be."""
        return self.lower >= self.upper * (1 - self.gap)

    def bracket(self) -> Bracket:
        """What is known so far.

        Raises:
            UnsoundError: the bounds contradict one another.
        """
        if self.lower > self.upper * (1 + TOLERANCE):
            raise UnsoundError(
                f"expected no point of another class nearer than {self.lower!r}, got one at {self.upper!r}; "
                "no result of this solver can be trusted: report it with the network and the image"
            )
        return Bracket(lower=min(self.lower, self.upper), upper=self.upper, move=self.move, nodes=self._nodes)

    def resume(self, known: Bracket) -> None:
        """Start from what an earlier search of the same proved."""
        self._nodes = known.nodes
        self.prove(known.lower)
        if math.isfinite(known.upper):
            self.offer(known.move)

    def run(self, budget: Budget) -> Bracket:
        """Search until the bracket is closed or the budget spent."""
        self._nodes, self._most_nodes, self._deadline = 0, budget.nodes, time.monotonic() + budget.seconds
        self._approach()
        try:
            tree = self._climb()
            # the lines of an affine network hold at every distance, those of another one in the ball only
            empty = tree.floor > self.whole.radius if self.whole.boxed else math.isinf(tree.floor)
            if math.isinf(self.upper) and empty and (self.whole.boxed or not self.network.hidden):
                self.prove(math.inf)
        except OutOfBudget:
            pass
        return self.bracket()

    def _approach(self) -> None:
        for other in range(self.network.classes):
            if other != self.own:
                for move in approach(self.network, self.image, self.whole, self.own, other):
                    self.offer(move)

    def _climb(self) -> Tree:
        """Search the ball of the best witness, or first, where its root proves little, smaller ones."""
        tree = self._tree(self.horizon)
        if tree.least() < PROMISING * tree.radius:
            self._rise(tree.radius / 4)
            tree = self._tree(self.horizon)
        tree.search()
        return tree

    def _rise(self, radius: float) -> None:
        """Prove balls of growing radius empty, the first of them small enough to be proved by its root."""
        tree, least = self._tree(radius), 1e-3 * radius
        while tree.open and radius > least:
            radius /= 2
            tree = self._tree(radius)
        while radius < 0.95 * self.horizon:
            before = self._nodes
            tree.search()
            # small steps where trees have to grow
            radius *= 1.25 if self._nodes == before else 1.1
            tree = self._tree(min(radius, self.horizon))

    def _tree(self, radius: float) -> Tree:
        return Tree(self, replace(self.whole, radius=radius))
