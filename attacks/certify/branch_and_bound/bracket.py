"""The bracket of one margin, the budget of a search, and the ledger that keeps both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attacks.certify.branch_and_bound.region import Array, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork
from attacks.types import UnsoundError

# relative amount by which rounding may put the length of a move below its lower bound
TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a search: parts of the input space that are bounded, and wall time in seconds."""

    nodes: int
    seconds: float = math.inf

    def covers(self, other: Budget) -> bool:
        """Whether the other budget allows no more."""
        return other.nodes <= self.nodes and other.seconds <= self.seconds


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """Proved bounds of the margin of one image.

    Attributes:
        lower: no point of another class lies nearer; inf if no point has another class.
        upper: the length of ``move``; inf without a witness.
        move: ``(n,)`` from the image to a witness; zeros without one.
        nodes: parts of the input space that were bounded.
    """

    lower: float
    upper: float
    move: Array
    nodes: int


class OutOfBudget(Exception):
    """The node or time budget is spent."""


class Ledger:
    """The bracket of one image's margin so far, and the budget that is left.

    Args:
        image: ``(n,)`` flattened. label: its class.
        whole: the domain, with the largest distance to search.
        changes: whether a move ``(n,)`` ends in another class according to the model itself.
        gap: relative distance between lower and upper bound at which the margin is solved.
    """

    def __init__(
        self,
        network: ReluNetwork,
        image: Array,
        label: int,
        whole: Region,
        changes: Callable[[Array], bool],
        *,
        gap: float,
    ) -> None:
        self.network, self.image, self.label, self.whole, self.gap = network, image, label, whole, gap
        self.upper, self.lower, self.move = math.inf, 0.0, np.zeros_like(image)
        self.nodes = 0
        self._changes = changes
        self._most_nodes, self._deadline = 0, math.inf

    def begin(self, budget: Budget) -> None:
        """Set the budget of a search; the bracket stays."""
        self.nodes, self._most_nodes, self._deadline = 0, budget.nodes, time.monotonic() + budget.seconds

    @property
    def horizon(self) -> float:
        """Only points nearer than this are of interest."""
        return min(self.upper, self.whole.radius)

    def spend(self) -> None:
        """Account for one part of the input space.

        Raises:
            OutOfBudget: the budget is spent.
        """
        if self.nodes >= self._most_nodes or time.monotonic() > self._deadline:
            raise OutOfBudget
        self.nodes += 1

    def offer(self, move: Array) -> list[Array]:
        """Keep a move if it changes the class and is the shortest so far; return the blocks' outputs at its end."""
        move = np.clip(move, self.whole.low, self.whole.high)
        outputs, length = self.network.blocks(self.image + move), self.whole.length(move)
        if length < self.upper and int(outputs[-1].argmax()) != self.label and self._changes(move):
            self.upper, self.move = length, move
        return outputs

    def prove(self, lower: float) -> None:
        """Keep a lower bound if it is the largest so far."""
        self.lower = max(self.lower, lower)

    @property
    def solved(self) -> bool:
        """Whether the bracket is as narrow as ``gap`` asks."""
        return self.lower >= self.upper * (1 - self.gap)

    def bracket(self) -> Bracket:
        """The bracket so far.

        Raises:
            UnsoundError: the bounds contradict one another.
        """
        if self.lower > self.upper * (1 + TOLERANCE):
            raise UnsoundError(
                f"expected no point of another class nearer than {self.lower!r}, got one at {self.upper!r}; "
                "no result of this solver can be trusted: report this with the network and the image"
            )
        return Bracket(lower=min(self.lower, self.upper), upper=self.upper, move=self.move, nodes=self.nodes)

    def resume(self, known: Bracket) -> None:
        """Start from the bracket of an earlier search of the same margin."""
        self.nodes = known.nodes
        self.prove(known.lower)
        if math.isfinite(known.upper):
            self.offer(known.move)
