"""The libraries' attacks as a user calls them: from a batch of images and labels to points.

Settings are those of our estimators if a library has them. The calls are those of ordinary users, except that FAB and
PGD run without a limit on the distance, which they need to give distances.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from attacks.adapters.foolbox import foolbox, library
from attacks.adapters.foolbox import quiet as foolbox_quiet
from attacks.adapters.torchattacks import LIBRARY_NORM
from attacks.adapters.torchattacks import quiet as torchattacks_quiet
from attacks.geometry import farthest_in_box, per_row, row_norm
from attacks.types import Norm

# library -> the required module, and how to install it
PEERS: dict[str, tuple[str, str]] = {
    "foolbox": ("foolbox", "pip install foolbox"),
    "torchattacks": ("torchattacks", "pip install --no-deps torchattacks"),
    "adv-lib": ("adv_lib", "pip install --no-deps adv-lib"),
    "art": ("art", "pip install --no-deps adversarial-robustness-toolbox six"),
}
STEPS, OVERSHOOT, CANDIDATES = 50, 0.02, 10
DESCENT_STEPS = 100
PGD_STEPS, PGD_ROUNDS = 20, 8


def missing(peer: str) -> str:
    """The reason why a library cannot be timed; empty if it can."""
    module, command = PEERS[peer]
    found = module in sys.modules or importlib.util.find_spec(module) is not None
    return "" if found else f"{peer} is not installed: left out ({command})"


def _foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with foolbox_quiet():
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        _, clipped, _ = attack(wrapped, images, labels, epsilons=None)
    points: Tensor = clipped
    return points


def foolbox_deepfool(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """L2DeepFoolAttack or LinfDeepFoolAttack."""
    attack = library.L2DeepFoolAttack if norm == "l2" else library.LinfDeepFoolAttack
    return _foolbox(attack(steps=STEPS, candidates=CANDIDATES, overshoot=OVERSHOOT), model, images, labels)


def foolbox_fmn(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """L2FMNAttack, which never projects, or LInfFMNAttack."""
    attack = library.L2FMNAttack if norm == "l2" else library.LInfFMNAttack
    return _foolbox(attack(steps=DESCENT_STEPS), model, images, labels)


def foolbox_ddn(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """DDNAttack, L2."""
    return _foolbox(library.DDNAttack(steps=DESCENT_STEPS), model, images, labels)


def torchattacks_deepfool(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """DeepFool, L2, which processes the images one by one."""
    with torchattacks_quiet():
        points: Tensor = torchattacks.DeepFool(model, steps=STEPS, overshoot=OVERSHOOT)(images, labels)
    return points


def torchattacks_fab(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """FAB, ten steps, without the limit beyond which it returns the image."""
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    with torchattacks_quiet():
        attack = torchattacks.FAB(model, norm=LIBRARY_NORM[norm], eps=float("inf"), n_classes=classes)
        points: Tensor = attack(images, labels)
    return points


def torchattacks_bisected_pgd(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """One radius per image, bisected in one batch; the nearest point of another class is returned."""
    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    with torchattacks_quiet():
        attack = kind(model, steps=PGD_STEPS, random_start=False)
    low, high = torch.zeros(len(images), dtype=torch.float64, device=images.device), farthest_in_box(images, norm)
    best = images.clone()
    for _ in range(PGD_ROUNDS):
        radius = (low + high) / 2
        wide = per_row(radius, images)
        attack.eps, attack.alpha = (wide if norm == "linf" else radius.to(images)), 2.5 * wide / PGD_STEPS
        with torchattacks_quiet():
            points = attack(images, labels)
        with torch.no_grad():
            moved = model(points).argmax(1) != labels
        best = torch.where(per_row(moved, images).bool(), points, best)
        high = torch.where(moved, torch.minimum(radius, row_norm(points - images, norm)), high)
        low = torch.where(moved, low, radius)
    return best


@contextmanager
def _adv_lib() -> Iterator[types.ModuleType]:
    """adv-lib's attacks. It imports visdom for plots; if that is missing, an empty module replaces it."""
    if "visdom" not in sys.modules and importlib.util.find_spec("visdom") is None:
        stub = types.ModuleType("visdom")
        vars(stub)["Visdom"] = object
        sys.modules["visdom"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # distutils
        yield importlib.import_module("adv_lib.attacks")


def _order(norm: Norm) -> float:
    return 2 if norm == "l2" else float("inf")


def adv_lib_df(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Its DeepFool, over all classes."""
    with _adv_lib() as attacks:
        points: Tensor = attacks.df(model, images, labels, steps=STEPS, overshoot=OVERSHOOT, norm=_order(norm))
    return points


def adv_lib_fmn(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Its FMN."""
    with _adv_lib() as attacks:
        points: Tensor = attacks.estimators.fmn(model, images, labels, norm=_order(norm), steps=DESCENT_STEPS)
    return points


def adv_lib_ddn(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """Its DDN, L2, not rounded to 256 levels."""
    with _adv_lib() as attacks:
        points: Tensor = attacks.estimators.ddn(model, images, labels, steps=DESCENT_STEPS, levels=None)
    return points


def art_deepfool(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """DeepFool, L2, through NumPy."""
    logging.getLogger("art").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evasion = importlib.import_module("art.attacks.evasion.deepfool")
        estimators = importlib.import_module("art.estimators.classification.pytorch")
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        wrapped = estimators.PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if images.is_cuda else "cpu",
        )
        attack = evasion.DeepFool(
            wrapped,
            max_iter=STEPS,
            epsilon=OVERSHOOT,
            nb_grads=CANDIDATES,
            batch_size=len(images),
            verbose=False,
        )
        points = attack.generate(images.cpu().numpy())
    return torch.from_numpy(points).to(images)
