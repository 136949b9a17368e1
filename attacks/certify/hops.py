"""From points of other classes to the nearest points of the boundary around them, region by region."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.certify.cells import Cells, cells_at
from attacks.certify.nearest import nearest_moves
from attacks.certify.piecewise import PiecewiseNetwork
from attacks.certify.starts import towards_classes
from attacks.estimator import Norm
from attacks.geometry import dual_norm, row_norm

# regions that an image is followed through, and solutions of a region, with more faces each time
HOPS = 40
ROUNDS = 40
# faces that are added at a time
ADDED = 8
# ways across the faces of a region that are tried in vain
TRIES = 3
# part of the distance that counts as nearer
GAIN = 1e-6
# of the mean size of the units' inputs: how far beyond a face a point still counts as inside
BEYOND = 1e-8
# classes to walk to, and how far, in distances of the point known, their points are worth following
CLASSES = 4
NEAR = 1.2


@dataclass(frozen=True)
class _Tight:
    """The constraints of a region's problem that are known to matter, ``(B, m)`` each; of number -1 where there is none.

    Attributes:
        numbers: of functionals that must not be negative. weights: multipliers, 0 where unknown.
        rows: ``(B, m, n)`` gradients. gaps: what they miss at the image.
    """

    numbers: Tensor
    weights: Tensor
    rows: Tensor
    gaps: Tensor

    def select(self, rows: Tensor) -> _Tight:
        """Some problems'."""
        return _Tight(self.numbers[rows], self.weights[rows], self.rows[rows], self.gaps[rows])

    def binding(self) -> _Tight:
        """Without those of weight 0, as far as all problems are rid of some."""
        order = (self.weights > 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        order = order[:, : int((self.weights > 0).sum(1).max())]
        kept = _Tight(*(one.gather(1, order) for one in (self.numbers, self.weights)), self.rows, self.gaps)
        idle = kept.weights <= 0
        pixels = self.rows.shape[2]
        return _Tight(
            kept.numbers.masked_fill(idle, -1),
            kept.weights,
            self.rows.gather(1, order[..., None].expand(-1, -1, pixels)).masked_fill(idle[..., None], 0.0),
            self.gaps.gather(1, order).masked_fill(idle, -1.0),
        )

    def join(self, more: _Tight) -> _Tight:
        """Both."""
        return _Tight(
            torch.cat([self.numbers, more.numbers], 1),
            torch.cat([self.weights, more.weights], 1),
            torch.cat([self.rows, more.rows], 1),
            torch.cat([self.gaps, more.gaps], 1),
        )


def _tight(cells: Cells, numbers: Tensor, weights: Tensor, at_images: Tensor) -> _Tight:
    """Constraints by their numbers ``(B, m)``."""
    rows = torch.zeros(*numbers.shape, cells.pixels, dtype=at_images.dtype, device=at_images.device)
    there = numbers >= 0
    owners = torch.nonzero(there)[:, 0]
    rows[there] = cells.rows(owners, numbers[there])
    gaps = torch.where(there, -at_images.gather(1, numbers.clamp_min(0)), -1.0)
    return _Tight(numbers, torch.where(there, weights, 0.0), rows, gaps)


@dataclass(frozen=True)
class _Stand:
    """Where each image's search stands: a point of the boundary and its region.

    Attributes:
        moves: ``(B, n)`` from the image. length: ``(B,)``.
        numbers, weights: ``(B, m)`` of the region's constraints that hold the point there.
    """

    cells: Cells
    moves: Tensor
    length: Tensor
    numbers: Tensor
    weights: Tensor


def nearest_boundary(
    network: PiecewiseNetwork, images: Tensor, points: Tensor, labels: Tensor, norm: Norm, limits: tuple[float, float]
) -> Tensor:
    """Points of the boundary near images, from points of other classes and from walks to the classes nearby.

    Args:
        images, points: ``(B, C, H, W)`` float64, inside the limits. labels: ``(B,)``, the images' classes.
        limits: where points may lie; infinite in the free domain.

    Returns:
        ``(B, C, H, W)``; no farther than ``points``, and where they are nearer up to rounding on the boundary.
    """
    owners, classes = _nearest_classes(network, images, labels, norm)
    starts, reach = towards_classes(network, images[owners], labels[owners], classes, norm, limits)
    # the nearest start first, since what it leads to shows most of the others to be too far
    owners = torch.cat([torch.arange(len(images), device=images.device), owners])
    starts, reach = torch.cat([points, starts]), torch.cat([row_norm(points - images, norm), reach])
    best, length = points.clone(), reach[: len(images)].clone()
    first = _least(reach, owners, len(images))
    for chosen in (first, ~first):
        going = chosen & (reach < NEAR * length[owners])
        rows = owners[going]
        if not len(rows):
            break
        ends = Hopper(network, images[rows], labels[rows], norm, limits).run(starts[going])
        distance = row_norm(ends - images[rows], norm)
        winner = _least(distance, rows, len(images)) & (distance < length[rows])
        best[rows[winner]], length[rows[winner]] = ends[winner], distance[winner]
    return best


def _least(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """The first of each owner's least values: ``(P,)`` bool."""
    least = torch.full((count,), torch.inf, dtype=values.dtype, device=values.device)
    least = least.scatter_reduce(0, owners, values, "amin")
    place = torch.arange(len(values), device=values.device)
    there = torch.where(values == least[owners], place, len(values))
    first = torch.full((count,), len(values), device=values.device).scatter_reduce(0, owners, there, "amin")
    return place == first[owners]


def _nearest_classes(network: PiecewiseNetwork, images: Tensor, labels: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Images ``(P,)`` and classes ``(P,)`` to walk to: those nearest by the image's linearisation."""
    cells = cells_at(network, images, labels)
    leads = cells.values(images)[:, cells.units :]
    count, classes = leads.shape
    owner = torch.arange(count, device=images.device).repeat_interleave(classes)
    number = torch.arange(classes, device=images.device).repeat(count)
    normals = cells.rows(owner, cells.units + number).view(-1, *images.shape[1:])
    linear = -leads.flatten() / dual_norm(normals, norm).clamp_min(1e-300)
    linear = linear.view(count, classes).scatter(1, labels[:, None], torch.inf)
    nearest = linear.topk(min(CLASSES, classes), dim=1, largest=False)
    row, rank = torch.nonzero(nearest.values.isfinite()).unbind(1)
    return row, nearest.indices[row, rank]


class Hopper:
    """The search for a chunk of images."""

    def __init__(
        self, network: PiecewiseNetwork, images: Tensor, labels: Tensor, norm: Norm, limits: tuple[float, float]
    ) -> None:
        """Set out.

        Args:
            images: ``(B, C, H, W)`` float64. labels: ``(B,)``, the classes to leave.
            limits: where points may lie.
        """
        self.network, self.images, self.labels, self.norm = network, images, labels, norm
        pixels = images.flatten(1)
        self.low, self.high = (limits[0] - pixels).clamp_max(0.0), (limits[1] - pixels).clamp_min(0.0)
        self.forwards, self.backwards = torch.zeros(len(images)), torch.zeros(len(images))

    def run(self, points: Tensor) -> Tensor:
        """Points ``(B, C, H, W)`` of the boundary, up to rounding, that are no farther than these of other classes."""
        cells = cells_at(self.network, points, self.labels)
        moves = (points - self.images).flatten(1)
        result, length = moves.clone(), row_norm(moves, self.norm)
        rows = torch.arange(len(points), device=points.device)
        none = rows.new_zeros(len(points), 0)
        stand = _Stand(cells, moves, length * (1 + 1e-3), none, none.double())
        stand, found = self._nearest(rows, stand)
        tries = torch.zeros_like(rows)
        rows, stand, tries = rows[found], _select(stand, found), tries[found]
        for _ in range(HOPS):
            result[rows] = torch.where((stand.length < length[rows])[:, None], stand.moves, result[rows])
            flips = self._ways(stand, tries)
            going = flips.any(1)
            if not going.any():
                break
            rows, stand, tries, flips = rows[going], _select(stand, going), tries[going], flips[going]
            beyond = replace(stand, cells=stand.cells.flipped(flips))
            ahead, found = self._nearest(rows, beyond)
            nearer = found & (ahead.length < stand.length * (1 - GAIN))
            stand = _merge(nearer, ahead, stand)
            tries = torch.where(nearer, 0, tries + 1)
            alive = tries < TRIES
            rows, stand, tries = rows[alive], _select(stand, alive), tries[alive]
            if not len(rows):
                break
        return self.images + result.view_as(self.images)

    def _ways(self, stand: _Stand, tries: Tensor) -> Tensor:
        """The faces ``(B, U)`` to cross: all that promise something at first, then the best, the second...

        The same point is the nearest one beyond a face too where its constraint, turned round, has no negative weight.
        That weight is minus the face's own less what the unit's outcome, which bends there, adds to the weighted sum.
        """
        weights = _scattered(stand, stand.cells.units + self._classes)
        outcomes = stand.cells.pull(weights)[1]
        own = weights[:, : stand.cells.units]
        promise = torch.where(own > 0, own + stand.cells.bend * outcomes, 0.0)
        good = promise > 1e-6 * weights.amax(1, keepdim=True)
        rank = torch.where(good, promise, 0.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return good & ((tries == 0)[:, None] | (rank == (tries - 1)[:, None]))

    def _nearest(self, rows: Tensor, stand: _Stand) -> tuple[_Stand, Tensor]:
        """The nearest point of each region where another class leads, from a point of it; and whether it was found.

        Constraints come one after another: of the faces that a solution lies beyond, those that the way from the known
        point meets first.
        """
        cells, images = stand.cells, self.images[rows]
        at_images, inside = cells.values(images), cells.values(images + stand.moves.view_as(images))
        units = cells.units
        target = units + inside[:, units:].scatter(1, cells.labels[:, None], -torch.inf).argmax(1, keepdim=True)
        numbers = torch.where(stand.numbers < units, stand.numbers, -1)
        tight = _tight(cells, torch.cat([target, numbers], 1), torch.cat([_led(stand, units), stand.weights], 1), at_images)
        scale = BEYOND * at_images[:, :units].abs().mean(1, keepdim=True) if units else at_images[:, :0]
        live = torch.arange(len(rows), device=rows.device)
        moves, found = stand.moves.clone(), torch.zeros_like(rows, dtype=torch.bool)
        ends: list[tuple[Tensor, _Tight]] = []
        for _ in range(ROUNDS):
            solution = nearest_moves(
                tight.rows,
                tight.gaps,
                self.low[rows[live]],
                self.high[rows[live]],
                self.norm,
                start=tight.weights,
                known=stand.length[live],
            )
            tight = replace(tight, weights=solution.weights)
            own = cells.select(live)
            values = own.values(images[live] + solution.moves.view_as(images[live]))[:, :units]
            beyond = _beyond(values, inside[live, :units], scale[live], tight.numbers)
            crossed = (beyond > 0).any(1)
            settled = solution.solved & ~crossed
            moves[live[settled]], found[live[settled]] = solution.moves[settled], True
            ends.append((live[settled], tight.select(settled)))
            going = solution.solved & crossed
            if not going.any():
                break
            live, beyond, own = live[going], beyond[going], own.select(going)
            depth, more = beyond.topk(min(ADDED, units), dim=1)
            more = torch.where(depth > 0, more, -1)
            zeros = torch.zeros_like(depth)
            tight = tight.select(going).binding().join(_tight(own, more, zeros, at_images[live]))
        numbers, weights = _gathered(ends, len(rows))
        return _Stand(cells, moves, row_norm(moves, self.norm), numbers, weights), found

    @property
    def _classes(self) -> int:
        return self.network.blocks[-1].shape[0]


def _beyond(values: Tensor, inside: Tensor, least: Tensor, known: Tensor) -> Tensor:
    """How much of the way from inside to a point lies beyond each face ``(B, U)``; 0 for those that are none's or known."""
    part = -values / (inside.clamp_min(0.0) - values).clamp_min(1e-300)
    part = torch.where(values < -least, part, 0.0)
    padded = torch.cat([part, part[:, :1].new_zeros(len(part), 1)], 1)
    place = torch.where((known >= 0) & (known < values.shape[1]), known, values.shape[1])
    return padded.scatter(1, place, 0.0)[:, :-1]


def _led(stand: _Stand, units: int) -> Tensor:
    """The weight of the leading class before ``(B, 1)``."""
    return torch.where(stand.numbers >= units, stand.weights, 0.0).sum(1, keepdim=True)


def _scattered(stand: _Stand, size: int) -> Tensor:
    """Weights ``(B, size)`` by number."""
    place = torch.where(stand.numbers >= 0, stand.numbers, size)
    found = torch.zeros(len(place), size + 1, dtype=stand.weights.dtype, device=place.device)
    return found.scatter_add(1, place, stand.weights)[:, :-1]


def _gathered(ends: list[tuple[Tensor, _Tight]], count: int) -> tuple[Tensor, Tensor]:
    """Numbers and weights ``(B, m)`` of problems that ended one after another."""
    kept = [(live, tight.binding()) for live, tight in ends if len(live)]
    width = max((tight.numbers.shape[1] for _, tight in kept), default=0)
    device = ends[0][0].device
    numbers = torch.full((count, width), -1, device=device)
    weights = torch.zeros(count, width, dtype=torch.float64, device=device)
    for live, tight in kept:
        numbers[live, : tight.numbers.shape[1]] = tight.numbers
        weights[live, : tight.numbers.shape[1]] = tight.weights
    return numbers, weights


def _select(stand: _Stand, rows: Tensor) -> _Stand:
    return _Stand(
        stand.cells.select(rows), stand.moves[rows], stand.length[rows], stand.numbers[rows], stand.weights[rows]
    )


def _merge(chosen: Tensor, first: _Stand, second: _Stand) -> _Stand:
    """The first where chosen ``(B,)``, else the second."""
    width = max(first.numbers.shape[1], second.numbers.shape[1])

    def wide(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (one.ndim - 1)), one, other)

    return _Stand(
        replace(first.cells, signs=pick(first.cells.signs, second.cells.signs)),
        pick(first.moves, second.moves),
        pick(first.length, second.length),
        pick(wide(first.numbers, -1), wide(second.numbers, -1)),
        pick(wide(first.weights, 0.0), wide(second.weights, 0.0)),
    )
