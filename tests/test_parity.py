"""Our adapters against the stock attacks of Foolbox and torchattacks: the same images give the same points.

Tests document defects of the stock attacks, to detect when they are fixed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks.adapters.foolbox import foolbox, library, quiet
from attacks.adapters.torchattacks import LIBRARY_NORM
from attacks.estimators.apgd import ascend, dlr_loss, targeted_dlr_loss
from attacks.estimators.pgd import PGD
from attacks.geometry import ball_point, row_norm
from attacks.isolation import Classifier, freezing, frozen_view
from attacks.measure import measure
from attacks.registry import create
from attacks.search.scale_free import ScaleFree
from attacks.types import NORMS, Norm
from tests import oracles

COUNT = 32
RADIUS: dict[Norm, float] = {"l2": 0.25, "linf": 0.0625}  # float32 holds both exactly
SEEDS = torch.zeros(COUNT, dtype=torch.int64)


@pytest.fixture(scope="module")
def digits(trained_digits: tuple[nn.Module, Tensor, Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network, held-out images, and its predictions."""
    network, images, labels = trained_digits
    probe = images[:COUNT]
    prediction = network(probe).argmax(1)
    assert (prediction == labels[:COUNT]).double().mean() > 0.8
    return network, probe, prediction


@contextmanager
def view_of(model: nn.Module, images: Tensor) -> Iterator[Classifier]:
    """The view that `measure` passes to estimators."""
    with frozen_view(model, (0.0, 1.0), "box", images.device) as view:
        view.classes = 10
        view.start_chunk(len(images))
        yield view


class Recorder(nn.Module):
    """Records every batch that passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        logits: Tensor = self.model(images)
        return logits


@pytest.fixture
def plain_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables gradients by folding, which differ by rounding."""
    monkeypatch.setattr(freezing, "quicken", lambda model: None)


def stock_foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """As a user of Foolbox would call it."""
    with quiet():
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        raw, _, _ = attack(wrapped, images, labels, epsilons=None)
    result: Tensor = raw
    return result


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("plain_gradients")
def test_deepfool_matches_stock_foolbox(norm: Norm, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    stock = library.L2DeepFoolAttack() if norm == "l2" else library.LinfDeepFoolAttack()
    expected = stock_foolbox(stock, model, images, labels)
    with view_of(model, images) as view:
        got = create("deepfool:engine=foolbox").perturb(view, images, labels, norm, seeds=SEEDS)
    assert torch.equal(got, expected)
    assert (row_norm(expected - images, norm) > 0).all()
    # control: the result depends on the settings, so that the comparison is not trivial
    with view_of(model, images) as view:
        other = create("deepfool:engine=foolbox,overshoot=0.03").perturb(view, images, labels, norm, seeds=SEEDS)
    assert not torch.allclose(other, expected, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("plain_gradients")
def test_measured_deepfool_starts_from_stock_witnesses(norm: Norm, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    stock = library.L2DeepFoolAttack() if norm == "l2" else library.LinfDeepFoolAttack()
    expected = stock_foolbox(stock, model, images, labels)
    margins = measure(model, images, create("deepfool:engine=foolbox"), norm, noise_retries=0)
    found = margins.distance.isfinite()
    assert found.double().mean() > 0.9
    torch.testing.assert_close(
        margins.attack_distance[found], row_norm(expected - images, norm)[found], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shape", [oracles.DIGITS, oracles.OBLONG], ids=str)
def test_stock_l2_fmn_does_not_project_and_ours_does(shape: oracles.Shape) -> None:
    """If this fails, Foolbox has fixed `L2FMNAttack.project`."""
    truth = oracles.affine(10, shape)
    labels = truth.model(truth.images).argmax(1)
    stock = stock_foolbox(library.L2FMNAttack(), truth.model.eval().requires_grad_(False), truth.images, labels)
    ratio = row_norm(stock - truth.images, "l2") / truth.exact["l2"]
    assert ratio.median() > 1.5
    ours = measure(truth.model, truth.images, create("fmn"), "l2").attack_distance / truth.exact["l2"]
    assert ours.median() < 1.01
    assert ours.quantile(0.9) < 1.3


def test_linf_fmn_matches_stock_foolbox_with_fewer_steps(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    stock = row_norm(stock_foolbox(library.LInfFMNAttack(), model, images, labels) - images, "linf")
    ours = measure(model, images, create("fmn"), "linf").attack_distance
    crossed = stock > 0  # stock stops just inside the boundary for some images, and then returns the image
    assert crossed.double().mean() > 0.5
    assert (ours[crossed] / stock[crossed]).log().abs().median() < 0.01
    assert (ours[crossed] / stock[crossed]).mean() <= 1.005  # of 300 images 0.9991
    # control: with few steps it is not
    few = measure(model, images, create("fmn:steps=5"), "linf").attack_distance
    assert (few[crossed] / stock[crossed]).mean() > 1.02


def test_ddn_matches_stock_foolbox_with_fewer_steps(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    stock = row_norm(stock_foolbox(library.DDNAttack(), model, images, labels) - images, "l2")
    ours = measure(model, images, create("ddn"), "l2").attack_distance
    assert stock.min() > 0
    assert (ours / stock).mean() <= 1.005  # of 300 images 0.9990
    few = measure(model, images, create("ddn:steps=5"), "l2").attack_distance
    assert (few / stock).mean() > 1.02


def stock_pgd(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, **options: Any) -> Tensor:
    epsilon = RADIUS[norm]
    options = {"steps": 20, "alpha": 2.5 * epsilon / 20, "random_start": False} | options
    attack = (torchattacks.PGD if norm == "linf" else torchattacks.PGDL2)(model, eps=epsilon, **options)
    result: Tensor = attack(images, labels)
    return result


@pytest.mark.parametrize("temperature", [0.0, 10.0])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_at_one_radius_matches_stock_torchattacks(
    norm: Norm, temperature: float, digits: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = digits
    shown = ScaleFree(model, temperature) if temperature else model
    expected = stock_pgd(shown, images, labels, norm)
    radius = torch.full((COUNT,), RADIUS[norm], dtype=torch.float64)
    got = PGD(temperature=temperature).at_radius(model, images, labels, radius, norm)
    assert (row_norm(got - images, norm) > 0.5 * RADIUS[norm]).all()
    if norm == "linf":
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    else:
        # ours omits the constant that stock adds to the gradient's norm
        bare = stock_pgd(shown, images, labels, norm, eps_for_division=1e-30)
        torch.testing.assert_close(got, bare, rtol=0, atol=1e-6)
        # which decides a few pixels with zero gradient; their number depends on the machine's rounding
        assert ((got - expected).abs() <= 1e-3).double().mean() > 0.99
    assert not torch.allclose(got, stock_pgd(shown, images, labels, norm, steps=19), atol=1e-3)


def test_pgd_rows_have_their_own_radii(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    radius = torch.linspace(0.01, 0.3, COUNT, dtype=torch.float64)
    together = PGD(temperature=0.0).at_radius(model, images, labels, radius, "linf")
    for row in (0, COUNT // 2, COUNT - 1):
        one = slice(row, row + 1)
        alone = PGD(temperature=0.0).at_radius(model, images[one], labels[one], radius[one], "linf")
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-6)


def directions(images: Tensor, norm: Norm, seed: int) -> Tensor:
    """The random start of torchattacks' APGD and APGDT, as a point of the unit sphere."""
    torch.manual_seed(seed)
    if norm == "linf":
        draw = 2 * torch.rand(images.shape) - 1
        return draw / draw.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    draw = torch.randn(images.shape)
    return draw / draw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def paths(
    attack: Any,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    seed: int,
    loss: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Every point that stock and ours send through the model, from one start."""
    stock, ours = Recorder(model), Recorder(model)
    runner = attack(stock)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of torchattacks
        runner.attack_single_run(images, labels)
    radius = torch.full((len(images),), RADIUS[norm], dtype=torch.float64)
    start = ball_point(images, directions(images, norm, seed).to(images), radius, (0.0, 1.0))
    ascend(ours, loss, images, radius, start, norm, steps=runner.steps, bounds=(0.0, 1.0))
    return stock.seen, ours.seen


def compare(
    stock: list[Tensor],
    ours: list[Tensor],
    model: nn.Module,
    labels: Tensor,
    loss: Callable[[Tensor], Tensor],
    least: int,
) -> int:
    """The same points at every step, and the same rows with a witness; returns the number of rows, at least ``least``.

    Rows where DLR becomes 1 for every image are excluded (the label exactly third, or the
    target first): their gradient is only rounding.
    """
    assert len(stock) == len(ours)
    values = torch.stack([loss(model(points)) for points in stock])
    regular = ((values - 1).abs() > 1e-9).all(0)
    assert regular.sum() >= least
    for step, (theirs, own) in enumerate(zip(stock, ours, strict=True)):
        wrong = row_norm(theirs - own, "linf")[regular] > 1e-6
        assert not wrong.any(), f"step {step}: {int(wrong.sum())} rows apart"

    def crossed(path: list[Tensor]) -> Tensor:
        return torch.stack([model(points).argmax(1) != labels for points in path]).any(0)

    assert torch.equal(crossed(stock), crossed(ours))
    return int(regular.sum())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", NORMS)
def test_apgd_steps_match_stock_torchattacks(
    norm: Norm, seed: int, steps: int, digits: tuple[nn.Module, Tensor, Tensor]
) -> None:
    network, images, labels = digits
    model, images = copy.deepcopy(network).double(), images.double()
    attack = partial(torchattacks.APGD, norm=LIBRARY_NORM[norm], eps=RADIUS[norm], steps=steps, loss="dlr")
    loss = partial(dlr_loss, labels=labels)
    stock, ours = paths(attack, model, images, labels, norm, seed, loss)
    assert len(ours) == steps + 1
    compare(stock, ours, model, labels, loss, least=24)
    # control: other settings give other paths
    _, elsewhere = paths(partial(attack, steps=steps - 5), model, images, labels, norm, seed, loss)
    assert (elsewhere[-1] - ours[steps - 5]).abs().max() > 1e-3


def runner_up(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).sort(dim=1).indices[:, -2]


@pytest.mark.parametrize("seed", range(4))
def test_targeted_apgd_steps_match_stock_torchattacks(seed: int, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    network, images, labels = digits
    model, images = copy.deepcopy(network).double(), images.double()

    def attack(shown: nn.Module) -> Any:
        runner = torchattacks.APGDT(shown, norm="Linf", eps=RADIUS["linf"], steps=30)
        runner.target_class = 2
        return runner

    loss = partial(targeted_dlr_loss, labels=labels, targets=runner_up(model, images))
    stock, ours = paths(attack, model, images, labels, "linf", seed, loss)
    assert torch.equal(stock[0], images)  # looks up its target
    compare(stock[1:], ours, model, labels, loss, least=24)


def test_targeted_l2_apgd_of_stock_takes_the_first_rows_step_size(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Alone every row takes the same steps as ours; in a batch it uses the step size of the first row."""
    network, images, labels = digits
    model, images = copy.deepcopy(network).double(), images.double()
    targets = runner_up(model, images)

    def attack(shown: nn.Module) -> Any:
        runner = torchattacks.APGDT(shown, norm="L2", eps=RADIUS["l2"], steps=30)
        runner.target_class = 2
        return runner

    alone = 0
    for row in range(8):
        one = slice(row, row + 1)
        loss = partial(targeted_dlr_loss, labels=labels[one], targets=targets[one])
        stock, ours = paths(attack, model, images[one], labels[one], "l2", row, loss)
        alone += compare(stock[1:], ours, model, labels[one], loss, least=0)
    assert alone >= 6
    loss = partial(targeted_dlr_loss, labels=labels, targets=targets)
    stock, ours = paths(attack, model, images, labels, "l2", 0, loss)
    apart = torch.stack([row_norm(a - b, "l2") for a, b in zip(stock[1:], ours, strict=True)]).amax(0)
    assert apart[0] < 1e-6
    assert (apart[1:] > 1e-3).any()
