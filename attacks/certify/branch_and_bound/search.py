"""Branch and bound over the ReLUs for the distance to the nearest point of another class."""

from __future__ import annotations

import math
from dataclasses import replace

from attacks.certify.branch_and_bound.approach import approach
from attacks.certify.branch_and_bound.bracket import Bracket, Budget, Ledger, OutOfBudget
from attacks.certify.branch_and_bound.tree import Tree

# if a tree's root proves less than this fraction of the radius, smaller radii are searched first
PROMISING = 0.5


class Search:
    """The search for the margin of one image; all results are kept in its ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def run(self, budget: Budget) -> Bracket:
        """Search until the bracket is solved or the budget spent."""
        ledger = self.ledger
        ledger.begin(budget)
        self._approach()
        try:
            tree = self._climb()
            # the lines of an affine network hold at every distance, those of other networks in the ball only
            empty = tree.floor > ledger.whole.radius if ledger.whole.boxed else math.isinf(tree.floor)
            if math.isinf(ledger.upper) and empty and (ledger.whole.boxed or not ledger.network.hidden):
                ledger.prove(math.inf)
        except OutOfBudget:
            pass
        return ledger.bracket()

    def _approach(self) -> None:
        ledger = self.ledger
        for other in range(ledger.network.classes):
            if other != ledger.label:
                for move in approach(ledger.network, ledger.image, ledger.whole, ledger.label, other):
                    ledger.offer(move)

    def _climb(self) -> Tree:
        """Search the ball up to the best witness; where its root proves little, smaller balls first."""
        tree = self._tree(self.ledger.horizon)
        if tree.least() < PROMISING * tree.radius:
            self._rise(tree.radius / 4)
            tree = self._tree(self.ledger.horizon)
        tree.search()
        return tree

    def _rise(self, radius: float) -> None:
        """Prove balls of growing radius empty, starting with one that is small enough to be proved by its root."""
        tree, least = self._tree(radius), 1e-3 * radius
        while tree.open and radius > least:
            radius /= 2
            tree = self._tree(radius)
        while radius < 0.95 * self.ledger.horizon:
            before = self.ledger.nodes
            tree.search()
            # smaller steps once trees have to be split
            radius *= 1.25 if self.ledger.nodes == before else 1.1
            tree = self._tree(min(radius, self.ledger.horizon))

    def _tree(self, radius: float) -> Tree:
        return Tree(self.ledger, replace(self.ledger.whole, radius=radius))
