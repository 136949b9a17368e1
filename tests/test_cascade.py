"""The cascade: its budget holds for every image, its parts reduce distances, and starts are used."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Margins, Status
from attacks.estimators.cascade import Cascade
from attacks.estimators.fmn import FMN
from attacks.geometry import row_norm
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.registry import create
from attacks.search.descent import Walks, advance, move, set_out
from attacks.search.linearised import class_slopes, left_class
from attacks.types import NORMS, EstimatorError, Norm
from tests import oracles

COUNT = 32


@cache
def digits() -> tuple[nn.Module, Tensor]:
    """A small network trained on real digits, and held-out images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for batch in torch.randperm(1500).split(50) * 15:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimiser.step()
    network.eval().requires_grad_(False)
    probe = images[1500 : 1500 + COUNT]
    assert (network(probe).argmax(1) == labels[1500 : 1500 + COUNT]).double().mean() > 0.9
    return network, probe


@cache
def on_digits(text: str, norm: Norm) -> Margins:
    network, images = digits()
    return measure(network, images, create(text), norm)


def passes(margins: Margins) -> Tensor:
    return margins.forwards + margins.backwards


@cache
def envelope(norm: Norm) -> Tensor:
    """The smallest distances that any estimator of this module finds, including a cascade of five times the budget."""
    texts = ["cascade", "cascade:budget=1500,targets=6", "apgd", "fmn:steps=300", "deepfool"]
    return torch.stack([on_digits(text, norm).distance for text in texts]).amin(0)


def excess(text: str, norm: Norm) -> float:
    """Mean distance over the envelope, less one."""
    return float((on_digits(text, norm).distance / envelope(norm)).mean()) - 1


# Quality on a trained network.


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_margins_are_near_the_envelope_on_a_trained_network(norm: Norm) -> None:
    ratio = on_digits("cascade", norm).distance / envelope(norm)
    assert ratio.mean() <= 1.005
    assert (ratio <= 1.01).double().mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", ["deepfool", "fmn", pytest.param("apgd", marks=pytest.mark.slow)])
def test_smaller_margins_than_others_at_equal_cost(text: str, norm: Norm) -> None:
    assert excess("cascade", norm) < excess(text, norm)
    if text == "apgd":
        assert 2 * passes(on_digits("cascade", norm)).mean() < passes(on_digits(text, norm)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("text", "least"), [("cascade:targets=1", 0.003), ("cascade:budget=60", 0.01)])
def test_control_without_targets_or_without_steps_it_is_worse(text: str, least: float, norm: Norm) -> None:
    """One class only; and hardly more passes than those of DeepFool and of verification."""
    assert excess(text, norm) >= excess("cascade", norm) + least


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_larger_budget_never_increases_margins(norm: Norm) -> None:
    steps = [excess(f"cascade:budget={budget}", norm) for budget in (80, 150, 600)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_one_walk_matches_fmn_from_the_same_start(norm: Norm) -> None:
    """From DeepFool's witness, with the same number of passes."""
    network, images = digits()
    start = on_digits("deepfool", norm).witness
    theirs = measure(network, images, FMN(steps=100), norm, start=start)
    ours = measure(network, images, Cascade(targets=1, budget=225), norm, start=start)
    ratio = ours.distance / theirs.distance
    assert ratio.median() <= 1.003
    assert ratio.mean() <= 1.003
    assert passes(ours).mean() <= 1.05 * passes(theirs).mean()


# The budget.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [60, pytest.param(100, marks=pytest.mark.slow), 300])
def test_every_image_stays_within_the_budget(budget: int, norm: Norm) -> None:
    margins = on_digits(f"cascade:budget={budget}", norm)
    assert margins.distance.isfinite().double().mean() >= 0.9
    assert passes(margins).mean() <= budget
    assert passes(margins).max() <= 2 * budget
    assert passes(margins).mean() >= 0.6 * budget


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [60, 300])
@pytest.mark.parametrize("retries", [0, 6, 14])
def test_the_budget_holds_where_nothing_is_found(retries: int, budget: int, norm: Norm) -> None:
    class Walled(nn.Module):
        """Class 0 everywhere, though the gradient points to another class."""

        def forward(self, images: Tensor) -> Tensor:
            rise = torch.sin(4 * images.flatten(1).sum(1, keepdim=True))
            return torch.cat([2.0 + 0 * rise, rise, -rise], 1)

    margins = measure(Walled(), oracles.inked_images(8), Cascade(budget=budget), norm, noise_retries=retries)
    assert set(margins.status) == {Status.NOT_FOUND}
    assert not margins.distance.isnan().any()
    assert passes(margins).max() <= budget
    assert passes(margins).min() > 0.3 * budget


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_a_zero_gradient_costs_two_checks_and_no_walk() -> None:
    truth = oracles.constant()
    margins = measure(truth.model, truth.images, Cascade(), "l2", noise_retries=0)
    assert set(margins.status) == {Status.NOT_FOUND}
    assert (
        passes(margins).tolist() == [1 + 1 + 2 + 1 + 1] * 8
    )  # clean pass, forward, two other classes, the negative, verification


class Cliff(nn.Module):
    """Two classes by the mean of the first 8 pixels; the logits are NaN where the last pixel is above 0.62."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        bright, nothing = flat[:, :8].mean(1), 0 * (0.62 - flat[:, 15]).log()
        return torch.stack([bright + nothing, 0.9 - bright + nothing], 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [150, 300, pytest.param(1000, marks=pytest.mark.slow)])
def test_points_without_finite_logits_replace_no_witness(budget: int, norm: Norm) -> None:
    images = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 0, 3, 3] = 0.55
    margins = measure(Cliff(), images, Cascade(budget=budget), norm, noise_retries=0)
    assert set(margins.status) == {Status.FOUND}
    exact = (images.flatten(1)[:, :8].mean(1) - 0.45).abs().double() * (8**0.5 if norm == "l2" else 1.0)
    assert (margins.distance / exact).min() >= 1 - 1e-6
    assert (margins.distance / exact).median() <= 1.01


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"budget": 1000, "warm": 250}, 60, 250),
        ({"budget": 100, "warm": 400}, 60, 400),
        ({"budget": 100, "most": 150, "warm": 150}, 60, 150),
    ],
    ids=str,
)
def test_a_warm_start_is_limited_by_warm(settings: dict[str, int], least: int, most: int, norm: Norm) -> None:
    network, images = digits()
    start = on_digits("deepfool", norm)
    margins = measure(network, images, Cascade(**settings), norm, start=start.witness, noise_retries=0)
    assert set(margins.status) == {Status.FOUND}
    assert passes(margins).max() <= most
    assert passes(margins).median() >= least
    assert (margins.distance <= start.distance * (1 + 1e-3)).all()


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_noise_retries_spend_what_a_large_budget_has_left(norm: Norm) -> None:
    class Walled(nn.Module):
        """Class 0 everywhere, though the gradient points to another class."""

        def forward(self, images: Tensor) -> Tensor:
            rise = torch.sin(4 * images.flatten(1).sum(1, keepdim=True))
            return torch.cat([2.0 + 0 * rise, rise, -rise], 1)

    once, thrice = (
        measure(Walled(), oracles.inked_images(4), Cascade(budget=1000), norm, noise_retries=n) for n in (0, 3)
    )
    assert passes(once).max() <= passes(thrice).min()
    assert 0.85 * 1000 <= passes(thrice).min() <= passes(thrice).max() <= 1000


@pytest.mark.parametrize(
    ("norm", "draws"),
    [
        ("linf", 5),
        *(pytest.param(norm, draws, marks=pytest.mark.slow) for norm, draws in (("linf", 2), ("l2", 2), ("l2", 5))),
    ],
)
def test_an_average_over_draws_counts_every_draw(draws: int, norm: Norm) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network: nn.Module = digits()[0]

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images + 0.1 * torch.rand_like(images))  # type: ignore[no-any-return]

    margins = measure(Noisy(), digits()[1][:6], Cascade(), norm, noise_retries=0, expect_over=draws)
    assert set(margins.status) == {Status.FOUND}
    assert passes(margins).max() <= 600 + 30 * (draws - 1)


def test_walks_that_are_optimal_stop() -> None:
    truth = oracles.affine(2)
    margins = measure(truth.model, truth.images, Cascade(), "l2")
    assert (margins.distance / truth.exact["l2"]).max() <= 1.001
    assert passes(margins).mean() < 100


def test_settings_are_checked() -> None:
    with pytest.raises(EstimatorError, match="expected budget to be an integer of at least 60, got 59"):
        Cascade(budget=59)
    with pytest.raises(EstimatorError, match="expected warm to be 0 or at least 60, got 59"):
        Cascade(warm=59)
    for most, warm in ((299, 0), (310, 320)):
        with pytest.raises(EstimatorError, match=f"expected most to be 0 or at least the budget of {max(300, warm)}"):
            Cascade(most=most, warm=warm)


# Many classes, starts, batches.


@pytest.mark.parametrize("norm", NORMS)
def test_a_thousand_classes(norm: Norm) -> None:
    truth = oracles.affine(1000, count=16)
    margins = measure(truth.model, truth.images, Cascade(), norm)
    assert (margins.distance / truth.exact[norm]).median() <= 1.05
    assert passes(margins).max() <= 300


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_start_is_used_and_can_only_help(norm: Norm) -> None:
    """With one target and few passes, the witnesses of a long run are nearer than the estimator's own."""
    network, images = digits()
    known = on_digits("cascade:budget=1500,targets=6", norm)
    cold = measure(network, images, Cascade(budget=70, targets=1), norm)
    warm = measure(network, images, Cascade(budget=70, targets=1), norm, start=known.witness)
    assert (cold.distance / known.distance).mean() >= 1.01
    assert (warm.distance / known.distance).max() <= 1 + 1e-3
    assert passes(warm).max() <= 70


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_warm_budget_applies_only_to_images_with_a_start(norm: Norm) -> None:
    network, images = digits()
    known = on_digits("cascade:budget=1500,targets=6", norm)
    start = known.witness.clone()
    start[::2] = images[::2]  # no start
    margins = measure(network, images, Cascade(warm=100), norm, start=start)
    assert passes(margins)[1::2].max() <= 100 < passes(margins)[::2].median()
    assert (margins.distance / known.distance)[1::2].max() <= 1 + 1e-3
    cold = measure(network, images, Cascade(), norm)
    torch.testing.assert_close(margins.distance[::2], cold.distance[::2], rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, 0.0, None], ids=["nan", "black", "the image itself"])
def test_a_useless_start_does_not_increase_margins(value: float | None) -> None:
    network, images = digits()
    start = images if value is None else torch.full_like(images, value)
    margins = measure(network, images, Cascade(), "l2", start=start)
    assert set(margins.status) == {Status.FOUND}
    assert (margins.distance / envelope("l2")).mean() <= 1.005


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_batches_and_order_change_rounding_only(norm: Norm) -> None:
    network, images = digits()
    network, images, seeds = network.double(), images.double(), torch.arange(COUNT)
    try:
        whole = measure(network, images, Cascade(), norm, seeds=seeds).distance
        parts = measure(network, images, Cascade(), norm, seeds=seeds, batch_size=11).distance
        back = measure(network, images.flip(0), Cascade(), norm, seeds=seeds.flip(0)).distance.flip(0)
    finally:
        network.float()
    torch.testing.assert_close(parts, whole, rtol=2e-4, atol=0)
    torch.testing.assert_close(back, whole, rtol=2e-4, atol=0)


# The parts.


def test_slopes_are_the_differences_of_the_logits() -> None:
    truth = oracles.affine(5)
    images, model = truth.images[:3], truth.model
    with frozen_view(model, (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(3)
        labels = view(images).argmax(1)
        view.start_chunk(3)
        gaps, gradients, classes = class_slopes(view, images, labels, 4)
        assert (view.forwards.tolist(), view.backwards.tolist()) == ([1.0] * 3, [4.0] * 3)
    weight = model.weight.float()
    torch.testing.assert_close(gradients.flatten(2), weight[labels][:, None] - weight[classes])
    logits = model(images).detach()
    torch.testing.assert_close(gaps, logits.gather(1, labels[:, None]) - logits.gather(1, classes))
    assert (gaps.diff(dim=1) >= 0).all()
    assert (gaps > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_two_walks_of_one_image_count_twice_and_stay_in_their_balls(norm: Norm) -> None:
    truth = oracles.boxed(4)
    images = truth.images[:3]
    with frozen_view(truth.model, (0.0, 1.0), "box", images.device) as view, torch.enable_grad():
        view.start_chunk(3)
        with torch.no_grad():
            labels = truth.model(images).argmax(1)
        owner = torch.tensor([0, 1, 1])
        walks = set_out(images, owner, (labels[owner] + torch.tensor([1, 1, 2])) % 4)
        pace = torch.ones(3, dtype=torch.float64)
        for _ in range(12):
            advance(view, images, labels, walks, norm, stride=pace, shrink=0.1 * pace, momentum=0.5)
            assert (walks.point >= 0).all()
            assert (walks.point <= 1).all()
            away = row_norm(walks.point - images[owner], norm)
            assert (away <= walks.radius * (1 + 2e-3) + 1e-6).all()
        assert view.forwards.tolist() == view.backwards.tolist() == [12.0, 24.0, 0.0]
    found = walks.distance.isfinite()
    assert found.any()
    assert (truth.model(walks.witness[found]).argmax(1) != labels[owner[found]]).all()


def test_no_class_is_left_without_finite_logits() -> None:
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, math.nan], [math.nan, 2.0], [1.0, math.inf]])
    assert left_class(logits, torch.zeros(5, dtype=torch.int64)).tolist() == [True, False, False, False, False]


def test_a_zero_gradient_ends_a_walk() -> None:
    images = oracles.grey_images(2)
    walks = set_out(images, torch.tensor([0, 1]), torch.tensor([1, 1]))
    with frozen_view(oracles.constant().model, (0.0, 1.0), "box", images.device) as view:
        still = torch.zeros(2, dtype=torch.float64)
        gradient = torch.stack([torch.zeros_like(images[0]), torch.full_like(images[0], math.nan)])
        move(walks, images, view, torch.ones(2), gradient, "l2", outside=still.bool(), stride=still + 1, shrink=still,
             momentum=0.0)  # fmt: skip
    assert walks.done.all()
    assert torch.equal(walks.point, images)
    assert not walks.drift.isnan().any()


def test_walks_are_selected_and_joined_row_by_row() -> None:
    images = oracles.grey_images(3)
    walks = set_out(images, torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7]))
    both = walks.select(torch.tensor([2])).join(walks.select(torch.tensor([True, False, False])))
    assert isinstance(both, Walks)
    assert (both.owner.tolist(), both.target.tolist()) == ([2, 0], [7, 5])
    assert torch.equal(both.point, images[[2, 0]])
