"""The batched DeepFool: Foolbox's margins with fewer passes, refilled batches, and out-of-memory handling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Margins, Status
from attacks.estimators.deepfool import DeepFool
from attacks.estimators.fmn import FMN
from attacks.measure import measure
from attacks.types import NORMS, Domain, EstimatorError, InputError, Norm
from tests import oracles

STOCK = DeepFool(engine="foolbox")


Digits = tuple[nn.Module, Tensor]


@pytest.fixture
def digits(trained_digits: tuple[nn.Module, Tensor, Tensor]) -> Digits:
    return trained_digits[0], trained_digits[1][:48]


def passes(margins: Margins) -> Tensor:
    return margins.forwards + margins.backwards


@pytest.mark.parametrize("domain", ["box", "free"])
@pytest.mark.parametrize("norm", NORMS)
def test_margins_match_foolbox(digits: Digits, norm: Norm, domain: Domain) -> None:
    network, images = digits
    ours = measure(network, images, DeepFool(), norm, domain=domain)
    theirs = measure(network, images, STOCK, norm, domain=domain)
    torch.testing.assert_close(ours.distance, theirs.distance, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.attack_distance, theirs.attack_distance, rtol=1e-4, atol=0)
    assert (ours.target == theirs.target).double().mean() >= 0.95  # two boundaries may be equally close
    # control: other settings give other margins
    other = measure(network, images, DeepFool(overshoot=0.2), norm, domain=domain)
    assert ((other.attack_distance / theirs.attack_distance - 1).abs() > 1e-3).double().mean() >= 0.8


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_charged_for_its_own_steps_only(digits: Digits, norm: Norm) -> None:
    """Foolbox passes the whole batch until its slowest image has changed class, with one forward per class."""
    network, images = digits
    ours, theirs = (measure(network, images, engine, norm) for engine in (DeepFool(), STOCK))
    assert passes(ours).mean() < 0.3 * passes(theirs).mean()
    assert ours.backwards.min() < ours.backwards.max()
    assert (ours.forwards < theirs.forwards).all()


class Turning(nn.Module):
    """Class 1 comes nearer along the first pixel, less and less; class 2's gradient along the second one grows there.

    At the image, 0, class 1 is nearest; one step later class 2 is, whose gradient is ``growth`` times as large then.
    """

    def __init__(self, gap: float, growth: float) -> None:
        super().__init__()
        self.gap, self.growth = gap, growth

    def forward(self, images: Tensor) -> Tensor:
        u, v = images.flatten(1).unbind(1)
        nearer = u - 0.75 * torch.relu(u - 0.3) - 1.0
        turning = v * (1.0 + (self.growth - 1.0) * (4.0 * u - 1.0).clamp(0.0, 1.0)) - self.gap
        return torch.stack([torch.zeros_like(u), nearer, turning], 1)


@pytest.mark.parametrize(
    ("network", "growth", "seen"),
    [
        (Turning(3.0, 3.0), 4.0, True),
        (Turning(3.0, 3.0), 1.0, False),  # control: with fewer reconsidered classes the nearer boundary is missed
        (Turning(30.0, 30.0), 4.0, False),
        (Turning(30.0, 30.0), 1e9, True),
    ],
)
def test_a_class_is_reconsidered_if_its_gradient_may_have_grown(network: nn.Module, growth: float, seen: bool) -> None:
    image = torch.zeros(1, 1, 1, 2)
    ours = measure(network, image, DeepFool(growth=growth), "l2", domain="free")
    theirs = measure(network, image, STOCK, "l2", domain="free")
    assert theirs.target.tolist() == [2]
    assert ours.target.tolist() == [2 if seen else 1]
    assert (ours.distance.item() == pytest.approx(theirs.distance.item(), rel=1e-4)) == seen
    assert ours.distance.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_computed_only_for_relevant_classes(digits: Digits, norm: Norm) -> None:
    network, images = digits
    few, all_of_them = (measure(network, images, DeepFool(growth=growth), norm) for growth in (4.0, 1e9))
    torch.testing.assert_close(few.distance, all_of_them.distance, rtol=1e-5, atol=0)
    # one per class and step, and one at the point where the class has changed
    assert (all_of_them.backwards % 9 == 1).all()
    assert few.backwards.min() >= 9 + 1
    assert few.backwards.mean() < 0.5 * all_of_them.backwards.mean()


def test_batches_are_refilled_with_waiting_images(digits: Digits) -> None:
    """Sizes of the gradient passes: full until few images wait; with two candidates no class is reconsidered."""
    network, images = digits
    widths: list[int] = []
    handle = network.register_forward_pre_hook(
        lambda _, inputs: widths.append(len(inputs[0])) if inputs[0].requires_grad else None
    )
    try:
        measure(network, images, DeepFool(candidates=2), "l2", batch_size=8, checked=True)
    finally:
        handle.remove()
    assert max(widths) == 8
    full = [width == 8 for width in widths]
    assert all(full[: int(0.6 * len(full))])


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_batches_change_rounding_only(digits: Digits, norm: Norm) -> None:
    network, images = digits
    whole = measure(network, images, DeepFool(), norm).distance
    for batch_size in (1, 7):
        parts = measure(network, images, DeepFool(), norm, batch_size=batch_size).distance
        torch.testing.assert_close(parts, whole, rtol=2e-4, atol=0)


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_a_zero_gradient_costs_few_passes() -> None:
    truth = oracles.constant()
    margins = measure(truth.model, truth.images, DeepFool(), "l2", noise_retries=0)
    assert set(margins.status) == {Status.NOT_FOUND}
    stock = measure(truth.model, truth.images, STOCK, "l2", noise_retries=0)
    assert passes(margins).max() < 0.1 * passes(stock).min()


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(EstimatorError, match="expected engine of batched, foolbox, got 'fast'; choose one"):
        DeepFool(engine="fast")


# Memory.


class Narrow(nn.Module):
    """A network on a device with memory for a limited number of images per pass."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"out of memory\nfor {len(images)} images")
        logits: Tensor = self.network(images)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [DeepFool(), FMN(steps=20)], ids=["refilled", "batch by batch"])
def test_out_of_memory_smaller_batches_give_the_same_margins(digits: Digits, estimator: DeepFool | FMN) -> None:
    network, images = digits
    narrow = measure(Narrow(network, 5), images, estimator, "l2", batch_size=32)
    small = measure(network, images, estimator, "l2", batch_size=4)
    torch.testing.assert_close(narrow.distance, small.distance, rtol=2e-4, atol=0)
    assert set(narrow.status) == {Status.FOUND}
    assert narrow.message == small.message


def test_too_little_memory_for_one_image_is_an_error(digits: Digits) -> None:
    network, images = digits
    with pytest.raises(InputError, match="expected memory for a pass of one image, got out of memory for 1 images"):
        measure(Narrow(network, 0), images, DeepFool(), "l2")
