"""The contract of certifiers: the `Certifier` protocol and the lower bounds that it returns."""

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
    """Lower bounds of margins, one entry per image, on the CPU.

    Attributes:
        lower: ``(N,)`` float64 in pixel units: every nearer point of the domain has the class ``label``, in exact
            arithmetic and in the model's own dtype.
        solved: ``(N,)`` bool: the margin is known to a relative precision of 1e-5, up to rounding.
        label: ``(N,)`` int64, the predicted class in float64.
        doubt: ``(N,)`` float64, how much rounding in the model's dtype may change a lead; empty if not estimated.
    """

    lower: Tensor
    solved: Tensor
    label: Tensor
    doubt: Tensor = dataclasses.field(default_factory=partial(torch.empty, 0, dtype=torch.float64))


class Certifier(Protocol):
    """Proves that no point near an image has another class."""

    @property
    def name(self) -> str:
        """The name in the registry."""

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms in which it can bound the distance."""

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
            on_progress: called with the number of newly finished images.

        Raises:
            InputError: a layer that cannot be bounded, which is named, or images outside ``bounds``.
        """
