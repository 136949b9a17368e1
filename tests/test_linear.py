"""The linearised margin and its witnesses: exact where the network is affine, an upper bound elsewhere."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Status
from attacks.estimators.linear import Linear
from attacks.geometry import dual_norm, plane_crossing
from attacks.measure import measure
from attacks.types import NORMS, Norm
from tests import oracles
from tests.oracles import Affine, Oracle

Digits = tuple[nn.Module, Tensor, Tensor]
FREE = (-math.inf, math.inf)


def ratios(truth: Oracle, norm: Norm, estimator: Linear) -> Tensor:
    """Verified distance / exact margin, inf where none was found."""
    margins = measure(truth.model, truth.images, estimator, norm, domain=truth.domain, noise_retries=0)
    return margins.distance / truth.exact[norm]


class Bent(nn.Module):
    """Two classes whose logit gap is 1 at grey and falls along ``normal`` with slope 1 for 0.5, then with ``slope``."""

    def __init__(self, normal: Tensor, slope: float) -> None:
        super().__init__()
        self.normal, self.slope = nn.Parameter(normal / normal.norm()), slope

    def forward(self, images: Tensor) -> Tensor:
        s = (images - 0.5).flatten(1) @ self.normal
        lead = 1.0 - s + (1.0 - self.slope) * torch.relu(s - 0.5)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


class Times(nn.Module):
    """Scaled logits."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


# The plane.


def crossing(normal: list[float], point: list[float], gap: float, norm: Norm) -> tuple[Tensor, float, float]:
    w, x = torch.tensor([normal], dtype=torch.float64), torch.tensor([point], dtype=torch.float64)
    direction, length, short = plane_crossing(x, w, torch.tensor([gap]), norm, (0.0, 1.0))
    return (x + length * direction).clamp(0.0, 1.0)[0], float(length), float(short)


def test_steps_end_on_the_plane() -> None:
    end, length, short = crossing([3.0, 4.0], [0.25, 0.125], 2.5, "l2")
    torch.testing.assert_close(end, torch.tensor([0.55, 0.525], dtype=torch.float64))
    assert length == pytest.approx(0.5)
    assert short == 0.0


def test_free_pixels_compensate_for_pixels_at_their_bounds() -> None:
    end, _, short = crossing([3.0, 4.0], [0.0, 0.875], 1.5, "l2")
    torch.testing.assert_close(end, torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    assert short == 0.0
    # control: the plain step, clipped, falls short of the plane
    plain = (torch.tensor([0.0, 0.875]) + 1.5 / 25 * torch.tensor([3.0, 4.0])).clamp(0.0, 1.0)
    assert float(plain @ torch.tensor([3.0, 4.0])) < 0.875 * 4 + 1.5 - 0.4


@pytest.mark.parametrize("norm", NORMS)
def test_an_unreachable_plane_gives_the_corner_and_the_remaining_gap(norm: Norm) -> None:
    end, length, short = crossing([3.0, -4.0], [0.5, 0.5], 7.0, norm)
    assert end.tolist() == [1.0, 0.0]
    assert short == pytest.approx(0.5)
    assert math.isfinite(length)


@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), FREE], ids=["box", "free"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_normal_gives_no_move(norm: Norm, bounds: tuple[float, float], value: float) -> None:
    """And ends, next to a nonzero one."""
    normal = torch.tensor([[value, value], [1.0, 0.0]])
    _, length, short = plane_crossing(torch.full((2, 2), 0.5), normal, torch.full((2,), 0.25), norm, bounds)
    assert length.tolist() == [0.0, 0.25]
    assert not short[0] < 1
    assert short[1] == 0


# The estimator.


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_exact_on_affine_models(norm: Norm, classes: int) -> None:
    for truth in (
        oracles.affine(classes),
        oracles.boxed(classes),
        oracles.boxed(classes, domain="free"),
        oracles.affine(classes, scale=1000.0),
    ):
        assert ratios(truth, norm, Linear()).median() < 1.0002, truth.name
        # some margins are a few units in the last place of float32
        assert ratios(truth.to(torch.float64), norm, Linear()).max() < 1.001, truth.name


@pytest.mark.parametrize("norm", NORMS)
def test_the_runner_up_class_alone_is_not_exact(norm: Norm) -> None:
    ratio = ratios(oracles.confident(10), norm, Linear(candidates=2))
    assert ratio.isfinite().all()
    assert ratio.quantile(0.9) > 1.1
    assert ratios(oracles.confident(10), norm, Linear()).quantile(0.9) < 1.0002


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_length_matches_the_paper(norm: Norm, trained_digits: Digits) -> None:
    """The attack's witness lies at 1.001 times the smallest distance of eq. 3, or a doubling of that."""
    model, images, _ = trained_digits
    model, images = copy.deepcopy(model).double(), images[:32].double()
    margins = measure(model, images, Linear(), norm, domain="free", noise_retries=0)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(images)
    own, logits, rows = margins.prediction, model(images).detach(), torch.arange(32)
    gaps = logits[rows, own, None] - logits
    slopes = torch.stack([dual_norm(jacobian[rows, own] - jacobian[:, k], norm) for k in range(10)], dim=1)
    smallest = (gaps / slopes).scatter(1, own[:, None], math.inf).amin(1)
    factor = margins.attack_distance / smallest
    doublings = (factor / 1.001).log2()
    torch.testing.assert_close(doublings, doublings.round(), rtol=0, atol=1e-9)
    assert 0.3 < (doublings.round() == 0).double().mean() < 1


# two classes whose outputs sum to 1 by chance
@pytest.mark.filterwarnings("ignore::attacks.checks.ProbabilityWarning")
def test_the_length_is_doubled_until_the_class_changes() -> None:
    """The boundary lies at 5.5 times the linearised margin: three doublings, four checks."""
    draw = torch.randn(64, generator=oracles.generator(3))
    model, images = Bent(draw, slope=0.1), torch.full((2, 1, 8, 8), 0.5)
    margins = measure(model, images, Linear(), "l2", domain="free", noise_retries=0)
    torch.testing.assert_close(margins.distance, torch.full((2,), 5.5).double(), rtol=2e-4, atol=0)
    torch.testing.assert_close(margins.attack_distance, torch.full((2,), 8 * 1.001).double(), rtol=1e-5, atol=0)
    few = measure(model, images, Linear(doublings=2), "l2", domain="free", noise_retries=0)
    assert few.status == (Status.NOT_FOUND,) * 2
    three = measure(model, images, Linear(doublings=3), "l2", domain="free", noise_retries=0)
    torch.testing.assert_close(three.distance, margins.distance)
    assert three.forwards.tolist() == [value - 1 for value in margins.forwards.tolist()]


# two classes whose outputs sum to 1 by chance
@pytest.mark.filterwarnings("ignore::attacks.checks.ProbabilityWarning")
def test_the_linearised_margin_is_neither_an_upper_nor_a_lower_bound() -> None:
    """Too small where the slope falls, too large where it grows; the verified distance is never too small."""
    draw, images = torch.randn(64, generator=oracles.generator(3)), torch.full((1, 1, 8, 8), 0.5)
    for slope, true in ((0.1, 5.5), (5.0, 0.6)):
        margins = measure(Bent(draw, slope), images, Linear(), "l2", domain="free", noise_retries=0)
        assert true <= margins.distance.item() < true * 1.0002


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_cost_is_a_forward_a_backward_per_class_and_a_check(classes: int, norm: Norm) -> None:
    """A forward, a backward for each other class, and one check if the first length suffices."""
    truth = oracles.affine(classes)
    nothing = measure(truth.model, truth.images, Linear(doublings=0), norm, noise_retries=0)
    margins = measure(truth.model, truth.images, Linear(), norm, noise_retries=0)
    assert (margins.backwards == classes - 1).all()
    assert (margins.forwards - nothing.forwards == 1).all()
    fewer = measure(truth.model, truth.images, Linear(candidates=2), norm, noise_retries=0)
    assert (fewer.backwards == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_batches_and_scale_on_a_trained_network(norm: Norm, trained_digits: Digits) -> None:
    model, images, _ = trained_digits
    images = images[:24]
    whole = measure(model, images, Linear(), norm)
    alone = measure(model, images, Linear(), norm, batch_size=1)
    torch.testing.assert_close(alone.distance, whole.distance, rtol=2e-4, atol=0)
    assert torch.equal(alone.forwards, whole.forwards)
    assert torch.equal(alone.backwards, whole.backwards)
    loud = measure(nn.Sequential(model, Times(1000.0)), images, Linear(), norm)
    torch.testing.assert_close(loud.distance, whole.distance, rtol=2e-4, atol=0)


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_images_with_zero_gradients_are_not_found(norm: Norm) -> None:
    for truth in (oracles.constant(), oracles.flat(count=8)):
        margins = measure(truth.model, truth.images, Linear(), norm, noise_retries=0)
        assert set(margins.status) == {Status.NOT_FOUND}
        assert margins.distance.isinf().all()
        assert margins.witness.isfinite().all()
        # no checks without a direction: two passes of verification and one of the estimator
        assert (margins.forwards == 3).all()


def test_a_row_with_zero_gradient_does_not_affect_the_others() -> None:
    model, images = oracles.flat(count=4).model, oracles.flat(count=4).images.clone()
    assert isinstance(model, oracles.FlatAround)
    normal = model.normal.detach()
    rise = (model.edge + model.depth / 2 - images.flatten(1) @ normal) / normal.square().sum()
    images[::2] += (rise[:, None] * normal).view_as(images)[::2]  # up the slope, half a depth from the boundary
    margins = measure(model, images, Linear(), "l2", domain="free", noise_retries=0)
    assert margins.status == (Status.FOUND, Status.NOT_FOUND) * 2
    half = torch.full((2,), model.depth / 2 / float(normal.norm()), dtype=torch.float64)
    torch.testing.assert_close(margins.distance[::2], half, rtol=3e-4, atol=1e-6)


def test_a_class_with_zero_gradient_is_skipped() -> None:
    """The class with the smallest gap has zero gradient; the other class is used."""
    weight = torch.zeros(3, 64)
    weight[2] = torch.randn(64, generator=oracles.generator(5))
    model, images = Affine(weight, torch.tensor([1.0, 0.9, 0.0])), torch.full((2, 1, 8, 8), 0.5)
    margins = measure(model, images, Linear(), "l2", noise_retries=0)
    assert margins.target.tolist() == [2, 2]
    torch.testing.assert_close(margins.distance, (1 / weight[2].norm()).double().expand(2), rtol=2e-4, atol=0)
