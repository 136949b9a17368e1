"""Parts of the exact solver: reading a model, rounding, regions, linear bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from torch import Tensor, nn
from torch.nn import functional

from attacks.certify.branch_and_bound.region import HalfSpace, Region
from attacks.certify.branch_and_bound.relaxation import (
    Lines,
    Surroundings,
    interval_bounds,
    steeper_slopes,
    tighten,
    upper_lines,
)
from attacks.certify.branch_and_bound.relu_network import ReluNetwork, read_network
from attacks.types import DOMAINS, NORMS, Domain, InputError, Norm
from harness.models.build import build
from tests.brute_force import lines_of_low_chords, tiny
from tests.grids import covering
from tests.milp import linf_margin

# --- reading ---


class Home(nn.Module):
    """Arithmetic, functions and methods in place of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2]).view(1, 2, 1, 1))
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.first((images - self.mean) / 0.3))
        x = 2 * functional.avg_pool2d(x, 2) + 1
        logits: Tensor = self.second(x.view(x.size(0), -1).relu())
        return logits


class Around(nn.Module):
    """Paths around ReLUs, from the image and from hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(72, 9), nn.Linear(9, 9), nn.Linear(72, 9)
        self.last = nn.Linear(9, 3)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        x = self.first(pixels).relu()
        x = functional.leaky_relu(x - self.second(x).relu(), 0.1) + self.third(pixels)
        logits: Tensor = self.last(x.relu() + x)
        return logits


def warmed_up(*modules: nn.Module) -> nn.Module:
    """The model with BatchNorm statistics, in training mode."""
    model = nn.Sequential(*modules)
    model(3 * torch.rand(64, 2, 6, 6) - 1)
    return model


READABLE: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 4)),
    "affine": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Linear(9, 4)),
    "normalize": lambda: nn.Sequential(transforms.Normalize([0.1, 0.2], [0.3, 0.4]), nn.Flatten(), nn.Linear(72, 3)),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    ),
    "batch norm": lambda: warmed_up(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Dropout2d(), nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    ),
    "arithmetic": Home,
    "max pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.MaxPool2d((3, 2), (1, 2), (1, 0), (1, 2)),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(9, 4),
    ),
    "leaky": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.LeakyReLU(0.2), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4)
    ),
    "residual": Around,
    "cnn": lambda: build("cnn", (2, 6, 6), 5, seed=0),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_read_network_computes_the_models_logits(name: str) -> None:
    model = READABLE[name]()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    network = read_network(model, (2, 6, 6))
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    images = 2 * torch.rand(20, 2, 6, 6, dtype=torch.float64) - 0.5
    with torch.no_grad():
        expected = model.double().eval()(images).numpy()
    got = np.stack([network.logits(image.flatten().numpy()) for image in images])
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    layers = {"arithmetic": 2, "max pooling": 7, "residual": 4, "leaky": 2}
    assert network.hidden == layers.get(name, sum(isinstance(module, nn.ReLU) for module in model.modules()))
    assert bool(network.linear) == (name in ("max pooling", "residual", "leaky"))
    if network.linear:
        # control: with ReLUs in the place of units that carry values along
        assert not np.allclose(replace(network, linear=()).logits(images[0].flatten().numpy()), expected[0])


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(72, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.function(self.layer(images.flatten(1)))
        return logits


def in_padding(logits: Tensor) -> Tensor:
    """The only window holds no pixel."""
    pooled = functional.max_pool2d(logits[:, None, None], (1, 2), 1, (0, 1), (1, 4))
    return logits + pooled.relu().flatten(1)


def branching(logits: Tensor) -> Tensor:
    return logits if logits.sum() > 0 else -logits


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(18, 3)), "the layer 0: MaxPool2d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Sigmoid(), nn.Linear(4, 3)), "the layer 2: Sigmoid"),
        (Lambda(torch.sigmoid), "the operation sigmoid"),
        (Lambda(in_padding), "a window that lies wholly in the padding"),
        (Lambda(lambda z: z * z), "the operation mul in the forward pass of two results of the image"),
        (Lambda(lambda z: 1 / z), "the operation reciprocal in the forward pass"),
        (Lambda(lambda z: [z, z]), "got list as the result"),
        (Lambda(branching), "_local_scalar_dense in the forward pass, which makes a number of the image's values"),
        (Lambda(lambda z: z - z.mean(0)), "leave out what mixes images"),
        (Lambda(lambda z: z[:, :1]), "expected logits (B, K) of at least 2 classes, got (1, 1) of one image"),
        (Lambda(lambda z: z / 0.0), "expected finite weights, got NaN or inf"),
        (nn.Sequential(nn.Flatten(), nn.Linear(71, 3)), "RuntimeError"),
        (nn.Sequential(nn.Conv2d(2, 200, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 3)), "got 7200"),
        (nn.Sequential(nn.Flatten(), nn.Linear(72, 3000), nn.LeakyReLU(), nn.Linear(3000, 3)), "got 6000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_give_a_one_line_error(model: nn.Module, words: str) -> None:
    with pytest.raises(InputError) as raised:
        read_network(model, (2, 6, 6))
    message = str(raised.value)
    assert words in message
    assert "expected" in message
    assert "; " in message
    assert "\n" not in message


def test_the_fingerprint_depends_on_every_number() -> None:
    model = tiny(0, 4, 3, 2)
    first = read_network(model, (1, 1, 4)).fingerprint()
    assert read_network(model.double(), (1, 1, 4)).fingerprint() == first
    with torch.no_grad():
        model[-1].bias[1] += 1e-12
    assert read_network(model, (1, 1, 4)).fingerprint() != first


# --- rounding ---


def test_rounding_errors_are_within_their_bound_and_the_bound_is_tight() -> None:
    draw, ratios = random.Random(0), []
    for seed in range(10):
        network = read_network(tiny(seed, 12, 10, 8, 3), (1, 1, 12))
        image = np.array([draw.random() for _ in range(12)])
        values = [Fraction(x) for x in image]
        doubts = network.doubts(np.abs(image))
        for output, weight, bias, doubt in zip(
            network.blocks(image), network.weights, network.biases, doubts, strict=True
        ):
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(weight, bias, strict=True)
            ]
            error = np.array([abs(float(Fraction(o) - v)) for o, v in zip(output, values, strict=True)])
            assert (error <= doubt).all()
            ratios.append((error / doubt).max())
            values = [max(v, Fraction(0)) for v in values]
    # control: a bound a thousand times smaller does not hold
    assert max(ratios) > 1e-4


# --- regions ---


def region(norm: Norm, domain: Domain, radius: float, seed: int, pixels: int = 5) -> Region:
    draw = np.random.default_rng(seed)
    image = np.clip(2 * draw.random(pixels) - 0.5, 0, 1)
    free = np.full(pixels, np.inf)
    low, high = (-image, 1 - image) if domain == "box" else (-free, free)
    return Region(norm=norm, radius=radius, low=low, high=high)


def moves(inside: Region, count: int, seed: int) -> np.ndarray:
    """Random perturbations, most of them at the boundary of the region."""
    draw = np.random.default_rng(seed)
    ways = draw.standard_normal((count, len(inside.low)))
    ways = np.sign(ways) * np.minimum(1, 2 * draw.random(ways.shape)) if inside.norm == "linf" else ways
    length = np.array([inside.length(way) for way in ways])
    far = inside.radius * np.minimum(1, 1.5 * draw.random(count)) / length
    # rounding may exceed the radius in the last digit
    return np.clip(ways * far[:, None] * (1 - 1e-12), inside.low, inside.high)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_largest_gain_of_rows_is_a_tight_upper_bound(norm: Norm, domain: Domain) -> None:
    closeness = []
    for seed in range(30):
        inside = region(norm, domain, 0.1 + 0.05 * seed, seed)
        draw = np.random.default_rng(seed)
        rows, normal = draw.standard_normal((8, 5)), draw.standard_normal(5)
        points = moves(inside, 4000, seed)
        within = HalfSpace(normal=normal, gap=float(np.quantile(points @ normal, 0.8)))
        kept = points[points @ normal >= within.gap]
        for bound, there in ((inside.most(rows), points), (inside.most(rows, within), kept)):
            assert (there @ rows.T <= bound + 1e-12).all()
            closeness.append((there @ rows.T).max(0) / bound)
    # control: the bounds are nearly reached by samples
    assert np.median(np.concatenate(closeness)) > 0.9


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_a_half_space(norm: Norm, domain: Domain) -> None:
    unreachable = 0
    for seed in range(40):
        inside = region(norm, domain, 1.0, seed)
        normal = np.random.default_rng(seed).standard_normal(5)
        half = HalfSpace(normal=normal, gap=0.05 * seed - 0.1)
        length, move = inside.nearest(half)
        corner = np.where(normal > 0, inside.high, inside.low)
        if domain == "box" and corner @ normal < half.gap:
            assert np.isinf(length)
            unreachable += 1
            continue
        assert normal @ move >= half.gap - 1e-12
        assert inside.length(move) == pytest.approx(length)
        assert ((move >= inside.low) & (move <= inside.high)).all()
        # no shorter perturbation gains as much
        shorter = Region(norm=norm, radius=length * (1 - 1e-6), low=inside.low, high=inside.high)
        assert half.gap <= 0 or shorter.most(normal[None])[0] < half.gap
    assert unreachable > 3 or domain == "free"


def test_zero_rows_have_zero_gain() -> None:
    for norm in NORMS:
        inside = region(norm, "box", 8.0, 0)
        assert inside.most(np.zeros((2, 5))).tolist() == [0.0, 0.0]
        assert inside.nearest(HalfSpace(normal=np.zeros(5), gap=0.1))[0] == np.inf


# --- linear bounds ---


def violated_bounds(norm: Norm, domain: Domain, lines_of: Callable[..., Lines], linear: bool = False) -> int:
    """How many of the linear bounds of tiny networks are violated by some sampled perturbation."""
    broken = 0
    for seed in range(12):
        network = read_network(tiny(seed, 5, 3, 3, 3), (1, 1, 5))
        if linear:
            # of both hidden layers, the last two units have no ReLU
            network = replace(network, linear=(np.arange(3) > 0, np.arange(3) > 0))
        inside = region(norm, domain, 0.2 + 0.05 * seed, seed)
        image = -inside.low if domain == "box" else np.random.default_rng(seed).random(5)
        around = Surroundings(network=network, image=image, region=inside)
        bounds = tighten(around, interval_bounds(around))
        slopes = [steeper_slopes(bounds, layer) for layer in range(2)]
        functionals = np.random.default_rng(seed).standard_normal((6, 3))
        lines = lines_of(around, bounds, slopes, functionals, 2)
        points = moves(inside, 3000, seed)
        outputs = [network.blocks(image + move) for move in points]
        for layer in range(2):
            values = np.stack([output[layer] for output in outputs])
            broken += int(((values < bounds.low[layer]) | (values > bounds.high[layer])).any())
        logits = np.stack([output[-1] for output in outputs])
        broken += int((logits @ functionals.T > points @ lines.rows.T + lines.offsets).any(0).sum())
    return broken


@pytest.mark.parametrize(("norm", "domain"), covering(NORMS, DOMAINS))
def test_lines_bound_the_network(norm: Norm, domain: Domain) -> None:
    assert violated_bounds(norm, domain, upper_lines) == 0
    assert violated_bounds(norm, domain, upper_lines, linear=True) == 0


@pytest.mark.parametrize(("norm", "domain"), covering(NORMS, DOMAINS))
def test_control_lines_of_relus_that_are_not_there_are_detected(norm: Norm, domain: Domain) -> None:
    def of_relus(around: Surroundings, *rest: Any) -> Lines:
        return upper_lines(replace(around, network=replace(around.network, linear=())), *rest)

    assert violated_bounds(norm, domain, of_relus, linear=True) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "domain"), covering(NORMS, DOMAINS))
def test_control_chords_that_are_too_low_are_detected(norm: Norm, domain: Domain) -> None:
    assert violated_bounds(norm, domain, lines_of_low_chords) > 0


# --- the integer program ---


def test_a_program_without_another_class_in_reach() -> None:
    network = ReluNetwork(
        weights=(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[-1.0, 0.0], [0.0, 0.0]])),
        biases=(np.zeros(2), np.array([1.0, 0.0])),
    )
    image, low, high = np.array([0.25, 0.5]), np.full(2, -2.0), np.full(2, 2.0)
    # the logits are (1 - max(x, 0), 0)
    solution = linf_margin(network, image, low, high, reach=1.5)
    assert (solution.lower, solution.upper) == (pytest.approx(0.75), pytest.approx(0.75))
    assert np.isinf(linf_margin(network, image, low, high, reach=0.5).lower)
