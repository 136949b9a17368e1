"""Unusual networks and data: each gives correct margins, an informative status, or a one-line error.

docs/survival.md summarises them.
"""

import copy
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.certify.certifiers import Crown
from attacks.checks import BatchWarning, GradientWarning, ModelWarning, ProbabilityWarning
from attacks.estimator import Margins, Status
from attacks.isolation import frozen_view
from attacks.isolation.outputs import Logits
from attacks.measure import measure
from attacks.registry import create
from attacks.types import NORMS, InputError, Norm
from harness.config.options import ConfigError
from harness.measuring.rows import measure_margins
from harness.store.tensors import load_checkpoint, save_checkpoint, weights_checksum
from harness.tracking.tracker import MarginTracker
from tests.grids import covering
from tests.runs import ONE_LINE

ESTIMATORS = ("deepfool", "fmn:steps=40", "cascade")
# every registered estimator without an optional package, with cheap settings
ALL = (
    *(*ESTIMATORS, "apgd:rounds=3,steps=10", "deepfool:engine=foolbox", "ddn:steps=40", "sdf", "linear", "fab:steps=5"),
    *("cw:steps=40,binary_search_steps=4", "pgd:rounds=8", "best:of=deepfool+fmn:steps=20"),
    *("foolbox:L2DeepFoolAttack", "torchattacks:DeepFool"),
)


CPU = torch.device("cpu")


class Affine(nn.Module):
    """Affine logits of the pixels, changed by ``twist``."""

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


def margins(model: nn.Module, batch: Tensor, text: str = "cascade", norm: Norm = "l2", **more: Any) -> Margins:
    return measure(model, batch, create(text), norm, **more)


def assert_exact(model: Affine, batch: Tensor, **more: Any) -> None:
    """Distances of every estimator and norm are near the exact margin of each image, and never below it."""
    for norm in NORMS:
        exact = model.exact(batch, norm)
        for text in ESTIMATORS:
            ratio = margins(model, batch, text, norm, **more).distance / exact
            assert (ratio > 1 - 1e-5).all(), (text, norm, ratio)
            # few steps, from a point where another class may be nearer
            most = 1.15 if text.startswith("fmn") else 1.02
            assert (ratio < most).all(), (text, norm, ratio)


def assert_statuses(measured: Margins) -> None:
    """A distance is finite with a witness, 0 on a tie and inf otherwise; never NaN."""
    for status, distance in zip(measured.status, measured.distance.tolist(), strict=True):
        if status in (Status.FOUND, Status.FOUND_AFTER_NOISE):
            assert 0 < distance < math.inf
        else:
            assert distance == (0 if status is Status.TIED else math.inf)


# valid but unusual networks


class Scaling(Affine):
    """Writes into its input, as ``relu(inplace=True)`` does in a first layer."""

    def twist(self, images: Tensor) -> Tensor:
        return images.mul_(2.0).div_(2.0)


class Normalised(Affine):
    """Normalisation inside the model: distances stay in pixel units."""

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
    """One weight under two names, and an unused buffer."""

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
    batch = images()
    before = batch.clone()
    assert_exact(Scaling(), batch)
    assert torch.equal(batch, before)


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


# valid but unusual data


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5), (1, 1, 20), (2, 10, 1)], ids=str)
def test_channels_and_shapes(shape: tuple[int, int, int]) -> None:
    assert_exact(Affine(pixels=math.prod(shape)), images(shape=shape))


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_two_three_and_a_thousand_classes(classes: int) -> None:
    model, batch = Affine(classes), images(2)
    for norm in NORMS:
        measured = margins(model, batch, "cascade", norm)
        assert_statuses(measured)
        assert (measured.distance / model.exact(batch, norm) < 1.05).all()
        assert (measured.distance / model.exact(batch, norm) > 1 - 1e-5).all()


def test_one_image() -> None:
    assert_exact(Affine(), images(1))


def test_duplicate_images_have_equal_margins() -> None:
    batch = images(3).repeat_interleave(2, 0)
    for text in ESTIMATORS:
        distance = margins(Affine(), batch, text, seeds=[5] * 6).distance
        assert torch.allclose(distance[::2], distance[1::2], rtol=1e-5)


def test_images_that_are_not_contiguous() -> None:
    wide = images(6, (5, 4, 1)).permute(0, 3, 2, 1)
    assert not wide.is_contiguous()
    assert_exact(Affine(), wide)


def test_images_at_the_bounds() -> None:
    """Black, white and half of each: the box blocks every step in one direction."""
    batch = torch.stack([torch.zeros(1, 4, 5), torch.ones(1, 4, 5), torch.tensor([0.0, 1.0]).repeat(10).view(1, 4, 5)])
    model = Affine()
    for norm in NORMS:
        measured, exact = margins(model, batch, "cascade", norm), model.exact(batch, norm)
        assert_statuses(measured)
        assert (measured.distance / exact > 1 - 1e-5).all()
        assert (measured.distance / exact < 1.1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    model, batch = Affine().to(dtype), images().to(dtype)
    measured = margins(model, batch)
    assert_statuses(measured)
    # logits are up to 4, correct to rounding at that size, and gradients have norms of 4 to 6
    slack = 8 * torch.finfo(dtype).eps
    assert ((measured.distance - model.exact(batch, "l2")).abs() < slack + 2e-4).all()


class Reduced(Affine):
    """Logits of lower precision than the images: computed under autocast, or cast at the end."""

    def __init__(self, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.how, self.dtype = how, dtype
        self.convolution = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def twist(self, images: Tensor) -> Tensor:
        return self.convolution(images) if "convolution" in self.how else images

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled="autocast" in self.how):
            return super().forward(images).to(self.dtype)


REDUCED = [
    ("autocast", torch.bfloat16),
    ("autocast after a convolution", torch.bfloat16),
    ("at the end", torch.bfloat16),
    ("at the end, after a convolution", torch.float16),
]


@pytest.mark.parametrize(("text", "reduced"), covering(ALL, REDUCED))
def test_logits_of_lower_precision_than_the_images(text: str, reduced: tuple[str, torch.dtype]) -> None:
    how, dtype = reduced
    model = Reduced(how, dtype)
    exact = model.exact(images(12), "l2")
    # at smaller distances all other classes are within a rounding step or two of the logits
    batch, exact = images(12)[exact > 0.05][:2], exact[exact > 0.05][:2]
    measured = margins(model, batch, text)
    assert measured.status == (Status.FOUND, Status.FOUND)
    # logits and pixels are up to 0.5, gradients of logit gaps have norms of 4 to 7
    assert ((measured.distance - exact).abs() < torch.finfo(dtype).eps + 0.02 * exact).all(), measured.distance / exact


def test_logits_are_cast_once_and_never_to_less() -> None:
    for logits, pixels, result in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float32),
    ):
        model = Reduced("at the end", logits).to(pixels)
        with frozen_view(model, (0.0, 1.0), "box", CPU) as view:
            assert str(view(images().to(pixels)).dtype) == str(result)
            assert str(view.precision) == str(logits)


# models that do not return one row of logits per image


class Returning(nn.Module):
    """Another model's logits in another form."""

    def __init__(self, inner: nn.Module, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, images: Tensor) -> Any:
        return self.how(self.inner(images))


class Outputs(NamedTuple):
    """Returned as by torchvision's GoogLeNet in training mode, with the logits not first."""

    auxiliary: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    "how",
    [
        lambda z: (z, None),
        lambda z: {"logits": z, "loss": None},
        lambda z: OrderedDict(hidden=z.sum(), logits=z),
        lambda z: SimpleNamespace(logits=z),
        lambda z: Outputs(None, z),
    ],
    ids=["tuple", "dict", "mapping", "object", "named tuple"],
)
def test_logits_inside_of_what_a_model_returns(how: Callable[[Tensor], Any]) -> None:
    model, batch = Affine(), images()
    measured = margins(Returning(model, how), batch)
    assert torch.equal(measured.distance, margins(model, batch).distance)


@pytest.mark.parametrize("how", [lambda z: [z, z], lambda z: {"scores": z}, lambda z: z.detach().numpy(), lambda z: ()])
def test_outputs_without_logits_are_refused(how: Callable[[Tensor], Any]) -> None:
    with pytest.raises(InputError, match="expected a model output of shape") as caught:
        margins(Returning(Affine(), how), images())
    assert ONE_LINE.fullmatch(str(caught.value))


@pytest.mark.parametrize("flat", [False, True])
def test_a_single_logit_is_read_as_that_of_a_binary_classifier(flat: bool) -> None:
    single, batch = Affine(1), images()
    model = Returning(single, lambda z: z[:, 0] if flat else z)
    shape = r"\(6,\)" if flat else r"\(6, 1\)"
    with pytest.raises(
        InputError, match=rf"got one logit per image, {shape}; read it .* with binary=True \(--binary\)"
    ):
        margins(model, batch)
    zero = torch.zeros_like
    weight, bias = single.linear.weight, single.linear.bias
    exact = affine_margins(torch.cat([zero(weight), weight]), torch.cat([zero(bias), bias]), batch, "l2", domain="box")
    for text in ESTIMATORS:
        measured = margins(model, batch, text, binary=True)
        assert (measured.distance / exact - 1).abs().max() < 1e-3
    assert torch.equal(measured.prediction, (single(batch)[:, 0] > 0).long())
    if not flat:
        bounds = Crown().certify(Logits(model.inner, binary=True), batch, "l2", domain="box", upper=exact.cpu())
        assert (bounds.lower > 0.9 * exact).all()
    polished = margins(single, batch, "deepfool:refine=polish", binary=True)
    assert (polished.distance / exact - 1).abs().max() < 1e-3


def test_a_logit_per_class_is_no_binary_classifier() -> None:
    message = refused(margins, Affine(3), images(), binary=True)
    assert "expected one logit per image with binary, got 18 for 6 images" in message


def test_a_binary_classifier_is_tracked_with_its_own_weights(tmp_path: Path) -> None:
    model = Affine(1)
    probes = {"test": (images(), torch.tensor([0, 1, 0, 1, 0, 1]))}
    for name in ("one", "again"):
        tracker = MarginTracker(tmp_path / "run", probes, ["deepfool"], certifiers=["crown"], binary=True)
        summary = tracker.update(0, model)
        assert (summary["found"] == summary["count"]).all(), name
    assert tracker.folder.read_manifest()["fingerprint"]["binary"] is True
    assert tracker.check(0, model) == weights_checksum(model)
    with pytest.raises(Exception, match="binary None"):
        MarginTracker(tmp_path / "run", probes, ["deepfool"], certifiers=["crown"])
    plain = MarginTracker(tmp_path / "plain", probes, ["deepfool"])
    plain.update(0, Affine(2))
    assert "binary" not in plain.folder.read_manifest()["fingerprint"]


# networks that are not a deterministic function of the image, or have no gradient


def by_torch(self: Affine, images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn_like(images)


def by_dropout(self: Affine, images: Tensor) -> Tensor:
    return nn.functional.dropout(images, 0.3, training=True)


def by_numpy(self: Affine, images: Tensor) -> Tensor:
    return images + 0.1 * np.random.standard_normal()  # noqa: NPY002


def by_random(self: Affine, images: Tensor) -> Tensor:
    return images + 0.1 * random.random()


def by_own_generator(self: Affine, images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=OWN)


def by_counter(self: Affine, images: Tensor) -> Tensor:
    SEEN.append(len(images))
    return images * (1 + 0.1 * len(SEEN))


OWN, SEEN = torch.Generator().manual_seed(0), list[int]()
RANDOM = (by_torch, by_dropout, by_numpy, by_random, by_own_generator, by_counter)
DIFFERENT = (
    r"expected the same logits of the same images, got others in a second pass \(by up to [\d.]+, of [\d.]+\); measure "
    r"its average over N draws with expect_over=N \(--expect-over N\), or leave out what draws at random"
)


def twisted(twist: Callable[[Affine, Tensor], Tensor]) -> Affine:
    model: Affine = type("Twisted", (Affine,), {"twist": twist})()
    return model


@pytest.mark.parametrize("twist", RANDOM)
def test_a_stochastic_network_is_refused(tmp_path: Path, twist: Callable[[Affine, Tensor], Tensor]) -> None:
    model, batch = twisted(twist), images()
    tracker = MarginTracker(tmp_path / "run", {"test": (batch, torch.arange(6) % 4)}, ["deepfool"])
    for message in (
        refused(margins, model, batch),
        refused(measure_margins, model, batch),
        refused(tracker.update, 0, model),
    ):
        assert re.fullmatch(DIFFERENT, message)
    assert not list((tmp_path / "run").glob("margins/*/*"))


def test_models_with_their_own_generators_cannot_be_averaged() -> None:
    for twist in (by_own_generator, by_counter):
        message = refused(margins, twisted(twist), images(), expect_over=4)
        assert "got others in a second pass" in message
        assert message.endswith("draw only from the global generators, which are seeded before every pass")


def centred(self: Affine, images: Tensor) -> Tensor:
    return images - 0.1 * (images.mean(0, keepdim=True) - 0.5)


def rounded(self: Affine, images: Tensor) -> Tensor:
    return (images * 32).round() / 32


def cut_off(self: Affine, images: Tensor) -> Tensor:
    return images.detach()


class Normalising(Affine):
    """Batch norm that stays in training mode, on pixels or on logits."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.norm = early, nn.BatchNorm2d(1) if early else nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        self.norm.train()
        logits: Tensor = super().forward(self.norm(images)) if self.early else self.norm(super().forward(images))
        return logits


TOLD = [
    (lambda: twisted(centred), BatchWarning),
    (lambda: Normalising(True), BatchWarning),
    (lambda: twisted(rounded), GradientWarning),
]


@pytest.mark.parametrize(("make", "kind"), TOLD, ids=["mean", "batch norm", "rounded"])
def test_model_warnings_are_given_and_recorded(
    tmp_path: Path, make: Callable[[], nn.Module], kind: type[ModelWarning]
) -> None:
    model, batch = make(), images()
    with pytest.warns(kind) as caught:
        margins(model, batch, "linear")
    assert len(caught) == 1
    with pytest.warns(kind):
        measure_margins(model, batch, ["linear"], ["l2"])
    tracker = MarginTracker(tmp_path / "run", {"test": (batch, torch.arange(6) % 4)}, ["linear"], ["l2"])
    for epoch in (0, 1):
        with pytest.warns(kind):
            tracker.update(epoch, model)
    assert tracker.folder.read_manifest()["notes"] == [f"epoch 0: {caught[0].message}"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_of_a_single_logit_suffices(place: int) -> None:
    model = Affine(2)
    with torch.no_grad():
        model.linear.weight[1 - place] = 0.0
        model.linear.bias[1 - place] = 0.0
    assert_exact(model, images(2))


def test_logits_without_a_graph_are_reported() -> None:
    with pytest.warns(GradientWarning):
        measured = margins(twisted(cut_off), images(), "linear")
    assert set(measured.status) == {Status.FAILED}


def test_batch_norm_that_takes_no_single_image_is_refused_or_averaged() -> None:
    model, batch = Normalising(False), images()
    message = refused(margins, model, batch)
    assert (
        "expected a model that takes a single image, got ValueError: Expected more than 1 value per channel" in message
    )
    assert message.endswith("or measure its average over N draws with expect_over=N (--expect-over N)")
    measured = margins(Normalising(True), batch, "linear", expect_over=2)
    assert torch.equal(margins(Normalising(True), batch[2:], "linear", expect_over=2).distance, measured.distance[2:])


def test_rounding_is_not_reported() -> None:
    """Logits of 1e4, whose rounding depends on the order of summation in a batch."""

    class Far(Affine):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + 1e4 + 1e-4 * len(images)

    margins(Far(), images(), "linear")


# randomised networks, averaged


class Antithetic(Affine):
    """Noise with antithetic pairs in the batch: the average equals the output without noise."""

    def forward(self, images: Tensor) -> Tensor:
        half = torch.randn(len(images) // 2, 1) * torch.tensor([1.0, -1.0])
        return super().forward(images) + torch.cat([half, -half])[: len(images)]


def test_an_averaged_network_has_the_expected_margin() -> None:
    model, batch = Antithetic(2), images(2)
    for norm in NORMS:
        exact = model.exact(batch, norm)
        for text in ("deepfool", "fmn:steps=20", "linear"):
            measured = margins(model, batch, text, norm, expect_over=6)
            assert (measured.distance / exact > 1 - 1e-4).all(), text
            assert (measured.distance / exact < 1.02).all(), text


def test_every_draw_counts_as_a_pass() -> None:
    one, four = margins(Affine(), images(), "deepfool"), margins(Affine(), images(), "deepfool", expect_over=4)
    assert torch.allclose(four.distance, one.distance, rtol=1e-4)
    assert torch.equal(four.forwards, 4 * one.forwards)
    assert torch.equal(four.backwards, 4 * one.backwards)


@pytest.mark.parametrize("text", ["deepfool:steps=5", "fmn:steps=5", "torchattacks:PGDL2:steps=3"])
def test_an_averaged_networks_margins_depend_on_the_image_alone(text: str) -> None:
    """Bitwise: repeated, and in other batch sizes, orders and divisions, also for an attack with random draws."""
    model, batch, seeds = twisted(by_dropout), images(3), [5, 6, 7]

    def found(rows: list[int], **more: Any) -> Margins:
        picked = [seeds[row] for row in rows]
        return margins(model, batch[rows], text, seeds=picked, noise_retries=0, expect_over=3, checked=True, **more)

    whole = found([0, 1, 2])
    again = found([0, 1, 2], batch_size=1)
    assert torch.equal(again.distance, whole.distance)
    assert torch.equal(again.witness, whole.witness)
    assert torch.equal(found([2, 0, 1]).distance, whole.distance[[2, 0, 1]])
    assert torch.equal(found([1]).distance, whole.distance[1:2])
    # control: each image has its own draws
    twins = torch.cat([batch[:1], batch[:1] + 1e-6])
    apart = margins(model, twins, text, seeds=[5, 5], noise_retries=0, expect_over=3).logit_margin
    assert not torch.allclose(apart[0], apart[1], rtol=1e-3)


def test_an_averaged_network_is_the_same_for_all_estimators_and_norms() -> None:
    table = measure_margins(twisted(by_dropout), images(2), ["linear", "fmn:steps=2"], expect_over=2, noise_retries=0)
    logits = table.pivot_table("logit_margin", "image", ["estimator", "norm"], aggfunc="first")
    assert logits.shape == (2, 4)
    assert (logits.nunique(axis=1) == 1).all()


def test_an_averaged_network_counts_in_the_fingerprint(tmp_path: Path) -> None:
    probes = {"test": (images(), torch.arange(6) % 4)}
    tracker = MarginTracker(tmp_path / "run", probes, ["linear"], ["l2"], expect_over=3)
    summary = tracker.update(0, twisted(by_torch))
    assert tracker.folder.read_manifest()["fingerprint"]["expect_over"] == 3
    expected = measure_margins(twisted(by_torch), images(), ["linear"], ["l2"], expect_over=3)
    assert summary[summary["subset"] == "all"]["avg"].iloc[0] == pytest.approx(expected["distance"].mean())
    with pytest.raises(ConfigError, match="expected no certifiers with --expect-over 3, got 1"):
        MarginTracker(tmp_path / "other", probes, ["linear"], certifiers=["crown"], expect_over=3)
    assert not (tmp_path / "other").exists()
    for wrong in (0, 2.0, True):
        assert "expected expect_over" in refused(margins, Affine(), images(), expect_over=wrong)


# networks that cannot be measured, or only on some images


class Broken(nn.Module):
    """Affine logits, but ``value`` for bright images."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = Affine(), value

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1) > 0.9
        logits: Tensor = self.inner(images)
        return torch.where(bright[:, None], torch.tensor(self.value), logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    batch = images()
    batch[2] = 0.95
    with pytest.raises(InputError, match="expected finite logits, got NaN or inf for 1 of 6 images"):
        margins(Broken(value), batch)
    # a point of this kind on the way is not a witness
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

    with pytest.warns(GradientWarning):
        measured = margins(Constant(), images(), text)
    assert set(measured.status) <= {Status.NOT_FOUND, Status.FAILED}
    assert_statuses(measured)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_outputs_that_are_all_equal_are_ties(text: str) -> None:
    class Equal(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * images.flatten(1)[:, :3]

    with pytest.warns(GradientWarning):
        measured = margins(Equal(), images(), text)
    assert set(measured.status) == {Status.TIED}
    assert_statuses(measured)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_dead_gradients(text: str) -> None:
    class Stepped(Affine):
        def twist(self, images: Tensor) -> Tensor:
            return (images * 4).round() / 4

    with pytest.warns(GradientWarning):
        assert_statuses(margins(Stepped(), images(), text))


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["softmax", "saturated softmax"])
@pytest.mark.parametrize("text", ESTIMATORS)
def test_a_model_that_ends_in_softmax_is_warned_of(text: str, scale: float) -> None:
    class Soft(Affine):
        def forward(self, images: Tensor) -> Tensor:
            return (scale * super().forward(images)).softmax(1)

    with pytest.warns(ProbabilityWarning, match="probabilities, not logits"):
        measured = margins(Soft(), images(), text)
    assert_statuses(measured)
    assert (measured.distance / Soft().exact(images(), "l2") > 1 - 1e-5).all()


@pytest.mark.filterwarnings("error::attacks.checks.ProbabilityWarning")
def test_logits_and_log_probabilities_are_not_warned_of() -> None:
    class Log(Affine):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).log_softmax(1)

    assert_exact(Log(), images())
    assert_exact(Affine(2), images())


# data and models that are refused with a one-line error


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
    batch = images()
    batch[0, 0, 0, 0] = value
    assert "clean the data" in refused(margins, Affine(), batch)


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_labels_outside_the_classes(tmp_path: Path, label: int) -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, label])
    tracker = MarginTracker(tmp_path / "run", {"test": (images(), labels)}, ["deepfool"])
    assert re.search(rf"labels of test in 0\.\.3, got {label}", refused(tracker.update, 0, Affine()))
    assert not list((tmp_path / "run").glob("margins/*/*"))


def test_one_class_is_refused() -> None:
    assert "at least 2 classes" in refused(margins, Affine(1), images())


def test_a_model_is_left_unchanged() -> None:
    model = Dropping().train()
    before = copy.deepcopy(model.state_dict())
    for text in ESTIMATORS:
        margins(model, images(), text)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
