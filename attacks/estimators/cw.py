"""Carlini & Wagner's L2 attack, from Foolbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor, nn

from attacks.adapters.foolbox import library, run
from attacks.estimator import Settings, setting
from attacks.geometry import per_row
from attacks.isolation import Classifier
from attacks.search.linearised import first_order_margin
from attacks.types import BOX_ONLY, L2_ONLY, Bounds, Domain, Norm


class ClampedView(nn.Module):
    """A model of clamped inputs, so that leaving the bounds gains nothing."""

    def __init__(self, model: nn.Module, bounds: Bounds) -> None:
        super().__init__()
        self.model, self.bounds = model, bounds
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.clamp(*self.bounds))
        return logits


TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class CW(Settings):
    """Foolbox's L2CarliniWagnerAttack (Carlini & Wagner 2017, section VI) in units of each image's own margin.

    Let m be the first-order margin. ``initial_const`` is in multiples of the c at which an affine model's loss has its
    minimum on the boundary, ``2 m^2 / logit margin``. ``stepsize`` is the L2 length of Adam's first step in multiples
    of m. Fixed values would suit one scale of logits and margins only.

    Further departures from Foolbox: no ``abort_early``, whose test is the loss summed over the batch, which couples its
    rows; the tanh covers ``ROOM`` more on either side of the box, where the model gets the clamped image, since pixels
    at 0 or 1 hardly move in the tanh of the box itself; the nearest point of the whole path is kept; a failed row,
    which Foolbox returns as an all-zero image, is the image itself.
    """

    name: ClassVar[str] = "cw"
    norms: ClassVar[frozenset[Norm]] = L2_ONLY
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.002}
    batch_invariant: ClassVar[bool] = True
    ROOM: ClassVar[float] = 0.5

    binary_search_steps: int = setting(6, least=1)
    steps: int = setting(100, least=1)
    stepsize: float = setting(0.1, least=0)
    initial_const: float = setting(2.0, least=0)

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
        """See `Estimator.perturb`."""
        pixels = images[0].numel()
        low, high = model.bounds
        wide = (low - self.ROOM, high + self.ROOM)
        margin, gap = first_order_margin(model, images, labels, norm)
        margin = margin.clamp_max(pixels**0.5 / 2)  # inf without a gradient: any step is as good
        stepsize = self.stepsize * margin / pixels**0.5 / (wide[1] - wide[0]) * 2
        cls: Any = library.L2CarliniWagnerAttack
        attack = cls(
            binary_search_steps=self.binary_search_steps,
            steps=self.steps,
            # one per row: Foolbox only multiplies by them
            stepsize=ep.astensor(per_row(stepsize, images)),
            initial_const=(self.initial_const * 2 * margin**2 / gap.clamp_min(TINY)).cpu().numpy(),
            abort_early=False,
        )
        with model.recording(images, labels, norm) as record:
            result = run(attack, model, images, labels, view=ClampedView(model, model.bounds), bounds=wide)
        failed = (result == 0).flatten(1).all(1)
        return record.improve(torch.where(per_row(failed, images).bool(), images, result))
