"""Records of an estimator's run: the nearest verified point per row, and its distance against passes spent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks.geometry import per_row, row_norm
from attacks.types import Bounds, Norm


class Trace:
    """Distance of the nearest verified point against passes spent, per image; the view reports every batch to it.

    A point counts if it passes through the model, lies in the domain and has another class; a later check would only
    confirm it. Where a library passes a batch of another size than the rows it was given, the rows are unknown. Such
    passes are counted in ``hidden`` and their points left out: the image's curve is then too high until `measure`,
    whose rows are always known, checks the result.

    Attributes:
        rows: ``(E,)`` int64, one entry per improvement of an image's nearest point: the image.
        passes: ``(E,)`` float64, forwards and backwards spent on the image until then, including this forward.
        distance: ``(E,)`` float64, in the images' own units, without the final refinement.
        hidden: ``(N,)`` float64, forwards per image of batches whose rows are unknown.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self._hidden: list[Tensor] = []
        self._first = 0

    @property
    def rows(self) -> Tensor:
        return torch.cat([entry[0] for entry in self._entries] or [torch.zeros(0, dtype=torch.int64)])

    @property
    def passes(self) -> Tensor:
        return torch.cat([entry[1] for entry in self._entries] or [torch.zeros(0, dtype=torch.float64)])

    @property
    def distance(self) -> Tensor:
        return torch.cat([entry[2] for entry in self._entries] or [torch.zeros(0, dtype=torch.float64)])

    @property
    def hidden(self) -> Tensor:
        return torch.cat(self._hidden or [torch.zeros(0, dtype=torch.float64)])

    def start_chunk(self, images: Tensor, labels: Tensor, norm: Norm, bounds: Bounds) -> None:
        """Begin the next chunk of images ``(B, C, H, W)`` with ``labels`` ``(B,)``; ``bounds`` limit the witnesses."""
        self._first += len(self._hidden[-1]) if self._hidden else 0
        self._hidden.append(torch.zeros(len(images), dtype=torch.float64))
        self._images, self._labels, self._norm, self._bounds = images, labels, norm, bounds
        # rounding of the map from [0, 1] to the bounds in the images' dtype
        self._slack = 4 * torch.finfo(images.dtype).eps * max((abs(b) for b in bounds if math.isfinite(b)), default=0)
        self._least = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)

    def see(self, points: Tensor, logits: Tensor, active: Tensor, passes: Tensor) -> None:
        """Record a batch ``(A, C, H, W)`` in the images' units.

        Args:
            logits: ``(A, K)`` of the batch.
            active: rows of the chunk that the batch belongs to; with a batch of another size, the rows are unknown.
            passes: ``(B,)`` passes so far of all rows of the chunk.
        """
        if len(points) != len(active):
            self._hidden[-1][active.cpu()] += len(points) / max(len(active), 1)
            return
        low, high = self._bounds[0] - self._slack, self._bounds[1] + self._slack
        inside = ((points >= low) & (points <= high)).flatten(1).all(1)
        moved = (logits.argmax(1) != self._labels[active]) & logits.isfinite().all(1)
        distance = row_norm(points - self._images[active].to(points.dtype), self._norm)
        distance = torch.where(inside & moved, distance, math.inf)
        # a row may occur several times in a batch
        least = self._least.scatter_reduce(0, active, distance, "amin")
        nearer = torch.nonzero(least < self._least).flatten()
        self._least = least
        if len(nearer):
            self._entries.append((nearer.cpu() + self._first, passes[nearer].cpu(), least[nearer].cpu()))


class Record:
    """The nearest point of another class per row, of all points passed through the model so far.

    Of points at the same distance, such as iterates on a sphere, the one with the largest lead of the other class is
    kept, as it promises the largest gain by bisection; otherwise rounding would decide.
    """

    SAME = 1e-5

    def __init__(self, images: Tensor, labels: Tensor, norm: Norm, bounds: Bounds) -> None:
        self.images, self.labels, self.norm, self.bounds = images, labels, norm, bounds
        self.points = images.clone()
        self.distance = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)
        self.least, self.depth = self.distance.clone(), torch.zeros_like(self.distance)

    def see(self, points: Tensor, logits: Tensor, rows: Tensor) -> None:
        """Keep the ``points`` ``(A, ...)`` of ``rows`` ``(A,)`` that changed class inside the bounds and are nearer."""
        images = self.images[rows]
        distance = row_norm(points - images.to(points.dtype), self.norm)
        inside = ((points >= self.bounds[0]) & (points <= self.bounds[1])).flatten(1).all(1)
        moved = (logits.argmax(1) != self.labels[rows]) & logits.isfinite().all(1)
        depth = (logits.amax(1) - logits.gather(1, self.labels[rows, None])[:, 0]).double()
        least = self.least[rows]
        deeper = (distance < least * (1 + self.SAME)) & (depth > self.depth[rows])
        better = inside & moved & (distance > 0) & ((distance < least * (1 - self.SAME)) | deeper)
        kept = rows[better]
        self.points[kept] = points[better].to(self.points.dtype)
        self.distance[kept], self.depth[kept] = distance[better], depth[better]
        self.least[kept] = torch.minimum(least, distance)[better]

    def improve(self, candidates: Tensor) -> Tensor:
        """The recorded points ``(B, ...)``; ``candidates`` for rows without one."""
        return torch.where(per_row(self.distance.isfinite(), self.points).bool(), self.points, candidates)
