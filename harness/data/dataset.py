"""Data sets: images as uint8, training and test split, and the choice of probe images."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

# number of classes of each built-in data set
CLASSES = 10


class DataError(ValueError):
    """A data set that is missing, damaged or unknown; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split of a data set.

    Attributes:
        images: ``(N, C, H, W)`` in ``[0, levels]``; uint8, or float32 with ``levels`` 1.
        labels: ``(N,)`` int64.
        levels: value of an image that means 1.0.
        ids: ``(N,)`` int64 row numbers in the data set's split, which a subset keeps; by default ``0..N-1``.
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
        """The images at ``index`` (default: all) as ``(B, C, H, W)`` float32 in ``[0, 1]``."""
        images = self.images if index is None else self.images[index]
        return images.float() / self.levels

    def subset(self, index: Tensor) -> Split:
        """The split of the images at ``index``, ``(M,)`` int64, in that order."""
        return Split(self.images[index], self.labels[index], self.levels, self.ids[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split.

    Attributes:
        name: text that names the data set on the command line.
        classes: number of classes.
        checksums: SHA-256 per file read, of its unpacked content, so that packing does not matter; of ``digits`` and
            of the user's own data, SHA-256 per array.
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
    """Draw the indices of the probe images, without repetition; the global generator is not used.

    Returns:
        ``(min(count, len(split)),)`` int64, sorted.

    Raises:
        ValueError: ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"expected a probe of at least 1 image, got {count}; ask for more")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values
