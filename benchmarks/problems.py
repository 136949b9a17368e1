"""Problems for comparing estimators: classifiers with images, generated or from a run's checkpoints.

A problem with known margins is one more function here and one more line in `BUILT_IN`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.certify.exact import exact_margins
from attacks.seeds import derive_seed
from attacks.types import NOISE_RETRIES, Domain, Norm
from benchmarks import small
from harness.data.builtin import load
from harness.data.probes import Probe
from harness.models.build import build
from harness.runs import Run
from harness.store.identity import StoreError
from harness.tracking.finished_run import model_of, options_of, probes_of
from harness.training.objectives import TrainingOptions
from harness.training.trainer import Trainer

# in the working directory: exact margins, which take minutes, are computed once
EXACT_CACHE = Path(".exact")
# most wall time per image
EXACT_SECONDS = 120.0


@dataclass(frozen=True)
class Truth:
    """Proved bounds of the margins, ``(N,)`` float64 each: margins lie between ``lower`` and ``upper``.

    Attributes:
        solved: ``(N,)`` bool, whether the two are close enough to count as equal.
    """

    lower: Tensor
    upper: Tensor
    solved: Tensor

    @property
    def margin(self) -> Tensor:
        """``(N,)`` float64; NaN for unsolved images."""
        return torch.where(self.solved, self.upper, math.nan)


@dataclass(frozen=True)
class Problem:
    """Images, a classifier, the settings of its margins, and exact margins if known.

    Attributes:
        exact: norm -> proved bounds of the margins, independent of all estimators.
        affine: whether the declared tightness of estimators applies.
        seeding: source of the images' seeds besides the estimator's text, norm and id; None for their positions.
    """

    name: str
    model: nn.Module
    probe: Probe
    exact: Callable[[Norm], Truth] | None = None
    affine: bool = False
    domain: Domain = "box"
    noise_retries: int = NOISE_RETRIES
    batch_size: int = 128
    seeding: tuple[object, ...] = ()
    epoch: int = 0
    split: str = "test"

    @property
    def images(self) -> Tensor:
        """``(N, C, H, W)`` float in ``[0, 1]``."""
        return self.probe.images

    def seeds(self, estimator: str, norm: Norm) -> list[int] | None:
        """The images' seeds: those of the run's tracking, so that its margins are reproduced."""
        if not self.seeding:
            return None
        return [derive_seed(*self.seeding, estimator, norm, image) for image in self.probe.ids.tolist()]

    def on(self, device: torch.device) -> Problem:
        """The same problem with its model on the device."""
        return replace(self, model=self.model.to(device))


def affine_problem(images: int, boxed: bool, domain: Domain = "box") -> Problem:
    """Ten classes whose weights differ in length by a factor of four: the runner-up is not always the nearest.

    The labels are the predictions. Images are far from the bounds or, with ``boxed``, at them, where the box binds.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0.5, 2.0, 10)[torch.randperm(10, generator=generator), None]
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.copy_(lengths * torch.randn(10, 64, generator=generator))
        layer.bias.copy_(0.5 * torch.randn(10, generator=generator) - 0.5 * layer.weight.sum(1))
    if boxed:
        points = (torch.rand(images, 1, 8, 8, generator=generator) * 3 - 1).clamp(0, 1)
    else:
        points = 0.5 + 0.05 * torch.randn(images, 1, 8, 8, generator=generator)
    model = nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        labels = model(points).argmax(1)

    def exact(norm: Norm) -> Truth:
        margins = affine_margins(layer.weight, layer.bias, points, norm, domain=domain)
        return Truth(margins, margins, torch.ones(images, dtype=torch.bool))

    name = ("affine, at the box" if boxed else "affine") + (", free" if domain == "free" else "")
    return Problem(name, model, Probe(points, labels, torch.arange(images)), exact, affine=True, domain=domain)


class Slab(nn.Module):
    """Two classes ``(half, |w . (x - 0.5)|)`` with two ReLUs: the first class lies between two planes."""

    def __init__(self, weight: Tensor, half: float) -> None:
        super().__init__()
        self.half = half
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        across = (images - 0.5).flatten(1) @ self.weight
        return torch.stack([torch.full_like(across, self.half), across.relu() + (-across).relu()], dim=1)


def slab_problem(images: int) -> Problem:
    """A piecewise linear toy problem: half of the images lie in a slab between two boundaries, half outside."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, generator=generator)
    points = (torch.rand(images, 1, 8, 8, generator=generator) * 3 - 1).clamp(0, 1)
    model = Slab(weight, float(((points - 0.5).flatten(1) @ weight).abs().median()) + 1e-3)
    with torch.no_grad():
        labels = model(points).argmax(1)

    def exact(norm: Norm) -> Truth:
        sides = [
            affine_margins(
                torch.stack([0 * weight, sign * weight]),
                torch.tensor([model.half, -0.5 * sign * float(weight.sum())]),
                points,
                norm,
                domain="box",
            )
            for sign in (1, -1)
        ]
        margins = torch.minimum(*sides)
        return Truth(margins, margins, torch.ones(images, dtype=torch.bool))

    return Problem("slab", model, Probe(points, labels, torch.arange(images)), exact)


def digits_problem(images: int, epochs: int = 20) -> Problem:
    """The default ``cnn`` after some epochs on digits, and test images."""
    dataset = load("digits")
    model = build("cnn", dataset.shape, dataset.classes, seed=0)
    trainer = Trainer(model, dataset.train, TrainingOptions(batch_size=32), torch.device("cpu"))
    while trainer.epoch < epochs:
        trainer.run_epoch()
    return Problem(f"digits cnn, epoch {epochs}", model, small.probe(images), epoch=epochs)


def relu_problem(
    images: int,
    network: str = "64-32-10",
    *,
    training: str = "standard",
    epochs: int = 20,
    cache: Path | None = EXACT_CACHE,
) -> Problem:
    """A small network after some epochs on digits, with exact margins in both norms, and test images.

    The exact solver uses no results of the estimators, not even as starting points.

    Args:
        network: one of `benchmarks.small.NETWORKS`.
        training: ``standard`` or ``pgd``.
        cache: folder of previously computed exact margins.
    """
    model, probe = small.trained(network, training, [epochs])[epochs], small.probe(images)

    def exact(norm: Norm) -> Truth:
        found = exact_margins(model, probe.images, norm, seconds=EXACT_SECONDS, cache=cache)
        return Truth(found.lower, found.upper, found.solved)

    name = {"64-64-64-10": "dense"}.get(network, network) + (" pgd" if training == "pgd" else "")
    return Problem(f"digits {name}, epoch {epochs}", model, probe, exact, epoch=epochs)


def slug(name: str) -> str:
    """A problem's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


BUILT_IN: dict[str, Callable[[int], Problem]] = {
    "affine": lambda images: affine_problem(images, boxed=False),
    "affine-box": lambda images: affine_problem(images, boxed=True),
    "affine-free": lambda images: affine_problem(images, boxed=True, domain="free"),
    "slab": slab_problem,
    "digits": digits_problem,
    "relu": lambda images: relu_problem(images),
    "relu-deep": lambda images: relu_problem(images, "64-64-64-10"),
    "relu-conv": lambda images: relu_problem(images, "conv"),
    "relu-conv-pgd": lambda images: relu_problem(images, "conv", training="pgd"),
    "relu-pool": lambda images: relu_problem(images, "pool"),
    "relu-pool-pgd": lambda images: relu_problem(images, "pool", training="pgd"),
}


def run_problems(run: Run, epochs: Sequence[int], splits: Collection[str], images: int) -> Iterator[Problem]:
    """A run's checkpoints with the first of its own probe images, measured as the run measured them.

    Args:
        epochs: empty for the last one with a checkpoint.
        images: at most this many of each split.

    Raises:
        StoreError: a run without options, an epoch without a checkpoint, or a split without images.
    """
    config = options_of(run)
    there = run.folder.checkpoint_epochs()
    missing = sorted(set(epochs) - set(there))
    if missing or not there:
        raise StoreError(
            f"expected epochs with a checkpoint in {run.name} ({', '.join(map(str, there)) or 'none'}), "
            f"got {', '.join(map(str, missing)) or 'none'}; choose others"
        )
    if config.get("binary") or config.get("expect_over", 1) != 1:
        raise StoreError(
            f"expected a run without --binary and --expect-over, got {run.name}; measure it with harness.compare"
        )
    probes = probes_of(run)
    unknown = sorted(set(splits) - set(probes))
    if unknown:
        raise StoreError(
            f"expected splits of {run.name} ({', '.join(probes)}), got {', '.join(unknown)}; choose others"
        )
    for epoch in epochs or there[-1:]:
        for split in splits:
            probe = probes[split]
            model = model_of(run, probe.images)
            run.folder.load_checkpoint(epoch, model)
            yield Problem(
                name=f"{run.name}, epoch {epoch}, {split}",
                model=model,
                probe=Probe(probe.images[:images], probe.labels[:images], probe.ids[:images]),
                domain=config["domain"],
                noise_retries=config["noise_retries"],
                batch_size=config["measure_batch"],
                seeding=(config["seed"], epoch, split),
                epoch=epoch,
                split=split,
            )
