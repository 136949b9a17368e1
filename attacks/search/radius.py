"""Fixed-radius attacks as margin estimators: every image's own radius, bisected in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.geometry import boundary_fraction, dual_norm, farthest_in_box, per_row
from attacks.isolation import Classifier
from attacks.trace import Record
from attacks.types import Norm

# how much farther than the box a free witness is looked for
FREE_REACH = 16.0


def bisect_radius(
    attempt: Callable[[Tensor, Tensor, Record], None],
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    *,
    rounds: int,
    tolerance: float = 0.01,
) -> Tensor:
    """Shrink each image's radius around its best witness so far.

    A row starts a little above its first-order margin and triples until the attack succeeds; then
    its radius is bisected between the largest failure and the best witness's distance, itself
    bisected on its segment. Failure is not monotone in the radius, so the lower end is heuristic.

    Args:
        attempt: runs the attack on these rows ``(A,)`` with these radii ``(A,)``; what it finds is what
            it sends through ``model``, which keeps it in the record.
        rounds: calls of ``attempt``.
        tolerance: a row is done when its bracket is narrower than this part of its distance.

    Returns:
        ``(B, ...)``: each row's nearest witness, or the image itself.
    """
    reach = farthest_in_box(images, norm) * (1.0 if model.domain == "box" else FREE_REACH)
    radius = torch.minimum(1.05 * first_order_margin(model, images, labels, norm)[0], reach)
    low = torch.zeros_like(radius)
    with model.recording(images, labels, norm) as record:
        for _ in range(rounds):
            high = record.distance.clone()
            # a row whose last failure was at its full reach has nothing left to try
            going = torch.where(high.isfinite(), high - low > tolerance * high, low < reach)
            rows = torch.nonzero(going).flatten()
            if not len(rows):
                break
            with model.rows(rows):
                attempt(rows, radius[rows], record)
            _tighten(model, record, images, labels, rows[record.distance[rows] < high[rows]])
            failed = rows[misses(record, rows, radius[rows])]
            low[failed] = torch.maximum(low[failed], radius[failed])
            middle = (torch.minimum(low, record.distance) + record.distance) / 2
            radius = torch.where(record.distance.isfinite(), middle, torch.minimum(3 * radius, reach))
        return record.points


def misses(record: Record, rows: Tensor, radius: Tensor) -> Tensor:
    """Which ``rows`` ``(A,)`` have no witness within ``radius`` ``(A,)`` yet.

    A witness often lies on the sphere itself, where rounding alone would decide.
    """
    return record.distance[rows] > radius * (1.0 + 1e-4)


def _tighten(model: Classifier, record: Record, images: Tensor, labels: Tensor, rows: Tensor) -> None:
    """Pull new witnesses back along their segments; the record keeps what is nearer."""
    if not len(rows):
        return
    ends = record.points[rows].clone()

    def is_outside(middle: Tensor, active: Tensor) -> Tensor:
        with torch.no_grad(), model.rows(rows[active]):
            moved: Tensor = model(middle).argmax(1) != labels[rows[active]]
        return moved

    boundary_fraction(is_outside, images[rows], ends, tolerance=0.01, passes=8)


def first_order_margin(model: Classifier, images: Tensor, labels: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Logit margin over the dual norm of its gradient, inf where that is zero; and the logit margin; ``(B,)`` float64.

    Both are taken absolutely, since a noisy start may already have left its class.
    """
    leaf = images.clone().requires_grad_()
    gap = logit_gap(model(leaf), labels)
    (gradient,) = torch.autograd.grad(gap.sum(), leaf)
    slope = dual_norm(gradient, norm)
    lead = gap.detach().double().abs()
    margin = lead / slope
    return torch.where((slope > 0) & margin.isfinite(), margin, torch.inf), lead


def logit_gap(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, ``(B,)``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    gap: Tensor = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return gap


def most_likely_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The classes of largest logit beside the label, ``(B, min(count, K - 1))``; the label need not lead."""
    ranked = logits.detach().argsort(1, descending=True)
    return ranked[ranked != labels[:, None]].view(len(labels), -1)[:, :count]


def ball_point(images: Tensor, direction: Tensor, radius: Tensor, bounds: tuple[float, float]) -> Tensor:
    """``images + radius * direction``, clipped to the bounds."""
    return (images + per_row(radius, images) * direction).clamp(*bounds)
