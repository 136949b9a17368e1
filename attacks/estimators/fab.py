"""Fast adaptive boundary attack (FAB), from torchattacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torchattacks
from torch import Tensor

from attacks.adapters.torchattacks import LIBRARY_NORM, Anchored, quiet
from attacks.estimator import Settings, setting
from attacks.isolation import Classifier
from attacks.types import BOTH_NORMS, BOX_ONLY, Domain, Norm


@dataclass(frozen=True, kw_only=True)
class FAB(Settings):
    """torchattacks' FAB (Croce & Hein 2020, Algorithm 1), unbounded.

    torchattacks discards results beyond ``eps`` (8/255 by default, also in L2) and returns the clean image; here
    ``eps`` is infinite. It computes in float32.
    """

    name: ClassVar[str] = "fab"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.0002}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(10, least=1)
    alpha_max: float = setting(0.1, least=0)
    eta: float = setting(1.05, least=1)
    beta: float = setting(0.9, least=0)

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
        anchored = Anchored(model, images.device, images.dtype)
        with quiet():
            attack = torchattacks.FAB(
                anchored,
                norm=LIBRARY_NORM[norm],
                eps=float("inf"),
                steps=self.steps,
                alpha_max=self.alpha_max,
                eta=self.eta,
                beta=self.beta,
                n_classes=model.classes,
            )
            result: Tensor = attack(images.float(), labels)
        return result.to(images.dtype)
