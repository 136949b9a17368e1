"""Descent to the nearest point of another class: batched fast-minimum-norm steps, several walks an image.

After Pintor et al. 2021 (FMN, Algorithm 1) with DeepFool's linearised step (Moosavi-Dezfooli et al. 2016) until the
boundary is first crossed. One forward and one vector-Jacobian product a walk and step. Departs from FMN: steps are
measured in the radius, not in pixels, and are steepest in the attack's own norm (signs for L-infinity); the radius
never exceeds the walk's best witness once there is one; the loss is the logit difference to the walk's own target, and
to whatever class leads once the label no longer does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attacks.geometry import dual_norm, farthest_in_box, least_step, per_row, project, row_norm, steepest_step
from attacks.isolation import Classifier
from attacks.search.radius import FREE_REACH, ball_point
from attacks.seeds import seeded_directions
from attacks.types import Bounds, Norm

# a linearised step ends this part beyond the boundary: exactly on it, rounding would decide
OVERSHOOT = 0.02
# balls are larger by this part, for the same reason
NUDGE = 1e-3
# a point that is less than this part across, and went there with this little loss, has nothing left to gain
ACROSS = 0.01
ALIGNED = 1e-4


@dataclass
class Walks:
    """Walks in flight, one row each.

    Attributes:
        owner: ``(W,)`` int64, the row of the image that the walk belongs to.
        target: ``(W,)`` int64, the class that it heads for; the image's own for whichever is next at each step.
        point: ``(W, ...)`` where it stands.
        drift: ``(W, ...)`` decaying sum of the normalised gradients.
        radius: ``(W,)`` float64, of the ball that it may not leave.
        distance: ``(W,)`` float64, of its nearest witness; inf without one.
        witness: ``(W, ...)``.
        done: ``(W,)`` bool, nothing left to gain or no gradient to follow.
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
        """These walks only: ``rows`` is an index or a mask."""
        return Walks(*(getattr(self, field.name)[rows] for field in fields(self)))

    def join(self, other: Walks) -> Walks:
        """These walks and those."""
        return Walks(*(torch.cat([getattr(w, field.name) for w in (self, other)]) for field in fields(self)))


def set_out(images: Tensor, owner: Tensor, target: Tensor) -> Walks:
    """Walks that stand on their images."""
    zero = torch.zeros(len(owner), dtype=torch.float64, device=images.device)
    point = images[owner]
    nothing = torch.zeros_like(point)
    return Walks(owner, target, point, nothing, zero, zero + torch.inf, point.clone(), torch.zeros_like(owner).bool())


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
    """Look at where the walks stand, keep what is a nearer witness, and take one step; in place.

    Args:
        images, labels: ``(B, ...)`` and ``(B,)``, indexed by ``walks.owner``.
        stride: ``(W,)`` float64, length of the step over the radius.
        shrink: ``(W,)`` float64, by what part the radius shrinks outside of the class and grows inside.
        momentum: what remains of the drift.
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
    """Put those ``chosen`` ``(W,)`` that have a witness beside it, at ``size`` of its distance; in place.

    The direction is drawn from the image's seed, the walk's target and the image's ``stream`` ``(B,)`` int64.
    """
    rows = torch.nonzero(chosen & walks.distance.isfinite()).flatten()
    if not len(rows):
        return
    owner = walks.owner[rows]
    own = seeds[owner] + 1000003 * walks.target[rows] + 7919 * stream[owner]
    direction = seeded_directions(images[owner], own, norm, 0)
    walks.point[rows] = ball_point(walks.witness[rows], direction, size * walks.distance[rows], bounds)
    walks.drift[rows] = 0.0
    walks.radius[rows] = row_norm(walks.point[rows] - images[owner], norm)


def slopes(model: Classifier, points: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of the label less the target's, or the leader's once the label trails; its gradient; one pass each way.

    A target that is the label itself stands for the largest other logit.

    Returns:
        ``(W,)`` that gap, ``(W,)`` the label's logit less the largest other one, ``(W, ...)`` the gap's gradient.
    """
    leaf = points.detach().clone().requires_grad_()
    logits = model(leaf)
    own = logits.gather(1, labels[:, None])[:, 0]
    lead = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    gap = torch.where((lead < 0) | (targets == labels), lead, own - logits.gather(1, targets[:, None])[:, 0])
    (gradient,) = torch.autograd.grad(gap.sum(), leaf)
    return gap.detach(), lead.detach(), gradient


def note_witnesses(walks: Walks, images: Tensor, outside: Tensor, norm: Norm) -> None:
    """Keep the points that are ``outside`` ``(W,)`` and nearer than what the walk has."""
    distance = row_norm(walks.point - images[walks.owner], norm)
    nearer = outside & (distance < walks.distance) & (distance > 0)
    walks.distance = torch.where(nearer, distance, walks.distance)
    walks.witness = torch.where(per_row(nearer, walks.point).bool(), walks.point, walks.witness)


def nearest_witnesses(walks: Walks, images: Tensor) -> Tensor:
    """The nearest witness that any walk of an image has, or the image itself: ``(B, ...)``."""
    none = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    least = none.scatter_reduce(0, walks.owner, walks.distance, "amin")
    winner = walks.distance.isfinite() & (walks.distance == least[walks.owner])
    result = images.clone()
    result[walks.owner[winner]] = walks.witness[winner]
    return result


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
    here = row_norm(walks.point - origin, norm)
    slope = dual_norm(gradient, norm)
    linear = gap.double().abs() / slope
    reach = farthest_in_box(origin, norm) * (1.0 if model.domain == "box" else FREE_REACH)
    found = walks.distance.isfinite()
    # without a witness the walk goes out to the linearised boundary, yet no farther than twice as far as it is
    ahead = torch.where(here > 0, here + torch.minimum(linear, here), linear)
    inward = torch.minimum(walks.radius, walks.distance) * (1 - shrink)
    outward = torch.where(
        found, torch.minimum(walks.radius * (1 + shrink), walks.distance), torch.maximum(ahead, walks.radius)
    )
    dead = ~(slope > 0) | ~linear.isfinite()
    walks.done |= _optimal(walks, origin, gap, gradient, slope, outside, norm)
    walks.radius = torch.where(dead, walks.radius, torch.minimum(torch.where(outside, inward, outward), reach))
    # on an exact tie there is no radius to step by
    dead |= walks.radius == 0
    walks.done |= dead
    unit = gradient / per_row(row_norm(gradient, "l2"), gradient)
    walks.drift = torch.where(per_row(dead, unit).bool(), walks.drift, momentum * walks.drift + unit)
    length = torch.minimum(
        torch.where(found, stride, torch.maximum(stride, linear * (1 + OVERSHOOT) / walks.radius)), 2.0 + 0 * stride
    )
    step = per_row(torch.where(dead, 0.0, length * walks.radius), origin) * steepest_step(walks.drift, norm)
    # clipped before it is projected: clipped afterwards, points lose length at every step
    clipped = (walks.point - step).clamp(*model.bounds)
    walks.point = origin + project(clipped - origin, walks.radius * (1 + NUDGE) + least_step(images, norm), norm)


def _optimal(
    walks: Walks, origin: Tensor, gap: Tensor, gradient: Tensor, slope: Tensor, outside: Tensor, norm: Norm
) -> Tensor:
    """Whether a point just across went there the shortest way, as the gradient where it stands has it.

    To first order, and free of the box: the refinement of `measure` takes the rest back on the segment.
    """
    offset = walks.point - origin
    gained = -(gradient * offset).flatten(1).sum(1).double()
    aligned = gained >= slope * row_norm(offset, norm) * (1 - ALIGNED)
    return outside & aligned & (gap.double().abs() <= ACROSS * gained)
