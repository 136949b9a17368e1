"""The pool: images whose predictions are known, from which walks towards other images set out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.estimator import Estimator
from attacks.geometry import per_row
from attacks.isolation import Classifier

# entries of the distances' intermediate values at a time
ENTRIES = 2**24


@dataclass(frozen=True)
class Pool:
    """Images and their predictions.

    Attributes:
        points: ``(P, C, H, W)``, in the units of the images that are compared with them.
        classes: ``(P,)`` int64, the predicted classes; -1 where the logits are not finite.
    """

    points: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Pool:
        """The same on the device."""
        return Pool(self.points.to(device), self.classes.to(device))

    def nearest_others(self, images: Tensor, labels: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Per image, the pool's point of another class than ``labels`` ``(B,)`` that is nearest in L2.

        A row's answer does not depend on the other rows. An image in the pool has its own class, so that it never is
        its own answer.

        Args:
            rank: 0 for the nearest, 1 for the next.

        Returns:
            The points ``(B, ...)``, the image itself where there is none; their classes ``(B,)`` int64, -1 there.
        """
        if not len(self.points) or not len(images):
            return images.clone(), torch.full_like(labels, -1)
        flat, size = self.points.flatten(1), max(1, ENTRIES // self.points.numel())
        # matrix products would round differently in another batch
        parts = [
            torch.cdist(rows, flat, compute_mode="donot_use_mm_for_euclid_dist")
            for rows in torch.split(images.flatten(1), size)
        ]
        distance = torch.cat(parts)
        known = (self.classes >= 0) & (self.classes != labels[:, None])
        order = torch.where(known, distance, torch.inf).argsort(dim=1, stable=True)
        there = known.sum(1) > rank
        chosen = order[:, min(rank, order.shape[1] - 1)]
        points = torch.where(per_row(there, images).bool(), self.points[chosen], images)
        return points, torch.where(there, self.classes[chosen], -1)


def predicted(view: Classifier, points: Tensor) -> Pool:
    """A pool of points ``(P, C, H, W)`` in the model's bounds, in ``[0, 1]`` units; a forward each, not counted."""
    with torch.no_grad():
        logits = [view.logits(part.clone()) for part in torch.split(points, view.batch_size)]
    every = torch.cat(logits) if logits else points.new_zeros(0, 2)
    classes = torch.where(every.isfinite().all(1), every.argmax(1), -1)
    return Pool(view.from_pixels(points), classes)


def uses_pool(estimator: Estimator) -> bool:
    """Whether the estimator takes a pool."""
    return bool(getattr(estimator, "uses_pool", False))


def with_pool(estimator: Estimator, pool: Pool | None) -> dict[str, Pool]:
    """The keyword of `Estimator.perturb`, for an estimator that takes a pool, if there is one."""
    return {} if pool is None or not uses_pool(estimator) else {"pool": pool}
