"""The timed sides: our estimators, and the libraries as their users call them.

The time of every side covers everything from the images and their predictions to points and whether these have another
class: construction of the attack, its steps, one last pass (Foolbox has its own). It excludes refinement and noise
retries, which no library has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.estimator import Estimator
from attacks.isolation import frozen_view
from attacks.memory import affordable, chunk_size
from attacks.registry import create
from attacks.seeds import derive_seed, forked_generators
from attacks.types import NORMS, Norm
from benchmarks.speed import peers
from benchmarks.speed.problems import Problem

Attack = Callable[[nn.Module, Tensor, Tensor, Norm], Tensor]
# images of a side that processes one at a time; its time for more is extrapolated
SLOW = 50
BOTH = frozenset(NORMS)
L2_ONLY: frozenset[Norm] = frozenset({"l2"})


@dataclass(frozen=True, kw_only=True)
class Side:
    """One attack of one library.

    Attributes:
        library: key of `peers.PEERS`.
        attack: a batch of images and labels -> points.
        same: whether it computes the same algorithm as ours, so that margins must be equal per image.
        frozen: whether it runs on a copy of the network whose parameters require no gradients.
        checks: whether it checks its points in a last pass itself.
        most: limit of images for a slow side.
        about: description.
    """

    name: str
    library: str
    attack: Attack
    about: str
    norms: frozenset[Norm] = BOTH
    same: bool = False
    frozen: bool = False
    checks: bool = False
    most: int | None = None

    def images(self, problem: Problem) -> int:
        """The number of the problem's images that it receives."""
        return len(problem.images) if self.most is None else min(self.most, len(problem.images))

    def solve(self, problem: Problem, norm: Norm) -> Tensor:
        """Points ``(N, C, H, W)`` for the problem's images; this call is timed."""
        model = problem.frozen if self.frozen else problem.model
        parts = zip(problem.images.split(problem.batch_size), problem.labels.split(problem.batch_size), strict=True)
        points = torch.cat([self.attack(model, images, labels, norm).detach() for images, labels in parts])
        if not self.checks:
            look(model, points, problem)
        return points


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of our estimators, without refinement; it receives all images and batches them itself."""

    estimator: Estimator

    def solve(self, problem: Problem, norm: Norm) -> Tensor:
        """See `Side.solve`."""
        points, _, _ = self.counted(problem, norm)
        look(problem.model, points, problem)
        return points

    def counted(self, problem: Problem, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """Points, and forwards and backwards per image, ``(N,)`` float64."""
        images, labels = problem.images, problem.labels
        seeds = torch.tensor([derive_seed("image", i) for i in range(len(images))], device=images.device)
        parts, forwards, backwards = [], [], []
        with forked_generators(), frozen_view(problem.model, (0.0, 1.0), "box", images.device) as view:
            view.classes, view.batch_size = problem.classes, affordable(view, images, problem.batch_size)
            size = chunk_size(view, self.estimator)
            for rows in torch.arange(len(images), device=images.device).split(size):
                view.start_chunk(len(rows))
                parts.append(self.estimator.perturb(view, images[rows], labels[rows], norm, seeds=seeds[rows]).detach())
                forwards.append(view.forwards.cpu())
                backwards.append(view.backwards.cpu())
        return torch.cat(parts), torch.cat(forwards), torch.cat(backwards)


@torch.no_grad()
def look(model: nn.Module, points: Tensor, problem: Problem) -> Tensor:
    """Whether points ``(N, ...)`` have another class than their images, ``(N,)`` bool."""
    logits = torch.cat([model(part) for part in points.split(problem.batch_size)])
    return logits.argmax(1) != problem.labels


def ours(text: str) -> Ours:
    """Our estimator with this text form."""
    return Ours(estimator=create(text))


def sides_against(name: str) -> tuple[Side, ...]:
    """The libraries' attacks that an estimator of ours is compared with, by its name."""
    return SIDES.get(name, ())


def _twice(name: str, attack: Attack, about: str, *, same: bool) -> tuple[Side, Side]:
    """Foolbox on the user's network, and on one with frozen parameters."""
    both = partial(Side, library="foolbox", attack=attack, same=same, checks=True)
    return both(name=name, about=about), both(name=f"{name}-frozen", about=f"{about}, parameters frozen", frozen=True)


FAB = Side(name="torchattacks-fab", library="torchattacks", attack=peers.torchattacks_fab, about="FAB, 10 steps")
SIDES: dict[str, tuple[Side, ...]] = {
    "deepfool": (
        *_twice("foolbox", peers.foolbox_deepfool, "L2DeepFoolAttack, LinfDeepFoolAttack", same=True),
        Side(
            name="torchattacks",
            library="torchattacks",
            attack=peers.torchattacks_deepfool,
            about="DeepFool, one image at a time inside",
            norms=L2_ONLY,
            most=SLOW,
        ),
        FAB,
        Side(name="adv-lib", library="adv-lib", attack=peers.adv_lib_df, about="df"),
        Side(name="art", library="art", attack=peers.art_deepfool, about="DeepFool", norms=L2_ONLY),
    ),
    "fmn": (
        *_twice("foolbox", peers.foolbox_fmn, "L2FMNAttack (which never projects), LInfFMNAttack", same=False),
        Side(name="adv-lib", library="adv-lib", attack=peers.adv_lib_fmn, about="fmn"),
    ),
    "ddn": (
        *_twice("foolbox", peers.foolbox_ddn, "DDNAttack", same=False),
        Side(name="adv-lib", library="adv-lib", attack=peers.adv_lib_ddn, about="ddn, unquantised"),
    ),
    "pgd": (
        Side(
            name="torchattacks",
            library="torchattacks",
            attack=peers.torchattacks_bisected_pgd,
            about="PGD and PGDL2 with the radius bisected by hand, 8 rounds of 20 steps",
        ),
    ),
    "fab": (FAB,),
}
