"""Soundness of certifiers on random networks whose structure is easily misread.

``python -m tests.random_networks --networks 1000`` prints the counts.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from attacks.measure import measure
from attacks.registry import create, create_certifier
from attacks.types import NORMS, InputError, Norm, UnsoundError

SHAPE = (1, 4, 4)
WIDTH, CLASSES = 6, 3
CERTIFIERS = ("crown", "ibp", "exact:seconds=0.05")
ATTACKS = ("cascade:budget=100", "deepfool")
POINTS = 200


class Tripled(nn.Module):
    """A custom parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


class Body(nn.Module):
    """A convolutional front, twists of its features, and a last layer."""

    def __init__(self, front: str, twists: Sequence[str]) -> None:
        super().__init__()
        self.front, self.twists = FRONTS[front](), twists
        features = self.front(torch.zeros(1, *SHAPE)).shape[1]
        self.first, self.second = nn.Linear(features, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        values = self.first(self.front(images))
        for twist in self.twists:
            values = TWISTS[twist](self, values)
        logits: Tensor = self.last(values)
        return logits


def rectified(values: Tensor) -> Tensor:
    """ReLU in place, as a statement whose result is discarded."""
    values.relu_()
    return values


def half_rectified(values: Tensor) -> Tensor:
    """A view of the values in place."""
    values[:, : WIDTH // 2].relu_()
    return values


def written(values: Tensor) -> Tensor:
    """One entry is overwritten by another entry."""
    values = values.clone()
    values[:, 0] = 2 * values[:, 1]
    return values


def added_to_itself(values: Tensor) -> Tensor:
    """The sum of the result of an in-place operation and of its changed argument."""
    changed = values.relu_()
    return values + changed


def behind(values: Tensor) -> Tensor:
    """An in-place ReLU whose result is discarded, though it has changed its argument."""
    F.relu(values, inplace=True)
    return values


FRONTS: dict[str, Callable[[], nn.Module]] = {
    "flat": lambda: nn.Flatten(),
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten()),
    "norm": lambda: nn.Sequential(nn.Conv2d(1, 3, 2, stride=2), nn.BatchNorm2d(3), nn.LeakyReLU(0.1), nn.Flatten()),
    "max pool": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()),
    "average pool": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Dropout(), nn.Flatten()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
}
TWISTS: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "relu": lambda net, h: net.second(F.relu(h)),
    "leaky": lambda net, h: F.leaky_relu(net.second(h), 0.2),
    "statement": lambda net, h: net.second(rectified(h)),
    "dropped": lambda net, h: net.second(behind(h)),
    "sum with in place": lambda net, h: added_to_itself(h),
    "view in place": lambda net, h: half_rectified(net.second(h)),
    "written": lambda net, h: written(F.relu(h)),
    "pre-activation block": lambda net, h: h + net.block(h),
    "residual": lambda net, h: h + F.relu(net.second(h)),
    "shared twice": lambda net, h: net.second(F.relu(net.second(h))),
    "added in place": lambda net, h: F.relu(h).add_(net.second(h)),
    "alpha": lambda net, h: torch.add(F.relu(h), net.second(h), alpha=3.0),
    "reversed": lambda net, h: torch.rsub(F.relu(h), net.second(h), alpha=2.0),
    "data": lambda net, h: h + F.relu(net.second(h)).data,
    "cat and slice": lambda net, h: torch.cat([F.relu(h[:, 3:]), h[:, :3], h.new_ones(len(h), 1)], 1)[:, 1:],
    "matrix": lambda net, h: F.relu(h) @ net.second.weight.T + 0.5,
    "floor": lambda net, h: h + torch.div(net.second(h), 0.3, rounding_mode="floor"),
    "square": lambda net, h: net.second(h).square(),
    "sigmoid": lambda net, h: torch.sigmoid(net.second(h)),
    "product": lambda net, h: h * net.second(h),
    "mean of the batch": lambda net, h: h - 0.5 * h.mean(0),
}
DRESSINGS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "spectral norm": lambda m: parametrizations.spectral_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
    "own parametrization": lambda m: parametrize.register_parametrization(m, "weight", Tripled()),
    "hook -3": lambda m: m.register_forward_hook(lambda _, inputs, result: -3 * result),
    "hook relu": lambda m: m.register_forward_hook(lambda _, inputs, result: F.relu(result)),
    "hook squared": lambda m: m.register_forward_hook(lambda _, inputs, result: result * result),
    "hook in place": lambda m: m.register_forward_hook(lambda _, inputs, result: result.mul_(2)),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "pre-hook squared": lambda m: m.register_forward_pre_hook(lambda _, inputs: (inputs[0] ** 2,)),
}
PLACES = ("first", "second", "last", "")


@dataclass(frozen=True)
class Recipe:
    """The parts of a network; ``dressings`` are (place, name), where the model itself has an empty place."""

    front: str
    twists: tuple[str, ...]
    dressings: tuple[tuple[str, str], ...]
    seed: int

    def build(self) -> nn.Module:
        """The network, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = Body(self.front, self.twists)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.2, 2)
            for place, name in self.dressings:
                DRESSINGS[name](net.get_submodule(place))
            return net.eval()


def fitting(place: str) -> list[str]:
    """Dressings that are possible at a place: the whole model has no weight to parametrize."""
    return [name for name in DRESSINGS if place or "hook" in name]


def draw_recipe(draw: random.Random) -> Recipe:
    """A recipe at random."""
    return Recipe(
        draw.choice(list(FRONTS)),
        tuple(draw.choices(list(TWISTS), k=draw.randint(0, 2))),
        tuple((place, draw.choice(fitting(place))) for place in draw.sample(PLACES, draw.randint(0, 2))),
        draw.randrange(2**31),
    )


@dataclass
class Counts:
    """Counts over networks; one certifier in one norm on one network counts as one proof.

    Attributes:
        refused: proofs that were refused. alarms: those that ended in an UnsoundError.
        points: sampled points and witnesses that bounds were compared with.
        false: bounds above the distance of a point of another class.
    """

    networks: int = 0
    proofs: int = 0
    refused: int = 0
    alarms: int = 0
    bounds: int = 0
    points: int = 0
    false: list[str] = field(default_factory=list)


def examine(recipe: Recipe, counts: Counts, certifiers: Sequence[str] = CERTIFIERS, images: int = 2) -> None:
    """Check that every certifier is sound on a network or refuses it, by attacks and by sampling within the bounds."""
    draw = torch.Generator().manual_seed(recipe.seed)
    pixels = torch.rand(images, *SHAPE, generator=draw)
    counts.networks += 1
    for norm in (NORMS[recipe.seed % 2],):
        upper = torch.full((images,), torch.inf, dtype=torch.float64)
        for text in ATTACKS:
            upper = torch.minimum(
                upper, measure(recipe.build(), pixels, create(text), norm, noise_retries=0, checked=True).distance
            )
        for text in certifiers:
            counts.proofs += 1
            try:
                certified = create_certifier(text).certify(
                    recipe.build(), pixels, norm, domain="box", upper=torch.full_like(upper, torch.inf)
                )
            except InputError:
                counts.refused += 1
                continue
            except UnsoundError:
                counts.alarms += 1
                continue
            counts.bounds += images
            counts.points += images * (POINTS + len(ATTACKS))
            nearer = _nearer(recipe.build(), pixels, norm, certified.lower, draw) | (
                certified.lower > upper * (1 + 1e-6)
            )
            counts.false += [f"{recipe} {text} {norm}"] * int(nearer.sum())


@torch.no_grad()
def _nearer(model: nn.Module, pixels: Tensor, norm: Norm, radii: Tensor, draw: torch.Generator) -> Tensor:
    """Whether a point sampled within each radius has another class than the image."""
    move = torch.randn(POINTS, *pixels.shape, generator=draw)
    length = move.flatten(2).abs().amax(2) if norm == "linf" else move.flatten(2).norm(dim=2)
    move = move.sign() if norm == "linf" else move / length[..., None, None, None]
    share = torch.rand(POINTS, len(pixels), 1, 1, 1, generator=draw).sqrt() * (1 - 1e-5)
    reach = radii.clamp_max(10.0).float().view(1, -1, 1, 1, 1)
    points = (pixels + share * reach * move).clamp(0.0, 1.0)
    # one image at a time: a model may mix the images of a batch
    predicted = torch.cat([model(one[None]) for one in pixels]).argmax(1)
    others = torch.cat([model(one[None]) for one in points.flatten(0, 1)]).argmax(1).view(POINTS, -1)
    return (others != predicted).any(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Examine random networks and print the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_networks", description=__doc__)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    counts, draw = Counts(), random.Random(arguments.seed)
    for _ in range(arguments.networks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(draw_recipe(draw), counts)
    print(
        f"{counts.networks} networks, {counts.proofs} proofs: {counts.refused} refused, {counts.alarms} alarms, "
        f"{counts.bounds} bounds held against {counts.points} points, {len(counts.false)} false"
    )
    print("\n".join(counts.false))
    return 1 if counts.false or counts.alarms else 0


if __name__ == "__main__":
    sys.exit(main())
