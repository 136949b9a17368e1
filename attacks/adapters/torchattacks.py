"""torchattacks' attacks as margin estimators.

torchattacks 3.5.1 is wrapped, not believed: it returns images only, which `attacks.measure` judges.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torchattacks
from torch import Tensor, nn

from attacks.estimator import NORMS, Domain, Norm, Settings, setting
from attacks.geometry import per_row
from attacks.isolation import Classifier
from attacks.isolation.view import Record
from attacks.search.radius import ball_point, bisect_radius, misses, seeded_directions
from attacks.search.scale_free import ScaleFree

BOTH: frozenset[Norm] = frozenset(NORMS)
# torchattacks clamps to [0, 1] wherever it writes
BOX_ONLY: frozenset[Domain] = frozenset({"box"})
LIBRARY_NORM: dict[Norm, str] = {"l2": "L2", "linf": "Linf"}


class Anchored(nn.Module):
    """A model as torchattacks wants it: with a parameter that tells the device, in the images' dtype.

    torchattacks reads the device from the first parameter, and some attacks compute in float32
    whatever they are given; ``dtype`` is the model's own.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.to(images.dtype)


class FirstStepFrom(nn.Module):
    """Shift the first call's images to seeded points of their balls: a restart for attacks that take none."""

    def __init__(self, model: nn.Module, points: Tensor) -> None:
        super().__init__()
        self.model = model
        self.points: Tensor | None = points
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.points is not None:
            images, self.points = images + (self.points - images).detach(), None
        logits: Tensor = self.model(images)
        return logits


@contextmanager
def quiet() -> Iterator[None]:
    """torchattacks prints mode changes and triggers NumPy's deprecation warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, kw_only=True)
class PGD(Settings):
    """torchattacks' PGD and PGDL2 (Madry et al. 2018) with a radius per image, bisected in one batch.

    The distance is the best witness's, not the radius. Departs from the paper: no random start (each
    of ``restarts`` after the first takes its first gradient at a seeded point of the ball), step size
    ``2.5 * radius / steps``, and cross-entropy of ``temperature * z / std(z)``, whose gradient does
    not vanish for confident images; ``temperature=0`` takes the raw logits.
    """

    name: ClassVar[str] = "pgd"
    norms: ClassVar[frozenset[Norm]] = BOTH
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.005, "linf": 1.01}
    batch_invariant: ClassVar[bool] = True

    steps: int = setting(20, least=1)
    rounds: int = setting(8, least=1)
    restarts: int = setting(1, least=1)
    temperature: float = setting(10.0, least=0)

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
        directions = [seeded_directions(images, seeds, norm, stream) for stream in range(1, self.restarts)]

        def attempt(rows: Tensor, radius: Tensor, record: Record) -> None:
            left = torch.arange(len(rows), device=rows.device)
            for direction in [None, *directions]:
                here = rows[left]
                begin = None
                if direction is not None:
                    begin = ball_point(images[here], direction[here], radius[left], model.bounds)
                with model.rows(left):
                    last = self.at_radius(model, images[here], labels[here], radius[left], norm, begin)
                    with torch.no_grad():
                        model(last)  # shows the last iterate to the record
                left = torch.nonzero(misses(record, rows, radius)).flatten()
                if not len(left):
                    return

        return bisect_radius(attempt, model, images, labels, norm, rounds=self.rounds)

    def at_radius(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        radius: Tensor,
        norm: Norm,
        begin: Tensor | None = None,
    ) -> Tensor:
        """torchattacks' result with these radii ``(B,)``; ``begin`` ``(B, ...)`` places the first gradient."""
        view = ScaleFree(model, self.temperature) if self.temperature else model
        if begin is not None:
            view = FirstStepFrom(view, begin)
        anchored = Anchored(view, images.device, images.dtype)
        epsilon = per_row(radius, images)
        options = {"steps": self.steps, "alpha": 2.5 * epsilon / self.steps, "random_start": False}
        with quiet():
            if norm == "linf":
                attack = torchattacks.PGD(anchored, eps=epsilon, **options)
            else:
                # its 1e-10 is beside the gradient of the batch's *mean* loss, which shrinks with the batch
                attack = torchattacks.PGDL2(anchored, eps=radius.to(images), eps_for_division=1e-30, **options)
            result: Tensor = attack(images, labels)
        return result


@dataclass(frozen=True, kw_only=True)
class FAB(Settings):
    """torchattacks' FAB (Croce & Hein 2020, Algorithm 1), unbounded.

    torchattacks discards results beyond ``eps`` (8/255 by default, also in L2) and returns the clean
    image; here nothing is discarded. It computes in float32.
    """

    name: ClassVar[str] = "fab"
    norms: ClassVar[frozenset[Norm]] = BOTH
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
