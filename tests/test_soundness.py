"""Certificates hold for the computed function: networks that are easily misread are bounded soundly or refused.

The controls plant wrong readings, which the same checks must detect.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from attacks.certify import ball, certifiers, lower
from attacks.certify.certifiers import IBP, Crown, Exact
from attacks.certify.exact import exact_margins
from attacks.certify.network import intervals, piecewise, tracing
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.measure import measure
from attacks.registry import create
from attacks.types import InputError, UnsoundError
from harness import MarginTracker
from harness.runs import read_run
from tests.random_networks import DRESSINGS, FRONTS, PLACES, TWISTS, Body, Counts, Recipe, draw_recipe, examine, fitting

CPU = torch.device("cpu")


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def pixels(count: int = 8) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def worst(model: nn.Module, certifier: Crown | IBP | Exact, images: Tensor) -> float:
    """The largest ratio of a lower bound to the distance of a witness."""
    upper = measure(model, images, create("cascade"), "l2").distance
    certified = certifier.certify(model, images, "l2", domain="box", upper=torch.full_like(upper, torch.inf))
    return float((certified.lower / upper)[upper.isfinite()].max())


# --- random networks ---

RECIPES = st.builds(
    Recipe,
    front=st.sampled_from(list(FRONTS)),
    twists=st.lists(st.sampled_from(list(TWISTS)), max_size=2).map(tuple),
    dressings=st.lists(
        st.sampled_from([(place, name) for place in PLACES for name in fitting(place)]),
        max_size=2,
        unique_by=lambda dressing: dressing[0],
    ).map(tuple),
    seed=st.integers(0, 2**31 - 1),
)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipe=RECIPES)
def test_random_networks_are_bounded_soundly_or_refused(recipe: Recipe) -> None:
    counts = Counts()
    examine(recipe, counts)
    assert counts.false == []
    assert counts.alarms == 0


@pytest.mark.slow
def test_many_random_networks() -> None:
    counts, draw = Counts(), random.Random(1)
    for _ in range(150):
        examine(draw_recipe(draw), counts)
    assert (counts.false, counts.alarms) == ([], 0)
    assert counts.bounds > counts.networks
    assert counts.refused > counts.networks / 4


@pytest.mark.parametrize("twist", TWISTS)
def test_every_twist_is_bounded_soundly_or_refused(twist: str) -> None:
    """One at a time, so that a refusal of one does not hide another."""
    refused = {"floor", "square", "sigmoid", "product", "mean of the batch"}
    counts = Counts()
    examine(Recipe("flat", (twist,), (), 4), counts, ("crown",))
    assert (counts.false, counts.alarms) == ([], 0)
    assert counts.refused == (twist in refused)


@pytest.mark.slow
@pytest.mark.parametrize("dressing", DRESSINGS)
def test_every_dressing_is_bounded_soundly_or_refused(dressing: str) -> None:
    counts = Counts()
    examine(Recipe("conv", ("relu",), (("second", dressing),), 4), counts, ("crown",))
    assert (counts.false, counts.alarms) == ([], 0)
    assert counts.refused == ("squared" in dressing)


# --- constructs that were misread ---


@pytest.mark.slow
@pytest.mark.parametrize("certifier", [Crown(), IBP(), Exact(seconds=0.5)], ids=lambda one: one.name)
def test_effective_weights_are_used(certifier: Crown | IBP | Exact) -> None:
    """The lower bound was 1.50 (crown) and 3.41 (exact) times the distance of a witness."""
    model = plain()
    parametrizations.weight_norm(model[1])
    assert worst(model, certifier, pixels()) <= 1


def test_hooks_are_read_as_part_of_their_layer() -> None:
    model = plain()
    model[1].register_forward_hook(lambda module, inputs, result: -3 * result)
    model.register_forward_hook(lambda module, inputs, result: result.flip(1))
    read = PiecewiseNetwork(model, (1, 4, 4), CPU)
    with torch.no_grad():
        expected = model.double()(pixels().double())
    torch.testing.assert_close(read.run(pixels().double())[1], expected, rtol=1e-12, atol=1e-12)
    assert worst(model.float(), Crown(), pixels()) <= 1


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda module, inputs, result: result * result, "the operation mul in the layer 1: Linear of two results"),
        (lambda module, inputs, result: result**2, "the operation pow in the layer 1: Linear"),
        (lambda module, inputs, result: result + torch.rand_like(result), "the operation rand_like in the layer 1"),
        (lambda module, inputs, result: result * float(result.sum()), "which makes a number of the image's values"),
    ],
    ids=["squared", "power", "random", "number"],
)
def test_a_hook_that_cannot_be_read_is_refused_with_its_layer(hook: Callable[..., Tensor], words: str) -> None:
    model = plain()
    model[1].register_forward_hook(hook)
    with pytest.raises(InputError) as caught:
        Crown().certify(model, pixels(), "l2", domain="box", upper=torch.ones(8))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_operations_in_place_are_read_as_what_they_change() -> None:
    """A pre-activation block rectifies what is added to it: its bound was up to 19 times too large."""
    net = Body("flat", ("pre-activation block",)).eval()
    read = PiecewiseNetwork(net, (1, 4, 4), CPU)
    wanted = net.double()(pixels().double()).detach()
    torch.testing.assert_close(read.run(pixels().double())[1], wanted, rtol=1e-12, atol=1e-12)
    values = F.relu(net.first(pixels().double().flatten(1)))
    torch.testing.assert_close(net.last(values + net.block[1](values)), wanted, rtol=1e-12, atol=1e-12)


def test_a_replaced_forward_function_is_refused() -> None:
    model = plain()
    model[1].forward = lambda inputs: inputs[:, :8]  # type: ignore[method-assign, assignment]
    with pytest.raises(InputError, match=r"got 1\.forward, a function that would compute .*; define it in a class"):
        Crown().certify(model, pixels(), "l2", domain="box", upper=torch.ones(8))


class Precise(nn.Module):
    """Computes a different function in float64, the precision in which the copy is read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return 2 * logits.flip(1) if logits.dtype == torch.float64 else logits


def test_the_model_is_compared_in_its_own_precision() -> None:
    with pytest.raises(
        InputError, match="computes the same in its own precision as a copy in float64, got logits that"
    ):
        Crown().certify(Precise(), pixels(), "l2", domain="box", upper=torch.ones(8))


# --- rounding ---


def shifted(offset: float, seed: int = 0) -> nn.Sequential:
    model = plain(seed)
    with torch.no_grad():
        model[3].bias += offset
    return model


@pytest.mark.slow
def test_rounding_does_not_count_as_a_contradiction(tmp_path: Path) -> None:
    """Logits near 1e4 have 3 decimal places in float32: bounds in float64 seemed to exceed verified witnesses."""
    near = pixels(24)[9:12]
    probes = {"test": (near, torch.zeros(3, dtype=torch.int64), torch.arange(9, 12))}
    tracker = MarginTracker(tmp_path / "run", probes, ["cascade"], ["l2"], certifiers=["crown", "exact:seconds=0.5"])
    tracker.update(0, shifted(1e4, seed=1))
    rows = read_run(tmp_path / "run").bounds
    assert (rows["lower"] <= rows["upper"]).all()
    assert (rows["lower"] > 0.5 * rows["upper"]).any()


@pytest.mark.parametrize(
    "certifier", [Crown(), pytest.param(Exact(seconds=0.5), marks=pytest.mark.slow)], ids=lambda one: one.name
)
def test_bounds_leave_room_for_rounding(certifier: Crown | Exact) -> None:
    images = pixels()
    upper = torch.full((8,), torch.inf)
    precise = certifier.certify(shifted(0.0).double(), images.double(), "l2", domain="box", upper=upper)
    for offset in (0.0, 1e3):
        certified = certifier.certify(shifted(offset), images, "l2", domain="box", upper=upper)
        # a search that ran out of time gives weak bounds
        kept = precise.solved & certified.solved if certifier.name == "exact" else precise.lower > 0
        assert kept.sum() >= 2
        missing = ((precise.lower - certified.lower) / precise.lower)[kept]
        assert (missing > 0).all()
        # two logits of this size, in steps of float32, in three blocks, and a slope of about 0.3
        assert (missing < 1e-4 * (1 + offset)).all()


def test_half_precision_is_refused() -> None:
    model = plain().to(torch.bfloat16)
    with pytest.raises(InputError, match=r"expected a model in float32 or float64 to prove bounds of, got bfloat16, "):
        Crown().certify(model, pixels().to(torch.bfloat16), "l2", domain="box", upper=torch.ones(8))


# --- controls: planted misreadings must fail the checks ---


def _without_absolute_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_size", lambda argument: argument)


def _views_instead_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every factor is read as 1."""
    scaled = intervals._RULES["mul"]
    recorded = tracing.record

    def record(model: nn.Module, image: Tensor) -> tracing.Recording:
        def halved(one: tracing.Operation) -> tracing.Operation:
            return dataclasses.replace(one, function=lambda first, second: first) if one.name == "mul" else one

        recording = recorded(model, image)
        return dataclasses.replace(recording, operations=tuple(map(halved, recording.operations)))

    assert scaled is not None
    monkeypatch.setattr(piecewise, "record", record)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first = plain(), nn.Parameter(torch.tensor(-4.0))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images * self.first)
        return logits


@pytest.mark.parametrize(
    ("plant", "kind"),
    [(_without_absolute_values, UnsoundError), (_views_instead_of_results, InputError)],
    ids=["interval arithmetic", "an operation"],
)
def test_a_misread_model_is_detected(
    plant: Callable[[pytest.MonkeyPatch], None],
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises(kind):
        IBP().certify(Scaled(), pixels(), "l2", domain="box", upper=torch.full((8,), torch.inf))


def test_without_the_checks_a_misreading_gives_false_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    _views_instead_of_results(monkeypatch)
    monkeypatch.setattr(piecewise, "check_reading", lambda network: None)
    monkeypatch.setattr(certifiers, "rounding_of", lambda network, model, inputs, radii, dtype: torch.zeros_like(radii))
    monkeypatch.setattr(lower, "check_bounds", lambda relaxation: None)
    assert worst(Scaled(), Crown(), pixels()) > 1.2


@pytest.mark.slow
def test_exact_margins_are_those_of_the_computed_function() -> None:
    """Weight normalisation was read as the weights before it: the margin was 0.76 of the truth and more."""
    model = plain()
    plainly = exact_margins(model, pixels(), "l2")
    parametrizations.weight_norm(model[1])
    with torch.no_grad():
        model[1].parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr, operator]
    dressed = exact_margins(model, pixels(), "l2")
    assert dressed.solved.all()
    assert (dressed.margin[:2] / plainly.margin[:2] - 1).abs().max() > 0.1
    baked = plain()
    with torch.no_grad():
        baked[1].weight.mul_(2)
    torch.testing.assert_close(dressed.margin, exact_margins(baked, pixels(), "l2").margin, rtol=1e-6, atol=1e-9)


# --- findings of an adversarial review of the certifiers ---


class Small(nn.Module):
    """A linear layer with a function before and after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.before, self.after = nn.Linear(16, 3), before, after
        self.register_buffer("near", torch.full((1, 4, 4), 0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.inner(self.before(images).flatten(1)))


def overwritten(images: Tensor) -> Tensor:
    """Writes into the image idempotently."""
    images[:, :, 0] += images[:, :, 1]
    images[:, :, 1] = 0
    return images


def through_numpy(images: Tensor) -> Tensor:
    return images + torch.from_numpy(images.detach().numpy() * 0.5).to(images)


def same(values: Tensor) -> Tensor:
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        overwritten,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x * torch.tensor([True, False, True, True]),
        lambda x: x + torch.full((4,), -5),
        lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2).reshape(-1, 1, 4, 4),
        lambda x: x[:, :, [2, 0, 1, 3]],
    ],
    ids=["in place", "memory format", "bool", "integers", "permuted", "indices"],
)
@pytest.mark.parametrize("certifier", [Crown(), Exact(seconds=0.2)], ids=lambda one: one.name)
def test_unusual_operations_are_bounded_soundly(before: Callable[[Tensor], Tensor], certifier: Crown | Exact) -> None:
    ratio = worst(Small(before, same), certifier, pixels(4))
    assert 0.5 < ratio <= 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), same, "in place on a constant"),
        (lambda x: F.avg_pool2d(x, 1, divisor_override=-2), same, "the operation avg_pool2d in the forward pass"),
        (same, lambda z: torch.clamp(z, min=torch.zeros_like(z)), "the operation clamp in the forward pass"),
        (same, lambda z: F.max_pool2d(z[:, None, None].squeeze(1), 1), "of an input that is not (1, C, H, W)"),
        (same, lambda z: z.sum(1, dtype=torch.int64), "the operation sum in the forward pass"),
    ],
    ids=["circular", "negative divisor", "tensor clamp", "pool of three axes", "integer sum"],
)
def test_unusual_operations_are_refused_in_one_line(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        PiecewiseNetwork(Small(before, after), (1, 4, 4), CPU)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_computes_in_numpy_is_refused() -> None:
    """NumPy sees arbitrary values of the recorded tensor: either the recordings or the logits differ."""
    refused = "outside of recorded operations|from what was read|cannot be recorded"
    with pytest.raises(InputError, match=refused):
        PiecewiseNetwork(Small(through_numpy, same), (1, 4, 4), CPU)


def test_logits_that_are_cast_are_read() -> None:
    assert 0.5 < worst(Small(same, lambda z: z.float()), Crown(), pixels(4)) <= 1


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3])
def test_bounds_do_not_depend_on_the_scale_of_logits(scale: float) -> None:
    upper = torch.full((4,), torch.inf)
    plainly = Crown().certify(plain(), pixels(4), "l2", domain="box", upper=upper)
    scaled = plain()
    with torch.no_grad():
        scaled[3].weight.mul_(scale)
        scaled[3].bias.mul_(scale)
    certified = Crown().certify(scaled, pixels(4), "l2", domain="box", upper=upper)
    torch.testing.assert_close(certified.lower, plainly.lower, rtol=1e-3, atol=0)


def test_a_zero_row_has_a_finite_bound_at_a_large_radius() -> None:
    """Beyond a radius of 4 in the box, the gain of a row of zeros was NaN: a max-pool after a ReLU has such rows."""
    rows, room = torch.zeros(1, 1, 16).double(), torch.ones(1, 16).double()
    assert ball.gain(rows, room, room, torch.tensor([9.0]).double(), "l2", True).item() == 0


def test_a_network_of_zeros_is_a_tie() -> None:
    model = plain()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert Crown().certify(model, pixels(2), "l2", domain="box", upper=torch.ones(2)).lower.tolist() == [0, 0]


def test_bounds_do_not_depend_on_the_other_images() -> None:
    model, images, upper = plain(), pixels(6), torch.ones(6)
    together = Crown().certify(model, images, "l2", domain="box", upper=upper).lower
    alone = [Crown().certify(model, one[None], "l2", domain="box", upper=upper[:1]).lower for one in images]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
