"""The nearest boundary points within activation regions, and the constraints (faces) that are active there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.regions.cells import Cells, Passes, cells_at
from attacks.certify.regions.newton import FAST, SHARP, Solution, nearest_moves
from attacks.geometry import row_norm
from attacks.types import Norm

# how often one region's problem is solved with more faces, and how many faces are added each time
ROUNDS = 40
ADDED = 16
# how far beyond a face a point still counts as inside, relative to the mean size of the units' inputs
BEYOND = 1e-8


@dataclass(frozen=True)
class Task:
    """A batch of searches for the nearest point of another class.

    Attributes:
        images: ``(B, C, H, W)`` float64. labels: ``(B,)`` int64, the classes to leave.
        limits: smallest and largest pixel value of a point; infinite in the free domain.
        owners: ``(B,)`` int64, the image that ``passes`` are counted for.
    """

    network: PiecewiseNetwork
    images: Tensor
    labels: Tensor
    norm: Norm
    limits: tuple[float, float]
    owners: Tensor
    passes: Passes

    def select(self, rows: Tensor) -> Task:
        """The searches of these rows, which may repeat."""
        return replace(self, images=self.images[rows], labels=self.labels[rows], owners=self.owners[rows])

    def cells(self, points: Tensor) -> Cells:
        """The regions that contain the points."""
        return cells_at(self.network, points, self.labels, self.owners, self.passes)

    def ends(self, moves: Tensor) -> Tensor:
        """The end points of moves ``(B, n)``."""
        return self.images + moves.view_as(self.images)

    def solve(self, tight: Tight, known: Tensor, softness: tuple[float, ...] = FAST) -> Solution:
        """See `nearest_moves`."""
        pixels = self.images.flatten(1)
        low, high = (self.limits[0] - pixels).clamp_max(0.0), (self.limits[1] - pixels).clamp_min(0.0)
        return nearest_moves(
            tight.rows, tight.gaps, low, high, self.norm, start=tight.weights, known=known, softness=softness
        )


@dataclass(frozen=True)
class Tight:
    """The constraints of regions' problems that may be active, ``(B, m)`` each.

    Attributes:
        numbers: the functionals (see `Cells`) that must not be negative; -1 where there is no constraint.
        weights: their multipliers, 0 where unknown.
        rows: ``(B, m, n)`` gradients. gaps: the negative values at the image.
    """

    numbers: Tensor
    weights: Tensor
    rows: Tensor
    gaps: Tensor

    @classmethod
    def of(cls, cells: Cells, numbers: Tensor, weights: Tensor, at_images: Tensor) -> Tight:
        """Constraints by their numbers ``(B, m)``, with the values of all functionals at the images."""
        present = numbers >= 0
        rows = at_images.new_zeros(*numbers.shape, cells.network.blocks[0].leaves[0].numel())
        rows[present] = cells.rows(torch.nonzero(present)[:, 0], numbers[present])
        gaps = torch.where(present, -at_images.gather(1, numbers.clamp_min(0)), -1.0)
        return cls(numbers, torch.where(present, weights, 0.0), rows, gaps)

    def select(self, rows: Tensor) -> Tight:
        """The constraints of these rows."""
        return Tight(self.numbers[rows], self.weights[rows], self.rows[rows], self.gaps[rows])

    def binding(self) -> Tight:
        """Drop constraints of weight 0, down to the largest number that one of the problems needs."""
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
        """The constraints of both."""
        return Tight(
            torch.cat([self.numbers, more.numbers], 1),
            torch.cat([self.weights, more.weights], 1),
            torch.cat([self.rows, more.rows], 1),
            torch.cat([self.gaps, more.gaps], 1),
        )


@dataclass(frozen=True)
class WalkState:
    """The current points of B walks, and the regions that contain them.

    Attributes:
        moves: ``(B, n)`` from the images. length: ``(B,)`` norms of the moves.
        numbers, weights: ``(B, m)`` of the constraints that are active at the points.
        rows: ``(B,)`` int64, the walk that each row belongs to.
    """

    task: Task
    cells: Cells
    moves: Tensor
    length: Tensor
    numbers: Tensor
    weights: Tensor
    rows: Tensor

    @classmethod
    def at(cls, task: Task, points: Tensor) -> WalkState:
        """Walks at points of which no active constraint is known."""
        moves = (points - task.images).flatten(1)
        rows = torch.arange(len(points), device=points.device)
        none = rows.new_zeros(len(points), 0)
        return cls(task, task.cells(points), moves, row_norm(moves, task.norm), none, none.double(), rows)

    def select(self, rows: Tensor) -> WalkState:
        """The walks of these rows."""
        parts = (values[rows] for values in (self.moves, self.length, self.numbers, self.weights, self.rows))
        return WalkState(self.task.select(rows), self.cells.select(rows), *parts)

    def where(self, chosen: Tensor, other: WalkState) -> WalkState:
        """These walks where chosen ``(B,)`` bool, else the others, of the same images."""
        width = max(self.numbers.shape[1], other.numbers.shape[1])

        def pick(name: str, fill: float | None = None) -> Tensor:
            mine, its = getattr(self, name), getattr(other, name)
            if fill is not None:
                mine, its = (functional.pad(part, (0, width - part.shape[1]), value=fill) for part in (mine, its))
            return torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), mine, its)

        return replace(
            self,
            cells=replace(self.cells, signs=torch.where(chosen[:, None], self.cells.signs, other.cells.signs)),
            moves=pick("moves"),
            length=pick("length"),
            numbers=pick("numbers", -1),
            weights=pick("weights", 0.0),
        )

    def by_number(self) -> Tensor:
        """The weights ``(B, U + K)`` of all functionals, 0 where not active."""
        size = self.cells.units + self.task.network.blocks[-1].shape[0]
        place = torch.where(self.numbers >= 0, self.numbers, size)
        weights = self.weights.new_zeros(len(place), size + 1)
        return weights.scatter_add(1, place, self.weights)[:, :-1]

    def nearest_points(self) -> tuple[WalkState, Tensor]:
        """Move to the nearest point of each region at which another class leads.

        Constraints are added in rounds: of the faces that a solution violates, those that the segment from the current
        point crosses first.

        Returns:
            The walks at these points, no farther than before up to rounding, and whether a point was found, ``(B,)``
            bool.
        """
        at_images, current = self.cells.values(self.task.images), self.cells.values(self.task.ends(self.moves))
        tight, units = self._known(at_images, current), self.cells.units
        least = BEYOND * at_images[:, :units].abs().mean(1, keepdim=True)
        live = torch.arange(len(current), device=current.device)
        moves, found = self.moves.clone(), torch.zeros_like(live, dtype=torch.bool)
        ends: list[tuple[Tensor, Tight]] = []
        for _ in range(ROUNDS):
            task, cells = self.task.select(live), self.cells.select(live)
            solution = task.solve(tight, self.length[live])
            tight = replace(tight, weights=solution.weights)
            ahead = cells.values(task.ends(solution.moves))
            beyond = _beyond(ahead[:, :units], current[live, :units], least[live], tight.numbers)
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
        numbers, weights = _gathered(ends, len(current))
        length = row_norm(moves, self.task.norm)
        return replace(self, moves=moves, length=length, numbers=numbers, weights=weights), found

    def sharpened(self) -> WalkState:
        """L-infinity points without the length that the softness in `nearest_points` adds."""
        if self.task.norm == "l2" or not len(self.rows):
            return self
        at_images, units = self.cells.values(self.task.images), self.cells.units
        tight = Tight.of(self.cells, self.numbers, self.weights, at_images)
        solution = self.task.solve(tight, self.length, SHARP)
        ahead = self.cells.values(self.task.ends(solution.moves))
        least = BEYOND * at_images[:, :units].abs().mean(1, keepdim=True)
        crossed = (_beyond(ahead[:, :units], ahead[:, :units], least, tight.numbers) > 0).any(1)
        length = row_norm(solution.moves, "linf")
        sharp = solution.solved & ~crossed & (length < self.length)
        return replace(self, moves=solution.moves, length=length).where(sharp, self)

    def _known(self, at_images: Tensor, current: Tensor) -> Tight:
        """The constraint of the leading other class, and the faces that were active before."""
        units = self.cells.units
        leads = current[:, units:].scatter(1, self.task.labels[:, None], -torch.inf)
        led = torch.where(self.numbers >= units, self.weights, 0.0).sum(1, keepdim=True)
        numbers = torch.cat(
            [units + leads.argmax(1, keepdim=True), self.numbers.masked_fill(self.numbers >= units, -1)], 1
        )
        return Tight.of(self.cells, numbers, torch.cat([led, self.weights], 1), at_images)


def _beyond(ahead: Tensor, current: Tensor, least: Tensor, known: Tensor) -> Tensor:
    """The fraction of the segment from ``current`` to ``ahead`` beyond each face ``(B, U)``; 0 for known faces."""
    part = -ahead / (current.clamp_min(0.0) - ahead).clamp_min(torch.finfo(ahead.dtype).tiny)
    part = functional.pad(torch.where(ahead < -least, part, 0.0), (0, 1))
    units = ahead.shape[1]
    return part.scatter(1, torch.where((known >= 0) & (known < units), known, units), 0.0)[:, :-1]


def _gathered(ends: list[tuple[Tensor, Tight]], count: int) -> tuple[Tensor, Tensor]:
    """Numbers and weights ``(B, m)`` of all problems, from the groups in which they ended."""
    kept = [(live, tight.binding()) for live, tight in ends]
    width = max(tight.numbers.shape[1] for _, tight in kept)
    numbers = torch.full((count, width), -1, device=ends[0][0].device)
    weights = torch.zeros(count, width, dtype=torch.float64, device=numbers.device)
    for live, tight in kept:
        numbers[live, : tight.numbers.shape[1]] = tight.numbers
        weights[live, : tight.numbers.shape[1]] = tight.weights
    return numbers, weights
