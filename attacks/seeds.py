"""Random draws: seeds per image, seeded directions, and the global generators that other libraries draw from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from attacks.types import Norm


@contextmanager
def forked_generators() -> Iterator[None]:
    """Restore the torch (CPU and CUDA), NumPy and ``random`` generators on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialised else []
    # before CUDA is initialised, torch.manual_seed stores its seed for later: the caller's stored seed is restored too
    waiting = torch.cuda._lazy_seed_tracker
    waiting_state = dict(vars(waiting))
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            vars(waiting).update(waiting_state)


def seed_generators(seed: int) -> None:
    """Seed the global generators that other libraries' attacks draw from; call it inside `forked_generators` only."""
    # without an accelerator, torch.manual_seed takes 0.3 ms to store the seed for one
    seed_torch = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from values with a stable text form; the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_directions(images: Tensor, seeds: Tensor, norm: Norm, stream: int) -> Tensor:
    """A random point on the unit sphere of ``norm`` per row, from the row's own seed: ``(B, ...)``.

    Args:
        images: ``(B, ...)``, for the shape, dtype and device.
        seeds: ``(B,)`` int64.
        stream: number of the draw; each gives an independent point.
    """
    rows = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (stream + 1)) % 2**63)
        if norm == "linf":
            draw = 2 * torch.rand(images.shape[1:], generator=generator, dtype=torch.float64) - 1
            rows.append(draw / draw.abs().max())
        else:
            draw = torch.randn(images.shape[1:], generator=generator, dtype=torch.float64)
            rows.append(draw / draw.norm())
    return torch.stack(rows).to(images)
