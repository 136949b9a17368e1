"""Bad networks and odd data: each gives right margins, a status that says so, or one clear line.

The table in docs/survival.md names these tests.
"""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.checks import ProbabilityWarning
from attacks.estimator import NORMS, InputError, Margins, Norm, Status
from attacks.measure import measure
from attacks.registry import create
from harness.files import load_checkpoint, save_checkpoint
from harness.tracker import MarginTracker
from tests.runs import ONE_LINE

ESTIMATORS = ("deepfool", "fmn:steps=40", "cascade", "apgd:rounds=3,steps=10")


class Affine(nn.Module):
    """Affine logits of the pixels, with whatever ``twist`` does to them on the way."""

    def __init__(self, classes: int = 4, pixels: int = 20, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(pixels, classes)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(classes, pixels, generator=draw))
            self.linear.bias.copy_(0.3 * torch.randn(classes, generator=draw) - 0.5 * self.linear.weight.sum(1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.twist(images).flatten(1))
        return logits

    def twist(self, images: Tensor) -> Tensor:
        return images

    def exact(self, images: Tensor, norm: Norm) -> Tensor:
        return affine_margins(self.linear.weight, self.linear.bias, images, norm, domain="box")


def images(count: int = 6, shape: tuple[int, ...] = (1, 4, 5), seed: int = 1) -> Tensor:
    return 0.4 + 0.2 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def margins(model: nn.Module, given: Tensor, text: str = "cascade", norm: Norm = "l2", **more: Any) -> Margins:
    return measure(model, given, create(text), norm, **more)


def assert_exact(model: Affine, given: Tensor, **more: Any) -> None:
    """Every estimator and norm near the exact margin, image by image, and never below it."""
    for norm in NORMS:
        exact = model.exact(given, norm)
        for text in ESTIMATORS:
            ratio = margins(model, given, text, norm, **more).distance / exact
            assert (ratio > 1 - 1e-5).all(), (text, norm, ratio)
            # few steps, from a point that another class may be nearer to
            most = 1.15 if text.startswith(("fmn", "apgd")) else 1.02
            assert (ratio < most).all(), (text, norm, ratio)


def assert_statuses(found: Margins) -> None:
    """A distance is a number where there is a witness, 0 on a tie and inf otherwise; never NaN."""
    for status, distance in zip(found.status, found.distance.tolist(), strict=True):
        if status in (Status.FOUND, Status.FOUND_AFTER_NOISE):
            assert 0 < distance < math.inf
        else:
            assert distance == (0 if status is Status.TIED else math.inf)


# networks that are right but unusual


class Scaling(Affine):
    """Writes into its input, as ``relu(inplace=True)`` in a first layer does."""

    def twist(self, images: Tensor) -> Tensor:
        return images.mul_(2.0).div_(2.0)


class Normalised(Affine):
    """Normalisation inside the model, where it belongs: distances stay in pixels."""

    def twist(self, images: Tensor) -> Tensor:
        return ((images - 0.13) / 0.3) * 0.3 + 0.13


class Dropping(Affine):
    """Dropout and batch norm, which do nothing in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.9), nn.BatchNorm2d(1, eps=0.0)

    def twist(self, images: Tensor) -> Tensor:
        kept: Tensor = self.norm(self.drop(images))
        return kept


class Shared(Affine):
    """One weight under two names, and a buffer that is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.linear
        self.register_buffer("unused", torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 0.5 * (self.linear(images.flatten(1)) + self.again(images.flatten(1)))
        return logits


def test_an_affine_network_is_measured_exactly() -> None:
    assert_exact(Affine(), images())


def test_a_model_that_writes_into_its_input() -> None:
    given = images()
    before = given.clone()
    assert_exact(Scaling(), given)
    assert torch.equal(given, before)


def test_normalisation_inside_the_model() -> None:
    assert_exact(Normalised(), images())


def test_dropout_and_batch_norm_left_in_training_mode() -> None:
    model = Dropping().train()
    assert_exact(model, images())
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, torch.zeros(1))  # type: ignore[arg-type]


def test_shared_parameters(tmp_path: Path) -> None:
    model = Shared()
    assert_exact(model, images())
    save_checkpoint(tmp_path / "a.safetensors", model, 0)
    other = Shared()
    with torch.no_grad():
        other.linear.weight.zero_()
    load_checkpoint(tmp_path / "a.safetensors", other)
    assert torch.equal(other.again.weight, model.linear.weight)
    assert other.again.weight is other.linear.weight


# data that is right but unusual


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5), (1, 1, 20), (2, 10, 1)], ids=str)
def test_channels_and_shapes(shape: tuple[int, int, int]) -> None:
    assert_exact(Affine(pixels=math.prod(shape)), images(shape=shape))


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_two_three_and_a_thousand_classes(classes: int) -> None:
    model, given = Affine(classes), images(2)
    for norm in NORMS:
        found = margins(model, given, "cascade", norm)
        assert_statuses(found)
        assert (found.distance / model.exact(given, norm) < 1.05).all()
        assert (found.distance / model.exact(given, norm) > 1 - 1e-5).all()


def test_one_image() -> None:
    assert_exact(Affine(), images(1))


def test_duplicate_images_have_equal_margins() -> None:
    given = images(3).repeat_interleave(2, 0)
    for text in ESTIMATORS:
        distance = margins(Affine(), given, text, seeds=[5] * 6).distance
        assert torch.allclose(distance[::2], distance[1::2], rtol=1e-5)


def test_images_that_are_not_contiguous() -> None:
    wide = images(6, (5, 4, 1)).permute(0, 3, 2, 1)
    assert not wide.is_contiguous()
    assert_exact(Affine(), wide)


def test_images_at_the_bounds() -> None:
    """Black, white and half of both: there the box stops every step in one direction."""
    given = torch.stack([torch.zeros(1, 4, 5), torch.ones(1, 4, 5), torch.tensor([0.0, 1.0]).repeat(10).view(1, 4, 5)])
    model = Affine()
    for norm in NORMS:
        found, exact = margins(model, given, "cascade", norm), model.exact(given, norm)
        assert_statuses(found)
        assert (found.distance / exact > 1 - 1e-5).all()
        assert (found.distance / exact < 1.1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    model, given = Affine().to(dtype), images().to(dtype)
    found = margins(model, given)
    assert_statuses(found)
    # logits are right to a unit of their own size, which is up to 4, and gradients are 4 to 6 long
    slack = 8 * torch.finfo(dtype).eps
    assert ((found.distance - model.exact(given, "l2")).abs() < slack + 2e-4).all()


# networks that cannot be measured, or not everywhere


class Broken(nn.Module):
    """Affine logits, but for those of bright images, which are ``value``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = Affine(), value

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1) > 0.9
        logits: Tensor = self.inner(images)
        return torch.where(bright[:, None], torch.tensor(self.value), logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    given = images()
    given[2] = 0.95
    with pytest.raises(InputError, match="expected finite logits, got NaN or inf for 1 of 6 images"):
        margins(Broken(value), given)
    # met on the way only, such a point is no witness
    assert_statuses(margins(Broken(value), images()))


class Steep(nn.Module):
    """Finite logits whose gradient is infinite at the images themselves: ``sqrt`` of 0."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)

    def forward(self, images: Tensor) -> Tensor:
        away = (images - self.centre).abs().flatten(1).sqrt().sum(1)
        return torch.stack([torch.full_like(away, 2.0), away], 1)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_gradients_that_are_not_finite(text: str) -> None:
    centre = images(1)
    assert_statuses(margins(Steep(centre), centre.repeat(3, 1, 1, 1), text))


@pytest.mark.parametrize("text", ESTIMATORS)
def test_constant_outputs_have_no_boundary(text: str) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([2.0, 0.0, 0.0]).expand(len(images), 3) + 0 * images.flatten(1).sum(1, keepdim=True)

    found = margins(Constant(), images(), text)
    assert set(found.status) <= {Status.NOT_FOUND, Status.FAILED}
    assert_statuses(found)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_outputs_that_are_all_equal_are_ties(text: str) -> None:
    class Equal(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * images.flatten(1)[:, :3]

    found = margins(Equal(), images(), text)
    assert set(found.status) == {Status.TIED}
    assert_statuses(found)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_dead_gradients(text: str) -> None:
    class Stepped(Affine):
        def twist(self, images: Tensor) -> Tensor:
            return (images * 4).round() / 4

    assert_statuses(margins(Stepped(), images(), text))


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["softmax", "saturated softmax"])
@pytest.mark.parametrize("text", ESTIMATORS)
def test_a_model_that_ends_in_softmax_is_warned_of(text: str, scale: float) -> None:
    class Soft(Affine):
        def forward(self, images: Tensor) -> Tensor:
            return (scale * super().forward(images)).softmax(1)

    with pytest.warns(ProbabilityWarning, match="probabilities, not logits"):
        found = margins(Soft(), images(), text)
    assert_statuses(found)
    assert (found.distance / Soft().exact(images(), "l2") > 1 - 1e-5).all()


@pytest.mark.filterwarnings("error::attacks.checks.ProbabilityWarning")
def test_logits_and_log_probabilities_are_not_warned_of() -> None:
    class Log(Affine):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).log_softmax(1)

    assert_exact(Log(), images())
    assert_exact(Affine(2), images())


# data and models that are refused in one line


def refused(action: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        action(*given, **named)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value
    return str(caught.value)


def test_images_outside_the_bounds_or_normalised_outside_the_model() -> None:
    normalised = (images() - 0.13) / 0.05
    assert "undo a Normalize transform" in refused(margins, Affine(), normalised)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite(value: float) -> None:
    given = images()
    given[0, 0, 0, 0] = value
    assert "clean the data" in refused(margins, Affine(), given)


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_labels_outside_the_classes(tmp_path: Path, label: int) -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, label])
    tracker = MarginTracker(tmp_path / "run", {"test": (images(), labels)}, ["deepfool"])
    assert re.search(rf"labels of test in 0\.\.3, got {label}", refused(tracker.update, 0, Affine()))
    assert not list((tmp_path / "run").glob("margins/*/*"))


def test_one_class_is_none() -> None:
    assert "at least 2 classes" in refused(margins, Affine(1), images())


def test_a_model_is_left_as_it_was() -> None:
    model = Dropping().train()
    before = copy.deepcopy(model.state_dict())
    for text in ESTIMATORS:
        margins(model, images(), text)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
