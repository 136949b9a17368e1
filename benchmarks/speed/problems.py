"""Timed problems: a network, images and their predictions.

The number of DeepFool's steps depends on the network, so that untrained networks are not representative. The built-in
ones are trained for seconds on scikit-learn's handwritten digits, resized: no download, equal in every call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import run_problems
from harness.config.options import ConfigError
from harness.models.build import Shape, build, eval_mode
from harness.runs import Run

# name -> architecture, shape of the images, training steps of 32 images
NETWORKS: dict[str, tuple[str, Shape, int]] = {
    "dense-digits": ("dense", (1, 8, 8), 400),
    "cnn-digits": ("cnn", (1, 8, 8), 400),
    "dense-fashion": ("dense", (1, 28, 28), 400),
    "cnn-fashion": ("cnn", (1, 28, 28), 400),
    "resnet18-cifar10": ("resnet18", (3, 32, 32), 20),
    # because of its size: one step, which takes half a minute, sets the statistics of its batch norms
    "resnet50-224": ("benchmarks.speed.problems:resnet50", (3, 224, 224), 1),
}
DIGITS, PAIRS = 10, 100
# of the 1797 digits, which leaves 1000 held-out images
TRAINED_ON = 797
MEASURED = 1000
# logits of these networks stay below a few hundred in the whole box
WALL = 1e4


@dataclass(frozen=True)
class Problem:
    """A network in eval mode whose parameters require gradients, as a user's do, and images to measure.

    Attributes:
        images: ``(N, C, H, W)`` float32 in ``[0, 1]``.
        labels: ``(N,)`` int64, the network's predictions, used as labels by every side.
        batch_size: images per call, for every side.
        unreachable: whether the first image of each batch cannot be moved.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    classes: int
    batch_size: int
    unreachable: bool = False

    @cached_property
    def frozen(self) -> nn.Module:
        """A copy whose parameters require no gradients."""
        return copy.deepcopy(self.model).requires_grad_(False)

    def first(self, images: int) -> Problem:
        """The same with this many images."""
        return replace(self, images=self.images[:images], labels=self.labels[:images])

    def on(self, device: torch.device) -> Problem:
        """The same on the device."""
        return replace(self, model=self.model.to(device), images=self.images.to(device), labels=self.labels.to(device))


class Walled(nn.Module):
    """A network whose class is always 0 for images with a marked first pixel.

    `WALL` is added to logit 0 of a marked image, which is more than the logit gap anywhere in the box. The mark is read
    by a comparison and hidden from the network, so that it has no gradient. All other gradients are unchanged, and an
    attack continues until its steps are used up. Attacks that add noise may remove the mark, as Foolbox's DDN does.
    """

    def __init__(self, network: nn.Module, like: Tensor, classes: int) -> None:
        """Put the wall around ``network``, for images of the shape of ``like`` ``(1, C, H, W)``."""
        super().__init__()
        self.network = network
        seen = torch.ones_like(like)
        seen[:, :, 0, 0] = 0
        wall = torch.zeros(1, classes)
        wall[0, 0] = WALL
        self.seen: Tensor
        self.wall: Tensor
        self.register_buffer("seen", seen)
        self.register_buffer("wall", wall)

    def forward(self, images: Tensor) -> Tensor:
        marked = (images[:, 0, 0, 0] > 0.5).unsqueeze(1)
        logits: Tensor = self.network(images * self.seen) + marked * self.wall
        return logits


def resnet50(classes: int) -> nn.Module:
    """torchvision's ResNet-50, with batch norms that adopt the statistics of their last batch."""
    from torchvision.models import resnet50 as make

    model: nn.Module = make(num_classes=classes, norm_layer=partial(nn.BatchNorm2d, momentum=1.0))
    return model


def built_in(name: str, classes: int, images: int, batch_size: int) -> Problem:
    """A trained network of `NETWORKS` and this many held-out images, at least a full batch.

    Raises:
        ConfigError: more images than available.
    """
    if images > MEASURED:
        raise ConfigError(f"expected at most {MEASURED} --images of {name}, got {images}; name a RUN for more")
    architecture, shape, steps = NETWORKS[name]
    model = build(architecture, shape, classes, seed=0)
    _train(model, *_digits(shape, classes, measured=False), steps)
    points, _ = _digits(shape, classes, measured=True)
    return _predicted(f"{name}, {classes} classes", model, points[: max(images, batch_size)], classes, batch_size)


def of_run(run: Run, epochs: Sequence[int], images: int, batch_size: int) -> list[Problem]:
    """A run's checkpoints with the first of its images, at least a full batch: test images, then training images.

    Raises:
        ConfigError: fewer images than asked for.
        StoreError: see `benchmarks.problems.run_problems`.
    """
    problems, wanted = [], max(images, batch_size)
    stored = list(run_problems(run, epochs, ["test", "train"], wanted))
    for test, train in zip(stored[::2], stored[1::2], strict=True):
        points = torch.cat([test.images, train.images])[:wanted]
        if len(points) < images:
            raise ConfigError(
                f"expected at most {len(points)} --images, which {run.name} has, got {images}; give fewer"
            )
        with torch.no_grad(), eval_mode(test.model):
            classes = test.model(points[:1]).shape[1]
        problems.append(_predicted(f"{run.name}, epoch {test.epoch}", test.model, points, classes, batch_size))
    return problems


def with_unreachable(problem: Problem) -> Problem:
    """The same with an unreachable first image in each batch; see `Walled`."""
    images = problem.images.clone()
    images[:, :, 0, 0] = 0
    images[:: problem.batch_size, :, 0, 0] = 1
    model = Walled(problem.model, images[:1], problem.classes)
    walled = _predicted(f"{problem.name}, one unreachable", model, images, problem.classes, problem.batch_size)
    return replace(walled, unreachable=True)


def _predicted(name: str, model: nn.Module, images: Tensor, classes: int, batch_size: int) -> Problem:
    model.eval().requires_grad_(True)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(batch_size)])
    return Problem(name, model, images, labels, classes, batch_size)


def _digits(shape: Shape, classes: int, measured: bool) -> tuple[Tensor, Tensor]:
    """Digits resized to ``shape``; for 100 classes two digits side by side as a two-digit number."""
    from sklearn.datasets import load_digits

    data = load_digits()
    draws = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=draws)
    index = order[TRAINED_ON:] if measured else order[:TRAINED_ON]
    pixels = torch.tensor(data.images / 16, dtype=torch.float32)[index, None]
    labels = torch.tensor(data.target)[index]
    if classes == PAIRS:
        left, right = torch.randint(len(index), (2, MEASURED if measured else 5 * MEASURED), generator=draws)
        pixels, labels = torch.cat([pixels[left], pixels[right]], dim=3), 10 * labels[left] + labels[right]
    pixels = functional.interpolate(pixels, size=shape[1:], mode="bilinear", align_corners=False)
    return pixels.expand(-1, shape[0], -1, -1).contiguous(), labels


def _train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    draws = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=draws)
        optimiser.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    optimiser.zero_grad()
