"""A plain Foolbox script for Figure 1, which `benchmarks.figure1` compares with the harness.

It only computes the figure: no noisy starts, no refinement, and no stored results.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.adapters.foolbox import foolbox, library

BATCH = 128


def train_epoch(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int) -> None:
    """One pass over the training images in shuffled batches."""
    model.train()
    for index in torch.randperm(len(images)).split(batch):
        optimiser.zero_grad()
        functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimiser.step()


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of misclassified images."""
    model.eval()
    wrong = [(model(x).argmax(1) != y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.stack(wrong).sum()) / len(images)


def margins(model: nn.Module, images: Tensor, norm: str) -> Tensor:
    """Distances ``(N,)`` to Foolbox's DeepFool points; infinite where it finds none."""
    model.eval()
    attack = library.L2DeepFoolAttack() if norm == "l2" else library.LinfDeepFoolAttack()
    distances = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        for batch in images.split(BATCH):
            with torch.no_grad():
                predictions = model(batch).argmax(1)
            _, points, found = attack(wrapped, batch, predictions, epsilons=None)
            offset = (points - batch).flatten(1)
            distance = offset.norm(dim=1) if norm == "l2" else offset.abs().amax(1)
            distances.append(torch.where(found, distance, torch.inf))
    return torch.cat(distances)
