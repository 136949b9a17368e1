"""The contract between certifiers and those who call them, and the lower bounds that they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from attacks.types import Domain, Norm


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """Lower bounds, one entry an image, on the CPU.

    Attributes:
        lower: ``(N,)`` float64 in pixel units: no point of the domain that is nearer has another class than ``label``,
            in exact arithmetic and in the model's own dtype.
        solved: ``(N,)`` bool: the margin is known to 1e-5 of itself, up to rounding.
        label: ``(N,)`` int64, the class in float64.
        doubt: ``(N,)`` float64, by how much rounding in the model's dtype may change a lead; empty where not estimated.
    """

    lower: Tensor
    solved: Tensor
    label: Tensor
    doubt: Tensor = dataclasses.field(default_factory=partial(torch.empty, 0, dtype=torch.float64))


class Certifier(Protocol):
    """Proves that no point near an image has another class."""

    @property
    def name(self) -> str:
        """The registry's name."""

    @property
    def norms(self) -> frozenset[Norm]:
        """Norms that it can bound the distance in."""

    @property
    def domains(self) -> frozenset[Domain]:
        """``box``: only points inside the pixel bounds count; ``free``: all do."""

    def certify(
        self,
        model: nn.Module,
        images: Tensor,
        norm: Norm,
        *,
        domain: Domain,
        upper: Tensor,
        bounds: tuple[float, float] = (0.0, 1.0),
        start: Tensor | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Certificates:
        """Bound the margins of images from below.

        Args:
            model: pixels in ``bounds`` -> logits; left untouched.
            images: ``(N, C, H, W)`` float in ``bounds``.
            upper: ``(N,)`` distances of witnesses in the same domain, inf without one: no larger radius is tried.
            start: ``(N,)`` radii to try first, such as those of the epoch before; NaN for none.
            on_progress: told of images that are done.

        Raises:
            InputError: a layer that cannot be bounded, by name, or images outside ``bounds``.
        """
