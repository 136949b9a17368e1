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

        A row's answer does not depend on the other rows. No image is its own answer.

        Args:
            rank: 0 for the nearest, 1 for the next.

        Returns:
            The points ``(B, ...)``, the image itself where there is none; whether there is one, ``(B,)`` bool.
        """
        if not len(self.points) or not len(images):
            return images.clone(), torch.zeros_like(labels, dtype=torch.bool)
        # no distances are implemented in half precision; matrix products would round differently in another batch
        flat, rows = (
            points.flatten(1).to(torch.promote_types(points.dtype, torch.float32)) for points in (self.points, images)
        )
        parts = [
            torch.cdist(part, flat, compute_mode="donot_use_mm_for_euclid_dist")
            for part in torch.split(rows, max(1, ENTRIES // flat.numel()))
        ]
        distance = torch.cat(parts)
        # draws and rounding can give an image that is in the pool another class than its label
        known = (self.classes >= 0) & (self.classes != labels[:, None]) & (distance > 0)
        order = torch.where(known, distance, torch.inf).argsort(dim=1, stable=True)
        there = known.sum(1) > rank
        chosen = self.points[order[:, min(rank, order.shape[1] - 1)]]
        return torch.where(per_row(there, images).bool(), chosen, images), there


def predicted(view: Classifier, points: Tensor) -> Pool:
    """A pool of points ``(P, C, H, W)`` in the model's bounds, in ``[0, 1]`` units; its forwards are not counted."""
    view.start_chunk(0)
    every = view.classify(points) if len(points) else points.new_zeros(0, 2)
    classes = torch.where(every.isfinite().all(1), every.argmax(1), -1)
    return Pool(view.from_pixels(points), classes)


def uses_pool(estimator: Estimator) -> bool:
    """Whether the estimator takes a pool."""
    return bool(getattr(estimator, "uses_pool", False))


def with_pool(estimator: Estimator, pool: Pool | None) -> dict[str, Pool]:
    """The keyword of `Estimator.perturb`, for an estimator that takes a pool, if there is one."""
    return {} if pool is None or not uses_pool(estimator) else {"pool": pool}
