"""Descent to the nearest point of another class: batched fast-minimum-norm steps, several walks per image.

After Pintor et al. 2021 (FMN, Algorithm 1) with DeepFool's linearised step (Moosavi-Dezfooli et al. 2016) until the
boundary is first crossed. One forward and one vector-Jacobian product per walk and step. Departs from FMN: steps are in
units of the radius, not of pixels, and are steepest in the attack's own norm (signs for L-infinity); the radius never
exceeds the distance of the walk's best witness once it has one; the loss is the logit difference to the walk's own
target, or to the leading class once the label does not lead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attacks.geometry import (
    ball_point,
    dual_norm,
    farthest_in_box,
    least_step,
    per_row,
    project,
    row_norm,
    steepest_step,
)
from attacks.isolation import Classifier
from attacks.search.linearised import slopes
from attacks.search.radius import FREE_REACH
from attacks.seeds import seeded_directions
from attacks.types import Bounds, Norm

# relative overshoot of a linearised step: exactly on the boundary, rounding would decide the class
OVERSHOOT = 0.02
# relative enlargement of balls, for the same reason
NUDGE = 1e-3
# a point is optimal to first order if it is less than this fraction beyond the boundary, and if its move deviates from
# the gradient's direction by less than this fraction
ACROSS = 0.01
ALIGNED = 1e-4


@dataclass
class Walks:
    """The state of W walks, one row each.

    Attributes:
        owner: ``(W,)`` int64, the row of the image that the walk belongs to.
        target: ``(W,)`` int64, the target class; the image's label stands for the leading other class at each step.
        point: ``(W, ...)`` the current point.
        drift: ``(W, ...)`` decaying sum of the normalised gradients.
        radius: ``(W,)`` float64, radius of the ball that contains the point.
        distance: ``(W,)`` float64, distance of the nearest witness; inf without a witness.
        witness: ``(W, ...)`` the nearest witness.
        done: ``(W,)`` bool: optimal to first order, or without a gradient to follow.
    """

    owner: Tensor
    target: Tensor
    point: Tensor
    drift: Tensor
    radius: Tensor
    distance: Tensor
    witness: Tensor
    done: Tensor

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Tensor) -> Walks:
        """The walks of ``rows``, an index or a mask."""
        return Walks(*(getattr(self, field.name)[rows] for field in fields(self)))

    def join(self, other: Walks) -> Walks:
        """These walks, then the others."""
        return Walks(*(torch.cat([getattr(w, field.name) for w in (self, other)]) for field in fields(self)))


@dataclass
class Nearest:
    """The nearest witness of each image.

    Attributes:
        witness: ``(B, ...)``, the image itself without one.
        distance: ``(B,)`` float64; inf without one.
    """

    witness: Tensor
    distance: Tensor

    @classmethod
    def none(cls, images: Tensor) -> Nearest:
        """No witness yet."""
        return cls(images.clone(), torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device))

    @classmethod
    def of(cls, walks: Walks, images: Tensor) -> Nearest:
        """What these walks have found."""
        nearest = cls.none(images)
        nearest.note(walks)
        return nearest

    def note(self, walks: Walks) -> None:
        """Keep what walks have found that is nearer."""
        least = self.distance.scatter_reduce(0, walks.owner, walks.distance, "amin")
        winner = (walks.distance < self.distance[walks.owner]) & (walks.distance == least[walks.owner])
        self.witness[walks.owner[winner]] = walks.witness[winner]
        self.distance = least


def set_out(images: Tensor, owner: Tensor, target: Tensor) -> Walks:
    """New walks that begin at their images."""
    zero = torch.zeros(len(owner), dtype=torch.float64, device=images.device)
    point = images[owner]
    drift = torch.zeros_like(point)
    return Walks(owner, target, point, drift, zero, zero + torch.inf, point.clone(), torch.zeros_like(owner).bool())


def advance(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    walks: Walks,
    norm: Norm,
    *,
    stride: Tensor,
    shrink: Tensor,
    momentum: float,
) -> None:
    """Classify the current points, keep nearer witnesses, and take one step; in place.

    Args:
        images, labels: ``(B, ...)`` and ``(B,)``, indexed by ``walks.owner``.
        stride: ``(W,)`` float64, length of the step over the radius.
        shrink: ``(W,)`` float64, relative reduction of the radius outside the class, and its growth inside.
        momentum: factor of the drift.
    """
    with model.rows(walks.owner):
        gap, lead, gradient = slopes(model, walks.point, labels[walks.owner], walks.target)
    note_witnesses(walks, images, lead < 0, norm)
    move(walks, images, model, gap, gradient, norm, outside=lead < 0, stride=stride, shrink=shrink, momentum=momentum)


def kick(
    walks: Walks,
    chosen: Tensor,
    images: Tensor,
    bounds: Bounds,
    seeds: Tensor,
    norm: Norm,
    *,
    size: float,
    stream: Tensor,
) -> None:
    """Move the ``chosen`` ``(W,)`` walks to a random point around their witness; in place.

    Walks without a witness stay. The length is ``size`` times the witness's distance. The direction is drawn from the
    image's seed, the walk's target and the image's ``stream`` ``(B,)`` int64.
    """
    rows = torch.nonzero(chosen & walks.distance.isfinite()).flatten()
    if not len(rows):
        return
    owner = walks.owner[rows]
    walk_seeds = seeds[owner] + 1000003 * walks.target[rows] + 7919 * stream[owner]
    direction = seeded_directions(images[owner], walk_seeds, norm, 0)
    walks.point[rows] = ball_point(walks.witness[rows], direction, size * walks.distance[rows], bounds)
    walks.drift[rows] = 0.0
    walks.radius[rows] = row_norm(walks.point[rows] - images[owner], norm)


def note_witnesses(walks: Walks, images: Tensor, outside: Tensor, norm: Norm) -> None:
    """Keep the points that are ``outside`` ``(W,)`` and nearer than the walk's witness."""
    distance = row_norm(walks.point - images[walks.owner], norm)
    nearer = outside & (distance < walks.distance) & (distance > 0)
    walks.distance = torch.where(nearer, distance, walks.distance)
    walks.witness = torch.where(per_row(nearer, walks.point).bool(), walks.point, walks.witness)


def move(
    walks: Walks,
    images: Tensor,
    model: Classifier,
    gap: Tensor,
    gradient: Tensor,
    norm: Norm,
    *,
    outside: Tensor,
    stride: Tensor,
    shrink: Tensor,
    momentum: float,
) -> None:
    """One step against the gradient ``(W, ...)`` of ``gap`` ``(W,)``, inside the new radius; in place."""
    origin = images[walks.owner]
    length = row_norm(walks.point - origin, norm)
    slope = dual_norm(gradient, norm)
    linear = gap.double().abs() / slope
    reach = farthest_in_box(origin, norm) * (1.0 if model.domain == "box" else FREE_REACH)
    has_witness = walks.distance.isfinite()
    # without a witness the radius grows to the linearised boundary, but at most to twice the present distance
    ahead = torch.where(length > 0, length + torch.minimum(linear, length), linear)
    inward = torch.minimum(walks.radius, walks.distance) * (1 - shrink)
    outward = torch.where(
        has_witness, torch.minimum(walks.radius * (1 + shrink), walks.distance), torch.maximum(ahead, walks.radius)
    )
    dead = ~(slope > 0) | ~linear.isfinite()
    walks.done |= _optimal(walks, origin, gap, gradient, slope, outside, norm)
    walks.radius = torch.where(dead, walks.radius, torch.minimum(torch.where(outside, inward, outward), reach))
    # on an exact tie the radius, and with it the step, is 0
    dead |= walks.radius == 0
    walks.done |= dead
    unit = gradient / per_row(row_norm(gradient, "l2"), gradient)
    walks.drift = torch.where(per_row(dead, unit).bool(), walks.drift, momentum * walks.drift + unit)
    outgoing = torch.maximum(stride, linear * (1 + OVERSHOOT) / walks.radius)
    radii = torch.minimum(torch.where(has_witness, stride, outgoing), 2.0 + 0 * stride)
    step = per_row(torch.where(dead, 0.0, radii * walks.radius), origin) * steepest_step(walks.drift, norm)
    # clipped before the projection: clipped after it, points lose length at every step
    clipped = (walks.point - step).clamp(*model.bounds)
    walks.point = origin + project(clipped - origin, walks.radius * (1 + NUDGE) + least_step(images, norm), norm)


def _optimal(
    walks: Walks, origin: Tensor, gap: Tensor, gradient: Tensor, slope: Tensor, outside: Tensor, norm: Norm
) -> Tensor:
    """Whether points just beyond the boundary are nearest to first order: their move is along the gradient there.

    The box is ignored. The refinement of `measure` moves such points back to the boundary along the segment.
    """
    offset = walks.point - origin
    gained = -(gradient * offset).flatten(1).sum(1).double()
    aligned = gained >= slope * row_norm(offset, norm) * (1 - ALIGNED)
    return outside & aligned & (gap.double().abs() <= ACROSS * gained)
