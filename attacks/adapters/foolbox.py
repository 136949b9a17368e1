"""Foolbox's attacks as margin estimators.

Foolbox 3.3.4 is wrapped, not believed: its results are candidates that `attacks.measure` judges.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import torch
from torch import Tensor, nn

from attacks.adapters.upstream import foolbox, library
from attacks.estimator import DOMAINS, NORMS, Domain, Norm, Settings, setting
from attacks.geometry import per_row
from attacks.isolation import Classifier
from attacks.isolation.view import Bounds
from attacks.registry import check_needs, create
from attacks.search.radius import first_order_margin

BOTH: frozenset[Norm] = frozenset(NORMS)
L2_ONLY: frozenset[Norm] = frozenset({"l2"})
EVERYWHERE: frozenset[Domain] = frozenset(DOMAINS)
BOX_ONLY: frozenset[Domain] = frozenset({"box"})
TINY = torch.finfo(torch.float64).tiny


@contextmanager
def quiet() -> Iterator[None]:
    """Foolbox logs through the root logger, which installs a handler there, and warns on every call."""
    handlers = list(logging.root.handlers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers


def run(
    attack: Any,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    view: nn.Module | None = None,
    bounds: Bounds | None = None,
    **options: Any,
) -> Tensor:
    """Call a Foolbox attack without its own check of the result, on ``view`` and ``bounds`` (default: the model's)."""
    goal = foolbox.criteria.Misclassification(labels)
    with quiet():
        # the device is given since Foolbox would take cuda:0 and move the model there
        wrapped = foolbox.PyTorchModel(view or model, bounds=bounds or model.bounds, device=images.device)
        result: Tensor = attack.run(wrapped, images, goal, **options)
    return result


def stock_deepfool(
    model: Classifier, images: Tensor, labels: Tensor, norm: Norm, *, steps: int, candidates: int, overshoot: float
) -> Tensor:
    """Foolbox's L2DeepFoolAttack and LinfDeepFoolAttack as they are."""
    cls = library.L2DeepFoolAttack if norm == "l2" else library.LinfDeepFoolAttack
    return run(cls(steps=steps, candidates=candidates, overshoot=overshoot), model, images, labels)


class ClampedView(nn.Module):
    """A model that sees its input clamped: outside of the bounds there is nothing to gain."""

    def __init__(self, model: nn.Module, bounds: Bounds) -> None:
        super().__init__()
        self.model, self.bounds = model, bounds
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.clamp(*self.bounds))
        return logits


@dataclass(frozen=True, kw_only=True)
class CW(Settings):
    """Foolbox's L2CarliniWagnerAttack (Carlini & Wagner 2017, section VI) in units of each image's own margin.

    With m the first-order margin, ``initial_const`` counts multiples of the c at which an affine model's
    loss has its minimum on the boundary, ``2 m^2 / logit margin``, and ``stepsize`` is the L2 length of
    Adam's first step in multiples of m: fixed ones are right for one scale of logits and margins only.
    Departs from Foolbox further: no ``abort_early``, whose test is the loss summed over the batch and
    couples its rows; tanh spans ``ROOM`` more on either side of the box, where the model sees the clamped
    image, since pixels at 0 or 1 hardly move in the tanh of the box itself; the nearest point on the
    whole path is kept, and a failed row, which Foolbox returns as an all-zero image, is the image itself.
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
        margin = margin.clamp_max(pixels**0.5 / 2)  # no gradient: any step is as good
        stepsize = self.stepsize * margin / pixels**0.5 / (wide[1] - wide[0]) * 2
        cls: Any = library.L2CarliniWagnerAttack
        attack = cls(
            binary_search_steps=self.binary_search_steps,
            steps=self.steps,
            # one a row: Foolbox only multiplies by them
            stepsize=ep.astensor(per_row(stepsize, images)),
            initial_const=(self.initial_const * 2 * margin**2 / gap.clamp_min(TINY)).cpu().numpy(),
            abort_early=False,
        )
        with model.recording(images, labels, norm) as record:
            result = run(attack, model, images, labels, view=ClampedView(model, model.bounds), bounds=wide)
        failed = (result == 0).flatten(1).all(1)
        return record.improve(torch.where(per_row(failed, images).bool(), images, result))


@dataclass(frozen=True, kw_only=True)
class BB(Settings):
    """Foolbox's Brendel-Bethge attacks (Brendel et al. 2019), started from DeepFool's witness.

    Departs from Foolbox: the trust region, which Foolbox scales with the number of pixels of the whole
    batch, is divided by the batch size; starts come from DeepFool with an overshoot of 0.5; the
    nearest point on the whole path is kept. Needs numba (extra ``bb``), which compiles for minutes.
    """

    name: ClassVar[str] = "bb"
    norms: ClassVar[frozenset[Norm]] = BOTH
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
            moved = model(start).argmax(1) != labels
        rows = torch.nonzero(moved).flatten()
        if not len(rows):
            return images
        cls = library.L2BrendelBethgeAttack if norm == "l2" else library.LinfinityBrendelBethgeAttack
        with quiet():
            attack = cls(steps=self.steps, lr=self.lr / len(rows), overshoot=self.overshoot)
        with model.rows(rows), model.recording(images[rows], labels[rows], norm) as record:
            found = run(attack, model, images[rows], labels[rows], starting_points=start[rows])
        result = images.clone()
        result[rows] = record.improve(found)
        return result
