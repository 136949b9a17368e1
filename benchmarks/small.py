"""Small networks of several kinds, trained on digits, whose margins can be computed exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harness.data.builtin import load
from harness.data.dataset import draw_probe
from harness.data.probes import Probe
from harness.models.build import build, seeded
from harness.training.objectives import TrainingOptions
from harness.training.trainer import Trainer

PIXELS, CLASSES = 64, 10
# radius of PGD training, in pixel ranges, and its steps
EPSILON, STEPS = 0.2, 10


class Residual(nn.Module):
    """A dense ReLU layer, and a second one whose outputs are added to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(PIXELS, 24), nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 1, 8, 8)`` -> ``(B, 10)``."""
        inner = self.first(images.flatten(1)).relu()
        logits: Tensor = self.last(inner + self.second(inner).relu())
        return logits


def _dense(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((PIXELS, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def _convolutional(*layers: nn.Module, flat: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


# seed -> network
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "64-32-10": lambda seed: _dense(32),
    "64-64-64-10": lambda seed: build("dense", (1, 8, 8), CLASSES, seed),
    "64-24-24-24-10": lambda seed: _dense(24, 24, 24),
    "64-100-10": lambda seed: _dense(100),
    "leaky": lambda seed: _dense(48, activation=lambda: nn.LeakyReLU(0.1)),
    "residual": lambda seed: Residual(),
    "conv": lambda seed: _convolutional(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), flat=48, hidden=24),
    "conv-conv": lambda seed: nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    ),
    "batch-norm": lambda seed: _convolutional(
        nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), flat=48, hidden=20
    ),
    "pool": lambda seed: nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 2, 1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, CLASSES)),
    ),
}


def trained(network: str, training: str, epochs: Sequence[int], *, seed: int = 0) -> dict[int, nn.Module]:
    """A network of `NETWORKS` after each of ``epochs`` of standard or PGD training on digits, in evaluation mode."""
    with seeded(seed):
        model = NETWORKS[network](seed)
    options = TrainingOptions(batch_size=32)
    if training == "pgd":
        options = TrainingOptions(
            batch_size=32, training="pgd", pgd_epsilon=EPSILON, pgd_steps=STEPS, pgd_step_size=EPSILON / 4
        )
    trainer, found = Trainer(model, load("digits").train, options, torch.device("cpu")), {}
    while trainer.epoch < max(epochs):
        trainer.run_epoch()
        if trainer.epoch in epochs:
            copy = NETWORKS[network](seed)
            copy.load_state_dict(model.state_dict())
            found[trainer.epoch] = copy.eval().requires_grad_(False)
    return found


def probe(images: int) -> Probe:
    """The first of the probe's test images of digits."""
    test = load("digits").test
    index = draw_probe(test, images, seed=0)
    return Probe(test.pixels(index), test.labels[index], index)
