"""From points of other classes down to local minima of the distance on the boundary, region by region."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attacks.certify.regions.faces import Stand, Task
from attacks.certify.regions.starts import towards_classes
from attacks.geometry import dual_norm, row_norm

# regions that a search enters
HOPS = 40
# ways across a region's faces that are tried in vain
TRIES = 3
# part of the distance that counts as nearer
GAIN = 1e-5
# classes to walk to, and how far, in distances of the best point known, what is met there is worth following
CLASSES = 9
NEAR = 1.6
# in distances of the best known, too: what the first region of a start must lead to
PROMISING = 1.03
# the first region's own points: a witness may be the nearest already
SLACK = 1e-3


def nearest_boundary(task: Task, points: Tensor) -> Tensor:
    """Points of the boundary near images, from points of other classes and from walks to the classes nearby.

    Args:
        points: ``(B, C, H, W)`` float64, inside the limits and of other classes.

    Returns:
        ``(B, C, H, W)``; no farther than ``points``, and where they are nearer up to rounding on the boundary.
    """
    count = len(points)
    owners, classes = _nearest_classes(task)
    starts, reach = towards_classes(task.select(owners), classes)
    owners = torch.cat([torch.arange(count, device=points.device), owners])
    starts, reach = torch.cat([points, starts]), torch.cat([row_norm(points - task.images, task.norm), reach])
    best, length = points.clone(), reach[:count].clone()
    # the nearest start first, since what it leads to shows most of the others to be too far
    rank = _ranks(reach, owners)
    for chosen in (rank == 0, rank > 0):
        going = chosen & (reach < NEAR * length[owners])
        rows = owners[going]
        if not len(rows):
            break
        ends = hop(task.select(rows), starts[going], PROMISING * length[rows])
        distance = row_norm(ends - task.images[rows], task.norm)
        winner = (_ranks(distance, rows) == 0) & (distance < length[rows])
        best[rows[winner]], length[rows[winner]] = ends[winner], distance[winner]
    return best


def hop(task: Task, points: Tensor, most: Tensor) -> Tensor:
    """Local minima: every region's nearest point, then those of its neighbours across the faces that hold it there.

    Crossing keeps the point itself, so that no hop leads farther away.

    Args:
        points: ``(B, C, H, W)`` of other classes.
        most: ``(B,)`` what the distance must be below in the first region already.

    Returns:
        ``(B, C, H, W)``, no farther than the points; these themselves where the first region disappoints.
    """
    stand = Stand.at(task, points)
    best, length = stand.moves.clone(), stand.length.clone()

    def end(ended: Stand) -> None:
        ended = ended.sharpened()
        nearer = ended.length < length[ended.rows]
        best[ended.rows[nearer]], length[ended.rows[nearer]] = ended.moves[nearer], ended.length[nearer]

    stand, found = replace(stand, length=torch.minimum(length * (1 + SLACK), most)).nearest()
    stand = stand.select(found)
    tries = torch.zeros_like(stand.rows)
    for _ in range(HOPS):
        if not len(stand.rows):
            break
        flips = _ways(stand, tries)
        going = flips.any(1) & (tries < TRIES)
        end(stand.select(~going))
        if not going.any():
            break
        stand, tries = stand.select(going), tries[going]
        ahead, found = replace(stand, cells=stand.cells.flipped(flips[going])).nearest()
        nearer = found & (ahead.length < stand.length * (1 - GAIN))
        stand, tries = ahead.where(nearer, stand), torch.where(nearer, 0, tries + 1)
    else:
        end(stand)
    return task.ends(best)


def _ways(stand: Stand, tries: Tensor) -> Tensor:
    """The faces ``(B, U)`` to cross: all that promise something at first, then the best alone, the second...

    The point is the nearest one beyond a face, too, where the face's constraint, turned round, has no negative weight
    there. That is minus its weight here, less what the unit's outcome, which bends there, adds to the weighted sum.
    """
    weights = stand.by_number()
    own = weights[:, : stand.cells.units]
    promise = torch.where(own > 0, own + stand.cells.bends * stand.cells.pull(weights), 0.0)
    good = promise > 1e-6 * weights.amax(1, keepdim=True)
    rank = torch.where(good, promise, 0.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return good & ((tries == 0)[:, None] | (rank == (tries - 1)[:, None]))


def _nearest_classes(task: Task) -> tuple[Tensor, Tensor]:
    """Images ``(P,)`` and classes ``(P,)``: those whose boundary is nearest when linearised at the image."""
    cells = task.cells(task.images)
    leads = cells.values(task.images)[:, cells.units :]
    count, classes = leads.shape
    owners = torch.arange(count, device=leads.device).repeat_interleave(classes)
    numbers = cells.units + torch.arange(classes, device=leads.device).repeat(count)
    slopes = dual_norm(cells.rows(owners, numbers), task.norm).view(count, classes)
    linear = torch.where(slopes > 0, -leads / slopes, torch.inf).scatter(1, task.labels[:, None], torch.inf)
    nearest = linear.topk(min(CLASSES, classes - 1), dim=1, largest=False)
    row, rank = torch.nonzero(nearest.values.isfinite()).unbind(1)
    return row, nearest.indices[row, rank]


def _ranks(values: Tensor, owners: Tensor) -> Tensor:
    """The place of each value ``(P,)`` among its owner's, from the least."""
    order = values.argsort(stable=True)
    order = order[owners[order].argsort(stable=True)]
    first = torch.bincount(owners).cumsum(0) - torch.bincount(owners)
    place = torch.arange(len(values), device=values.device) - first[owners[order]]
    return torch.empty_like(place).scatter(0, order, place)
