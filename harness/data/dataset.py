"""What a data set is: its images as uint8, its splits, and the probe drawn from a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

CLASSES = 10  # of every one of them


class DataError(ValueError):
    """Data that is missing, damaged or asked for by a wrong name; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images ``(N, C, H, W)`` uint8 in ``[0, levels]``, where ``levels`` means 1.0; labels ``(N,)`` int64.

    ``ids`` ``(N,)`` int64 are the images' places in the data set's split, which a subset keeps; by default
    their rows.
    """

    images: Tensor
    labels: Tensor
    levels: int
    ids: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not len(self.ids):
            object.__setattr__(self, "ids", torch.arange(len(self.images)))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor | slice | None = None) -> Tensor:
        """Return the images at ``index`` (default all): ``(B, C, H, W)`` float32 in ``[0, 1]``."""
        images = self.images if index is None else self.images[index]
        return images.float() / self.levels

    def subset(self, index: Tensor) -> Split:
        """The images at ``index`` ``(M,)`` int64, in that order."""
        return Split(self.images[index], self.labels[index], self.levels, self.ids[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split.

    ``checksums`` holds the SHA-256 of the unpacked content of every file read (of the arrays for ``digits``),
    which does not depend on how the files were packed.
    """

    name: str
    classes: int
    train: Split
    test: Split
    checksums: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def draw_probe(split: Split, count: int, seed: int) -> Tensor:
    """Draw the images to track: sorted distinct ``(min(count, len(split)),)`` int64 indices.

    The global generator is left alone. A ``count`` below 1 raises ValueError.
    """
    if count < 1:
        raise ValueError(f"expected a probe of at least 1 image, got {count}; ask for more")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values
