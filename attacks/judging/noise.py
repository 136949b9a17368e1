"""Noise retries: noisy starts for images on which an estimator failed (Mickisch et al. 2020, section 3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attacks.seeds import derive_seed
from attacks.types import Bounds


def noisy_starts(images: Tensor, rows: Iterable[int], seeds: Tensor, attempt: int, bounds: Bounds) -> Tensor:
    """The images, of which these rows have Gaussian noise added; clipped to the bounds.

    Args:
        images: ``(B, C, H, W)`` float, in ``[0, 1]`` units of the pixel range.
        rows: of the images to perturb.
        seeds: ``(B,)`` int64, the images' own seeds.
        attempt: from 0; the standard deviation is ``0.01 * 2**attempt``.
        bounds: smallest and largest value, in the images' units.
    """
    noisy = images.clone()
    for row in rows:
        generator = torch.Generator().manual_seed(derive_seed("noise", int(seeds[row]), attempt))
        noise = torch.randn(images.shape[1:], generator=generator, dtype=torch.float64)
        noisy[row] += (0.01 * 2**attempt * noise).to(noisy)
    return noisy.clamp(*bounds)


def retry_seeds(seeds: Tensor, attempt: int) -> Tensor:
    """``(B,)`` int64, the images' seeds in a retry."""
    return torch.tensor([derive_seed("retry", int(seed), attempt) for seed in seeds], dtype=torch.int64)
