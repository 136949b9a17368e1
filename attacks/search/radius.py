"""Fixed-radius attacks as margin estimators: a radius per image, bisected in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.geometry import boundary_fraction, farthest_in_box
from attacks.isolation import Classifier
from attacks.search.linearised import first_order_margin, left_class
from attacks.trace import Record
from attacks.types import Norm

# largest distance of a witness in the free domain, as a multiple of the largest in the box
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
    """Bisect the radius of a fixed-radius attack for each image.

    A row starts slightly above its first-order margin, and its radius triples until the attack succeeds. Then the
    radius is bisected between the largest failure and the distance of the best witness, which is itself bisected on
    its segment. Failure is not monotone in the radius, so that the lower end is heuristic.

    Args:
        attempt: runs the attack on the given rows ``(A,)`` with the given radii ``(A,)``. Its witnesses are the points
            that it passes through ``model``, which adds them to the record.
        rounds: the most calls of ``attempt``.
        tolerance: a row is done when its bracket is narrower than this fraction of its distance.

    Returns:
        ``(B, ...)``: each row's nearest witness, or the image itself.
    """
    reach = farthest_in_box(images, norm) * (1.0 if model.domain == "box" else FREE_REACH)
    radius = torch.minimum(1.05 * first_order_margin(model, images, labels, norm)[0], reach)
    low = torch.zeros_like(radius)
    with model.recording(images, labels, norm) as record:
        for _ in range(rounds):
            high = record.distance.clone()
            # a row without a witness is done once it has failed at its full reach
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

    The tolerance of 1e-4 is for witnesses on the sphere itself, where rounding would decide.
    """
    return record.distance[rows] > radius * (1.0 + 1e-4)


def _tighten(model: Classifier, record: Record, images: Tensor, labels: Tensor, rows: Tensor) -> None:
    """Bisect the segments of new witnesses; the record keeps the nearer points."""
    if not len(rows):
        return
    ends = record.points[rows].clone()

    def is_outside(middle: Tensor, active: Tensor) -> Tensor:
        with torch.no_grad(), model.rows(rows[active]):
            return left_class(model(middle), labels[rows[active]])

    boundary_fraction(is_outside, images[rows], ends, tolerance=0.01, passes=8)
