"""Brendel & Bethge's attack along the decision boundary, from Foolbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.adapters.foolbox import library, quiet, run
from attacks.estimator import Settings, setting
from attacks.isolation import Classifier
from attacks.registry import check_needs, create
from attacks.search.linearised import left_class
from attacks.types import BOTH_NORMS, BOX_ONLY, Domain, Norm


@dataclass(frozen=True, kw_only=True)
class BB(Settings):
    """Foolbox's Brendel-Bethge attacks (Brendel et al. 2019), started from DeepFool's witnesses.

    Departs from Foolbox: the trust region, which Foolbox scales with the number of pixels of the whole batch, is
    divided by the batch size; starts are DeepFool's with an overshoot of 0.5; the nearest point of the whole path is
    kept. Needs numba (extra ``bb``), which compiles for minutes.
    """

    name: ClassVar[str] = "bb"
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.0002, "linf": 1.001}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(100, least=1)
    lr: float = setting(1e-3, least=0)
    overshoot: float = setting(1.1, least=1)

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
        """See `Estimator.perturb`.

        Raises:
            EstimatorError: numba is not installed.
        """
        check_needs(self.name)
        if start is None:
            start = create("deepfool:overshoot=0.5").perturb(model, images, labels, norm, seeds=seeds)
        with torch.no_grad():
            moved = left_class(model(start), labels)
        rows = torch.nonzero(moved).flatten()
        if not len(rows):
            return images
        cls = library.L2BrendelBethgeAttack if norm == "l2" else library.LinfinityBrendelBethgeAttack
        with quiet():
            attack = cls(steps=self.steps, lr=self.lr / len(rows), overshoot=self.overshoot)
        with model.rows(rows), model.recording(images[rows], labels[rows], norm) as record:
            candidates = run(attack, model, images[rows], labels[rows], starting_points=start[rows])
        result = images.clone()
        result[rows] = record.improve(candidates)
        return result
