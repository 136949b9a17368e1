"""Small models, failing estimators and snapshots of folders, for tests that run the command."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.estimator import Settings
from attacks.isolation import Classifier
from attacks.types import DOMAINS, NORMS, Domain, Norm
from harness.store import LOCK

# a wrong value, or an event
ONE_LINE = re.compile(
    r"[^\n]*(expected .+, got .+|unknown option .+|unexpected argument .+|checksum mismatch in .+: .+"
    r"|cannot write .+: .+|.+ is damaged: .+|.+ is in use by another process); [^\n]+"
)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and SHA-256 (None for folders) of every path under a folder except the lock."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != LOCK):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        result[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, digest)
    return result


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    return {name: digest for name, (_, digest) in state(folder).items() if digest}


def net() -> nn.Module:
    """A small network with every kind of state that a checkpoint must hold and resumed training must repeat."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 10)
    )


class Dropping(nn.Module):
    """Dropout that stays active in evaluation mode."""

    def __init__(self, pixels: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.inner = nn.Linear(pixels, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(nn.functional.dropout(images.flatten(1), 0.2, training=True))
        return logits


class Rounding(Dropping):
    """Rounds pixels to few levels, so that there is no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner((images.flatten(1) * 8).round() / 8)
        return logits


def two_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def no_logits() -> nn.Module:
    return nn.Conv2d(1, 10, 3)


def not_a_number() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(model[1].bias, torch.nan)  # type: ignore[arg-type]
    return model


def raising() -> nn.Module:
    raise RuntimeError("no\nmodel")


def no_model() -> int:
    return 3


class Anywhere:
    """The declarations of the estimators below."""

    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0, "linf": 1.0}
    batch_invariant: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Broken(Anywhere, Settings):
    """Raises on every image."""

    name: ClassVar[str] = "broken"

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        raise RuntimeError("no\nluck")


@dataclass(frozen=True, kw_only=True)
class Writing(Anywhere, Settings):
    """Writes the network's weights past their version counters."""

    name: ClassVar[str] = "writing"

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        for parameter in model.parameters():
            parameter.data.mul_(0.1)
        return 1 - images


@dataclass(frozen=True, kw_only=True)
class Deadly(Anywhere, Settings):
    """Proposes ``1 - x``; while a folder has files, removes one of them and kills its process."""

    name: ClassVar[str] = "deadly"

    folder: str = ""

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        for path in Path(self.folder).glob("*") if self.folder else ():
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 - images


@dataclass(frozen=True, kw_only=True)
class Endless(Anywhere, Settings):
    """Proposes ``1 - x``, but never returns while a file exists."""

    name: ClassVar[str] = "endless"

    file: str = ""

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        while Path(self.file).is_file():
            time.sleep(0.01)
        return 1 - images
