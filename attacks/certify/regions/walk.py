"""Walk from points of other classes to local minima of the distance on the boundary, region by region."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attacks.certify.regions.faces import Task, WalkState
from attacks.certify.regions.starts import towards_classes
from attacks.geometry import dual_norm, row_norm

# the most regions that a walk enters
REGIONS = 40
# failed attempts to cross a region's faces before a walk ends
TRIES = 3
# relative reduction of the distance that counts as progress
GAIN = 1e-5
# number of classes to step towards; their points are followed if nearer than this factor of the best distance
CLASSES = 9
NEAR = 1.6
# factor of the best distance that the first region of a walk must reach
PROMISING = 1.03
# slack of the distance in the first region: a witness may already be its nearest point
SLACK = 1e-3


def nearest_boundary(task: Task, points: Tensor) -> Tensor:
    """Boundary points near images, by walks from points of other classes and from points of the nearest classes.

    Args:
        points: ``(B, C, H, W)`` float64, inside the limits and of other classes.

    Returns:
        ``(B, C, H, W)``, no farther than ``points``; those that are nearer lie on the boundary up to rounding.
    """
    count = len(points)
    owners, classes = _nearest_classes(task)
    starts, reach = towards_classes(task.select(owners), classes)
    owners = torch.cat([torch.arange(count, device=points.device), owners])
    starts, reach = torch.cat([points, starts]), torch.cat([row_norm(points - task.images, task.norm), reach])
    best, length = points.clone(), reach[:count].clone()
    # the nearest start first: its result shows most of the others to be too far
    rank = _ranks(reach, owners)
    for chosen in (rank == 0, rank > 0):
        going = chosen & (reach < NEAR * length[owners])
        rows = owners[going]
        if not len(rows):
            break
        ends = local_minima(task.select(rows), starts[going], PROMISING * length[rows])
        distance = row_norm(ends - task.images[rows], task.norm)
        winner = (_ranks(distance, rows) == 0) & (distance < length[rows])
        best[rows[winner]], length[rows[winner]] = ends[winner], distance[winner]
    return best


def local_minima(task: Task, points: Tensor, most: Tensor) -> Tensor:
    """Walk to local minima of the distance to the image on the boundary.

    Each walk moves to the nearest boundary point of its region and then to those of the neighbouring regions across
    the faces that are active there. Crossing a face keeps the point, so that no walk step increases the distance.

    Args:
        points: ``(B, C, H, W)`` of other classes.
        most: ``(B,)`` distance that the first region must fall below.

    Returns:
        ``(B, C, H, W)``, no farther than ``points``; the points themselves where the first region does not fall below
        ``most``.
    """
    state = WalkState.at(task, points)
    best, length = state.moves.clone(), state.length.clone()

    def end(ended: WalkState) -> None:
        ended = ended.sharpened()
        nearer = ended.length < length[ended.rows]
        best[ended.rows[nearer]], length[ended.rows[nearer]] = ended.moves[nearer], ended.length[nearer]

    state, found = replace(state, length=torch.minimum(length * (1 + SLACK), most)).nearest_points()
    state = state.select(found)
    tries = torch.zeros_like(state.rows)
    for _ in range(REGIONS):
        if not len(state.rows):
            break
        flips = _ways(state, tries)
        going = flips.any(1) & (tries < TRIES)
        end(state.select(~going))
        if not going.any():
            break
        state, tries = state.select(going), tries[going]
        ahead, found = replace(state, cells=state.cells.flipped(flips[going])).nearest_points()
        nearer = found & (ahead.length < state.length * (1 - GAIN))
        state, tries = ahead.where(nearer, state), torch.where(nearer, 0, tries + 1)
    else:
        end(state)
    return task.ends(best)


def _ways(state: WalkState, tries: Tensor) -> Tensor:
    """The faces ``(B, U)`` bool to cross: in the first try all that promise a gain, then one at a time, the best first.

    The point is also the nearest one beyond a face if the reversed constraint of the face has no negative weight there.
    That weight is minus the present one, less the contribution of the unit's output, whose slope changes at the face,
    to the weighted sum.
    """
    weights = state.by_number()
    of_faces = weights[:, : state.cells.units]
    promise = torch.where(of_faces > 0, of_faces + state.cells.bends * state.cells.pull(weights), 0.0)
    good = promise > 1e-6 * weights.amax(1, keepdim=True)
    rank = torch.where(good, promise, 0.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return good & ((tries == 0)[:, None] | (rank == (tries - 1)[:, None]))


def _nearest_classes(task: Task) -> tuple[Tensor, Tensor]:
    """Pairs of images ``(P,)`` and classes ``(P,)``: the nearest boundaries when linearised at the image."""
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
    """The rank of each value ``(P,)`` among the values of its owner, from the smallest."""
    order = values.argsort(stable=True)
    order = order[owners[order].argsort(stable=True)]
    first = torch.bincount(owners).cumsum(0) - torch.bincount(owners)
    place = torch.arange(len(values), device=values.device) - first[owners[order]]
    return torch.empty_like(place).scatter(0, order, place)
