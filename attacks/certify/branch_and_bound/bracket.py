"""What a search knows of one margin, and what it may spend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attacks.certify.branch_and_bound.region import Array, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork
from attacks.types import UnsoundError

# relative: how far rounding may put the length of a move below what is proved of it
TOLERANCE = 1e-9


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


class OutOfBudget(Exception):
    """The node or time budget is spent."""


class Ledger:
    """What is known of one image's margin, and what is left to spend on it.

    Args:
        image: ``(n,)`` flattened. own: its class.
        whole: the domain, and how far to look at most.
        changes: whether a move ``(n,)`` ends in another class, in the model's own judgement.
        gap: relative distance between lower and upper bound at which the margin is solved.
    """

    def __init__(
        self,
        network: ReluNetwork,
        image: Array,
        own: int,
        whole: Region,
        changes: Callable[[Array], bool],
        *,
        gap: float,
    ) -> None:
        self.network, self.image, self.own, self.whole, self.gap = network, image, own, whole, gap
        self.upper, self.lower, self.move = math.inf, 0.0, np.zeros_like(image)
        self.nodes = 0
        self._changes = changes
        self._most_nodes, self._deadline = 0, math.inf

    def begin(self, budget: Budget) -> None:
        """Allow a search to spend this; what is known stays."""
        self.nodes, self._most_nodes, self._deadline = 0, budget.nodes, time.monotonic() + budget.seconds

    @property
    def horizon(self) -> float:
        """What is nearer than this is of interest."""
        return min(self.upper, self.whole.radius)

    def spend(self) -> None:
        """Account for one part of the input space.

        Raises:
            OutOfBudget: there is nothing left to spend.
        """
        if self.nodes >= self._most_nodes or time.monotonic() > self._deadline:
            raise OutOfBudget
        self.nodes += 1

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
        return Bracket(lower=min(self.lower, self.upper), upper=self.upper, move=self.move, nodes=self.nodes)

    def resume(self, known: Bracket) -> None:
        """Start from what an earlier search of the same proved."""
        self.nodes = known.nodes
        self.prove(known.lower)
        if math.isfinite(known.upper):
            self.offer(known.move)
