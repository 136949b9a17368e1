"""The nearest points of activation regions to their images, and the constraints that hold them there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.regions.cells import Cells, Passes, cells_at
from attacks.certify.regions.newton import FAST, SHARP, Nearest, nearest_moves
from attacks.geometry import row_norm
from attacks.types import Norm

# solutions of one region's problem, with more faces each time, and how many more
ROUNDS = 40
ADDED = 16
# of the mean size of the units' inputs: how far beyond a face a point still counts as inside
BEYOND = 1e-8


@dataclass(frozen=True)
class Task:
    """Images whose nearest points of other classes are looked for.

    Attributes:
        images: ``(B, C, H, W)`` float64. labels: ``(B,)`` int64, the classes to leave.
        limits: where points may lie; infinite in the free domain.
        owners: ``(B,)`` int64, who bears the ``passes``.
    """

    network: PiecewiseNetwork
    images: Tensor
    labels: Tensor
    norm: Norm
    limits: tuple[float, float]
    owners: Tensor
    passes: Passes

    def select(self, rows: Tensor) -> Task:
        """Some of them, or some more than once."""
        return replace(self, images=self.images[rows], labels=self.labels[rows], owners=self.owners[rows])

    def cells(self, points: Tensor) -> Cells:
        """The regions that points lie in."""
        return cells_at(self.network, points, self.labels, self.owners, self.passes)

    def ends(self, moves: Tensor) -> Tensor:
        """Where moves ``(B, n)`` lead."""
        return self.images + moves.view_as(self.images)

    def solve(self, tight: Tight, known: Tensor, softness: tuple[float, ...] = FAST) -> Nearest:
        """See `nearest_moves`."""
        pixels = self.images.flatten(1)
        low, high = (self.limits[0] - pixels).clamp_max(0.0), (self.limits[1] - pixels).clamp_min(0.0)
        return nearest_moves(
            tight.rows, tight.gaps, low, high, self.norm, start=tight.weights, known=known, softness=softness
        )


@dataclass(frozen=True)
class Tight:
    """The constraints of regions' problems that may matter, ``(B, m)`` each; of number -1 where there is none.

    Attributes:
        numbers: of functionals (see `Cells`) that must not be negative. weights: their multipliers, 0 where unknown.
        rows: ``(B, m, n)`` gradients. gaps: what they miss at the image.
    """

    numbers: Tensor
    weights: Tensor
    rows: Tensor
    gaps: Tensor

    @classmethod
    def of(cls, cells: Cells, numbers: Tensor, weights: Tensor, at_images: Tensor) -> Tight:
        """Constraints by their numbers ``(B, m)``, given all functionals at the images."""
        there = numbers >= 0
        rows = at_images.new_zeros(*numbers.shape, cells.network.blocks[0].leaves[0].numel())
        rows[there] = cells.rows(torch.nonzero(there)[:, 0], numbers[there])
        gaps = torch.where(there, -at_images.gather(1, numbers.clamp_min(0)), -1.0)
        return cls(numbers, torch.where(there, weights, 0.0), rows, gaps)

    def select(self, rows: Tensor) -> Tight:
        """Some problems'."""
        return Tight(self.numbers[rows], self.weights[rows], self.rows[rows], self.gaps[rows])

    def binding(self) -> Tight:
        """Without those of weight 0, as far as all problems can do with fewer."""
        most = int((self.weights > 0).sum(1).amax()) if len(self.weights) else 0
        order = (self.weights > 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        weights = self.weights.gather(1, order)
        rows = self.rows.gather(1, order[..., None].expand(-1, -1, self.rows.shape[2]))
        idle = weights <= 0
        return Tight(
            self.numbers.gather(1, order).masked_fill(idle, -1),
            weights,
            rows.masked_fill(idle[..., None], 0.0),
            self.gaps.gather(1, order).masked_fill(idle, -1.0),
        )

    def join(self, more: Tight) -> Tight:
        """Both."""
        return Tight(
            torch.cat([self.numbers, more.numbers], 1),
            torch.cat([self.weights, more.weights], 1),
            torch.cat([self.rows, more.rows], 1),
            torch.cat([self.gaps, more.gaps], 1),
        )


@dataclass(frozen=True)
class Stand:
    """Where the searches for B images stand: in points of regions.

    Attributes:
        moves: ``(B, n)`` from the image. length: ``(B,)``, theirs.
        numbers, weights: ``(B, m)`` of the constraints that hold the points there.
        rows: ``(B,)`` int64, which search each is.
    """

    task: Task
    cells: Cells
    moves: Tensor
    length: Tensor
    numbers: Tensor
    weights: Tensor
    rows: Tensor

    @classmethod
    def at(cls, task: Task, points: Tensor) -> Stand:
        """In points of which no constraint is known."""
        moves = (points - task.images).flatten(1)
        rows = torch.arange(len(points), device=points.device)
        none = rows.new_zeros(len(points), 0)
        return cls(task, task.cells(points), moves, row_norm(moves, task.norm), none, none.double(), rows)

    def select(self, rows: Tensor) -> Stand:
        """Some of them."""
        parts = (one[rows] for one in (self.moves, self.length, self.numbers, self.weights, self.rows))
        return Stand(self.task.select(rows), self.cells.select(rows), *parts)

    def where(self, chosen: Tensor, other: Stand) -> Stand:
        """This where chosen ``(B,)``, else the other, of the same images."""
        width = max(self.numbers.shape[1], other.numbers.shape[1])

        def pick(name: str, fill: float | None = None) -> Tensor:
            one, two = getattr(self, name), getattr(other, name)
            if fill is not None:
                one, two = (functional.pad(each, (0, width - each.shape[1]), value=fill) for each in (one, two))
            return torch.where(chosen.view(-1, *[1] * (one.ndim - 1)), one, two)

        return replace(
            self,
            cells=replace(self.cells, signs=torch.where(chosen[:, None], self.cells.signs, other.cells.signs)),
            moves=pick("moves"),
            length=pick("length"),
            numbers=pick("numbers", -1),
            weights=pick("weights", 0.0),
        )

    def by_number(self) -> Tensor:
        """The weights ``(B, U + K)`` of all functionals."""
        size = self.cells.units + self.task.network.blocks[-1].shape[0]
        place = torch.where(self.numbers >= 0, self.numbers, size)
        found = self.weights.new_zeros(len(place), size + 1)
        return found.scatter_add(1, place, self.weights)[:, :-1]

    def nearest(self) -> tuple[Stand, Tensor]:
        """The nearest points of the regions where another class leads, and whether they were found: ``(B,)`` bool.

        They are no farther than the points known, but up to rounding. Constraints come one after another: of the faces
        that a solution lies beyond, those that the way from the point known meets first.
        """
        at_images, here = self.cells.values(self.task.images), self.cells.values(self.task.ends(self.moves))
        tight, units = self._known(at_images, here), self.cells.units
        least = BEYOND * at_images[:, :units].abs().mean(1, keepdim=True)
        live = torch.arange(len(here), device=here.device)
        moves, found = self.moves.clone(), torch.zeros_like(live, dtype=torch.bool)
        ends: list[tuple[Tensor, Tight]] = []
        for _ in range(ROUNDS):
            task, cells = self.task.select(live), self.cells.select(live)
            solution = task.solve(tight, self.length[live])
            tight = replace(tight, weights=solution.weights)
            there = cells.values(task.ends(solution.moves))
            beyond = _beyond(there[:, :units], here[live, :units], least[live], tight.numbers)
            crossed = (beyond > 0).any(1)
            settled, going = solution.solved & ~crossed, solution.solved & crossed
            moves[live[settled]], found[live[settled]] = solution.moves[settled], True
            ends.append((live[settled], tight.select(settled)))
            if not going.any():
                break
            live, tight = live[going], tight.select(going).binding()
            depth, more = beyond[going].topk(min(ADDED, units), dim=1)
            more = torch.where(depth > 0, more, -1)
            tight = tight.join(Tight.of(cells.select(going), more, torch.zeros_like(depth), at_images[live]))
        numbers, weights = _gathered(ends, len(here))
        length = row_norm(moves, self.task.norm)
        return replace(self, moves=moves, length=length, numbers=numbers, weights=weights), found

    def sharpened(self) -> Stand:
        """L-infinity points of `nearest` without what its softness adds to their length."""
        if self.task.norm == "l2" or not len(self.rows):
            return self
        at_images, units = self.cells.values(self.task.images), self.cells.units
        tight = Tight.of(self.cells, self.numbers, self.weights, at_images)
        solution = self.task.solve(tight, self.length, SHARP)
        there = self.cells.values(self.task.ends(solution.moves))
        least = BEYOND * at_images[:, :units].abs().mean(1, keepdim=True)
        crossed = (_beyond(there[:, :units], there[:, :units], least, tight.numbers) > 0).any(1)
        length = row_norm(solution.moves, "linf")
        sharp = solution.solved & ~crossed & (length < self.length)
        return replace(self, moves=solution.moves, length=length).where(sharp, self)

    def _known(self, at_images: Tensor, here: Tensor) -> Tight:
        """The leading class's constraint, and the faces from before."""
        units = self.cells.units
        leads = here[:, units:].scatter(1, self.task.labels[:, None], -torch.inf)
        led = torch.where(self.numbers >= units, self.weights, 0.0).sum(1, keepdim=True)
        numbers = torch.cat(
            [units + leads.argmax(1, keepdim=True), self.numbers.masked_fill(self.numbers >= units, -1)], 1
        )
        return Tight.of(self.cells, numbers, torch.cat([led, self.weights], 1), at_images)


def _beyond(there: Tensor, here: Tensor, least: Tensor, known: Tensor) -> Tensor:
    """How much of the way from here to there lies beyond each face ``(B, U)``; 0 for the known ones."""
    part = -there / (here.clamp_min(0.0) - there).clamp_min(torch.finfo(there.dtype).tiny)
    part = functional.pad(torch.where(there < -least, part, 0.0), (0, 1))
    units = there.shape[1]
    return part.scatter(1, torch.where((known >= 0) & (known < units), known, units), 0.0)[:, :-1]


def _gathered(ends: list[tuple[Tensor, Tight]], count: int) -> tuple[Tensor, Tensor]:
    """Numbers and weights ``(B, m)`` of problems that ended one after another."""
    kept = [(live, tight.binding()) for live, tight in ends]
    width = max(tight.numbers.shape[1] for _, tight in kept)
    numbers = torch.full((count, width), -1, device=ends[0][0].device)
    weights = torch.zeros(count, width, dtype=torch.float64, device=numbers.device)
    for live, tight in kept:
        numbers[live, : tight.numbers.shape[1]] = tight.numbers
        weights[live, : tight.numbers.shape[1]] = tight.weights
    return numbers, weights
