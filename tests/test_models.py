"""Architectures, user factories and the check of what they return."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.models.build import Shape, build, eval_mode, seeded

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("dense", DIGITS, 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10),
        ("dense", MNIST, 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        ("cnn", DIGITS, 9 * 16 + 16 + 9 * 16 * 32 + 32 + 128 * 100 + 100 + 1010),
        # as counted for Wong & Kolter's network in the verification literature
        ("cnn", MNIST, 166_406),
        ("cnn", CIFAR, 48 * 16 + 16 + 256 * 32 + 32 + 2048 * 100 + 100 + 1010),
        # the usual count of the CIFAR variant of ResNet-18
        ("resnet18", CIFAR, 11_173_962),
    ],
)
def test_parameter_counts(name: str, shape: Shape, count: int) -> None:
    model = build(name, shape, classes=10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert all(module.training for module in model.modules())


def test_resnet18_keeps_the_resolution_of_its_stem() -> None:
    model = build("resnet18", CIFAR, classes=10, seed=0)
    seen = []
    model.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with eval_mode(model), torch.no_grad():
        model(torch.zeros(1, *CIFAR))
    assert seen == [(1, 64, 32, 32)]


@pytest.mark.parametrize("name", ["dense", "cnn", "resnet18"])
def test_the_seed_alone_determines_the_weights(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, DIGITS, classes=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (build(name, DIGITS, classes=10, seed=seed) for seed in (3, 4))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_seeded_restores_the_generator_after_an_error() -> None:
    draws = []

    def fail() -> None:
        with seeded(5):
            draws.append(torch.rand(3))
            raise KeyError

    before = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*draws)


def test_eval_mode_restores_each_flag() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))

    def fail() -> None:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    for flags in itertools.product([False, True], repeat=5):
        for module, flag in zip(model.modules(), flags, strict=True):
            module.training = flag
        with pytest.raises(KeyError):
            fail()
        assert tuple(module.training for module in model.modules()) == flags


FACTORIES = """
import typing
import torch
from torch import nn

class Outputs(typing.NamedTuple):
    logits: object
    one: object
    other: object

def plain(width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))

def fitted(*layers, shape, classes, **options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], classes))
    model.fitted_to = shape, classes
    return model

class Lazy(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    def forward(self, images):
        return self.layers(images)

    @classmethod
    def make(cls, classes):
        return cls(classes)

class NotANumber(Lazy):
    def forward(self, images):
        return super().forward(images) * torch.nan

class Integers(Lazy):
    def forward(self, images):
        return super().forward(images).argsort()

class Pair(Lazy):
    def forward(self, images):
        return [super().forward(images), images]

class Trio(Lazy):
    def forward(self, images):
        logits = super().forward(images)
        return Outputs(logits, images, None) if self.training else logits

def five(): return Lazy(5)
def single(): return Lazy(1)
def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
def needs(width): return plain(width)
def nothing(): return None
def broken(): raise RuntimeError("two\\nlines")
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, which is not on sys.path."""
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    (tmp_path / "my_broken_module.py").write_text("import my_missing_dependency")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "my_factories"
    assert sys.path == path
    sys.modules.pop("my_factories", None)


def test_factories_get_only_the_arguments_that_they_accept(factories: str) -> None:
    assert build(f"{factories}:plain", DIGITS, 10, 0)(torch.zeros(2, *DIGITS)).shape == (2, 10)
    assert build(f"{factories}:fitted", DIGITS, 4, 0).fitted_to == (DIGITS, 4)
    assert build(f"{factories}:Lazy", DIGITS, 4, 0)(torch.zeros(2, *DIGITS)).shape == (2, 4)
    assert build(f"{factories}:Lazy.make", DIGITS, 4, 0)(torch.zeros(2, *DIGITS)).shape == (2, 4)


def test_a_named_tuple_of_logits_is_accepted_while_training(factories: str) -> None:
    model = build(f"{factories}:Trio", DIGITS, 10, 0)
    assert type(model.train()(torch.zeros(2, *DIGITS))).__name__ == "Outputs"


def test_binary_models_have_one_logit(factories: str) -> None:
    for name in ("dense", "cnn", f"{factories}:Lazy.make"):
        assert build(name, DIGITS, 2, 0, binary=True)(torch.zeros(3, *DIGITS)).shape == (3, 1)
    message = r"^expected logits of shape \(2, 2\), got one per image, \(2, 1\); give --binary to read it as a binary "
    with pytest.raises(ValueError, match=message):
        build(f"{factories}:single", DIGITS, 2, 0)
    with pytest.raises(ValueError, match=r"^expected data of 2 classes with --binary, got 10; leave --binary out"):
        build("dense", DIGITS, 10, 0, binary=True)


def test_factories_are_seeded(factories: str) -> None:
    # the lazy layer draws its weights in the check's forward pass
    first, again, other = (build(f"{factories}:Lazy", DIGITS, 10, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "torchvision:NAME, timm:NAME, robustbench:NAME or pkg.module:factory, got 'resnet'; choose one"),
        ("my_missing:make", "expected an importable factory 'my_missing:make', got ModuleNotFoundError: No"),
        ("my_broken_module:make", "got ModuleNotFoundError: No module named 'my_missing_dependency'; give it"),
        ("my_factories:missing", "got AttributeError: module 'my_factories' has no attribute 'missing'; give"),
        ("my_factories:number", "expected 'my_factories:number' to be callable, got int; name a function"),
        ("my_factories:needs", "to require no arguments but shape and classes, got 'width'; give it a default"),
        ("my_factories:nothing", "to return a torch.nn.Module, got NoneType; return the model"),
        ("builtins:dict", "expected 'builtins:dict' to return a torch.nn.Module, got dict; return the model"),
        ("my_factories:broken", "to return a model, got RuntimeError: two lines; fix it"),
        ("my_factories:wide", "expected a model of images of shape (2, 1, 8, 8), got RuntimeError: "),
        ("my_factories:five", "expected logits of shape (2, 10), got (2, 5); return one logit per image"),
        ("my_factories:Pair", "expected logits as one tensor, got list; return the tensor alone"),
        ("my_factories:NotANumber", "got torch.float32 with 20 that are NaN or infinite; check"),
        ("my_factories:Integers", "got torch.int64 with 0 that are NaN or infinite; check"),
    ],
)
def test_errors_are_one_clear_line(factories: str, name: str, message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        build(name, DIGITS, classes=10, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)
