"""SuperDeepFool: projections reduce distances on curved boundaries at the paper's cost, and are exact on planes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Status
from attacks.estimators.sdf import SuperDeepFool
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.registry import create
from attacks.types import Domain
from tests import oracles
from tests.oracles import Oracle

Digits = tuple[nn.Module, Tensor, Tensor]


def ratios(truth: Oracle, estimator: SuperDeepFool) -> Tensor:
    """Verified distance / exact margin, inf where none was found."""
    margins = measure(truth.model, truth.images, estimator, "l2", domain=truth.domain, noise_retries=0)
    return margins.distance / truth.exact["l2"]


class Counted(nn.Module):
    """Counts the rows of all passes; the logits may be scaled."""

    def __init__(self, model: nn.Module, tell: Callable[[int], object] = bool, factor: float = 1.0) -> None:
        super().__init__()
        self.model, self.tell, self.factor = model, tell, factor

    def forward(self, images: Tensor) -> Tensor:
        self.tell(len(images))
        logits: Tensor = self.factor * self.model(images)
        return logits


# Planes.

PLANES: dict[str, Callable[[], Oracle]] = {
    "two": lambda: oracles.affine(2),
    "three": lambda: oracles.affine(3),
    "ten": lambda: oracles.affine(10),
    "confident": oracles.confident,
    "free": lambda: oracles.boxed(10, domain="free"),
    "boxed-two": lambda: oracles.boxed(2),
    "boxed-three": lambda: oracles.boxed(3),
    "boxed-ten": lambda: oracles.boxed(10),
    "thousand": lambda: oracles.affine(10, scale=1000.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANES)
def test_exact_on_planes(name: str) -> None:
    truth = PLANES[name]()
    assert ratios(truth, SuperDeepFool()).median() < 1.0002
    # some margins are a few units in the last place of float32
    assert ratios(truth.to(torch.float64), SuperDeepFool()).max() < 1.001


@pytest.mark.parametrize("name", ["two", "ten", "free"])
def test_no_step_is_longer_than_the_overshoot(name: str) -> None:
    """Steps of 1.5 x 1.02 without projection, as in another implementation, give distances of 1.53 on planes."""
    truth = PLANES[name]().to(torch.float64)
    for overshoot in (0.005, 0.53):
        estimator = SuperDeepFool(overshoot=overshoot)
        margins = measure(truth.model, truth.images, estimator, "l2", domain=truth.domain, noise_retries=0)
        torch.testing.assert_close(margins.attack_distance, (1 + overshoot) * truth.exact["l2"], rtol=1e-9, atol=1e-12)


# Curved boundaries of known margin.


@pytest.mark.parametrize(("inside", "limit"), [(True, 1.05), (False, 1.0005)], ids=["inside", "outside"])
def test_projections_shorten_the_path_to_a_sphere(inside: bool, limit: float) -> None:
    truth = oracles.ball(inside=inside)
    ratio = ratios(truth, SuperDeepFool())
    assert ratio.min() > 1 - 1e-6
    assert ratio.mean() < limit
    # control: without projections, the same steps miss the limit by far
    without = ratios(truth, SuperDeepFool(n=0))
    assert without.mean() > 1.12
    assert (ratio < without).all()


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_more_projections_reduce_the_distance_further(inside: bool, m: int) -> None:
    truth = oracles.ball(inside=inside)
    once, thrice = ratios(truth, SuperDeepFool(m=m, n=1)), ratios(truth, SuperDeepFool(m=m, n=3))
    assert once.mean() < 1.05
    assert thrice.mean() < 1.004
    assert thrice.mean() < once.mean() + 1e-4


class Ledge(nn.Module):
    """Class 1 is reached along the first pixel; class 2, with zero gradient at grey, rises steeply before it."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1) - 0.5
        ahead, slant = x[:, 0], x[:, 0] + 0.5 * x[:, 1]
        return torch.stack([0.2 - ahead, ahead - 0.2, 100 * torch.relu(slant - 0.15) - 0.5], dim=1)


def test_projections_use_the_normal_of_the_class_that_was_reached() -> None:
    """DeepFool steps towards class 1, the only one with a gradient, and reaches class 2."""
    images = torch.full((2, 1, 8, 8), 0.5)
    margins = measure(Ledge(), images, SuperDeepFool(), "l2")
    assert margins.target.tolist() == [2, 2]
    # 100 (s - 0.15) - 0.5 = 0.2 - ahead on the normal (101, 50)
    t = (15 + 0.7) / (101**2 + 50**2)
    exact = torch.full((2,), t * (101**2 + 50**2) ** 0.5, dtype=torch.float64)
    torch.testing.assert_close(margins.distance, exact, rtol=2e-4, atol=0)
    # control: along the step the distance is a tenth larger
    without = measure(Ledge(), images, SuperDeepFool(n=0), "l2")
    assert (without.distance > 1.1 * exact).all()


# Cost.


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_cost_on_planes_matches_the_paper(classes: int) -> None:
    """A step: one forward, a backward for each other class. A projection: one of each. And a final check."""
    forwards, backwards = passes(oracles.affine(classes).to(torch.float64), SuperDeepFool())
    assert (backwards == classes - 1 + 1).all()
    assert (forwards <= 3).all()
    # the check is omitted if the projection moved nothing
    assert (forwards == 3).double().mean() > 0.5
    assert (forwards >= 2).all()
    _, fewer = passes(oracles.affine(classes), SuperDeepFool(candidates=2))
    assert (fewer == 2).all()


def passes(truth: Oracle, estimator: SuperDeepFool) -> tuple[Tensor, Tensor]:
    """Forwards and backwards of each image, without those of verification."""
    with frozen_view(truth.model, (0.0, 1.0), truth.domain, truth.images.device) as view:
        view.start_chunk(len(truth.images))
        labels = truth.model(truth.images).argmax(1)
        estimator.perturb(view, truth.images, labels, "l2", seeds=torch.zeros_like(labels))
        return view.forwards, view.backwards


@pytest.mark.slow
def test_cost_of_a_row_does_not_depend_on_its_batch(trained_digits: Digits) -> None:
    """Except forwards, of which a mixed batch takes up to two per step."""
    model, images, _ = trained_digits
    images = images[:48]
    alone = measure(model, images, SuperDeepFool(), "l2", batch_size=1, noise_retries=0)
    whole = measure(model, images, SuperDeepFool(), "l2", noise_retries=0)
    torch.testing.assert_close(whole.distance, alone.distance, rtol=2e-4, atol=0)
    assert torch.equal(whole.backwards, alone.backwards)
    assert (whole.forwards >= alone.forwards).all()
    assert whole.forwards.mean() < 1.25 * alone.forwards.mean()
    # rows finish independently: some after one round, some after several
    assert alone.backwards.min() == 10
    assert alone.backwards.max() > 30
    loud = measure(Counted(model, factor=1000.0), images, SuperDeepFool(), "l2", noise_retries=0)
    torch.testing.assert_close(loud.distance, alone.distance, rtol=2e-4, atol=0)


def test_finished_rows_are_not_passed_again(trained_digits: Digits) -> None:
    model, images, _ = trained_digits
    passed = list[int]()
    margins = measure(
        Counted(model, lambda rows: passed.append(rows)), images[:48], SuperDeepFool(), "l2", checked=True
    )
    assert sum(passed) == margins.forwards.sum()
    walk = passed[1 : passed.index(48, 3)]  # verification passes all images again
    assert walk[:2] == [48, 48]
    # the number of rounds depends on the trained network, whose rounding depends on the machine
    assert min(walk) < 24


# A trained network.


@pytest.mark.slow
def test_nearer_than_deepfool_on_a_trained_network(trained_digits: Digits) -> None:
    model, images, _ = trained_digits
    cases: list[tuple[Domain, float, float]] = [("box", 0.985, 0.85), ("free", 0.976, 0.98)]
    for domain, mean, nearer in cases:
        sdf = measure(model, images, SuperDeepFool(), "l2", domain=domain)
        deepfool = measure(model, images, create("deepfool"), "l2", domain=domain)
        found = sdf.distance.isfinite() & deepfool.distance.isfinite()
        assert sdf.distance.isfinite().double().mean() > 0.99
        ratio = sdf.distance[found] / deepfool.distance[found]
        assert ratio.mean() < mean
        assert (ratio < 1.0001).double().mean() > nearer
        stock = measure(model, images, create("deepfool:engine=foolbox"), "l2", domain=domain)
        assert (sdf.forwards + sdf.backwards).mean() < 0.9 * (stock.forwards + stock.backwards).mean()


@pytest.mark.slow
def test_waiting_for_a_projected_witness_hardly_reduces_distances(trained_digits: Digits) -> None:
    """The paper's rule, to continue until a projected point has another class, cycles."""
    model, images, _ = trained_digits
    soon = measure(model, images[:64], SuperDeepFool(), "l2", noise_retries=0)
    late = measure(model, images[:64], SuperDeepFool(patience=50), "l2", noise_retries=0)
    assert (late.distance <= soon.distance * 1.0002).all()
    assert (late.distance / soon.distance).mean() > 0.997
    assert (late.forwards + late.backwards).mean() > 1.5 * (soon.forwards + soon.backwards).mean()


# Nothing is found.


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_images_with_zero_gradients_are_not_found() -> None:
    for truth in (oracles.constant(), oracles.flat(count=8)):
        margins = measure(truth.model, truth.images, SuperDeepFool(), "l2", noise_retries=0)
        assert set(margins.status) == {Status.NOT_FOUND}
        assert margins.distance.isinf().all()
        # two passes of verification and one of the first step
        assert (margins.forwards == 3).all()


def test_a_row_with_zero_gradient_does_not_affect_the_others() -> None:
    """Class 0 leads on both halves; only bright images have a nonzero gradient."""

    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.flatten(1).mean(1)
            return torch.stack([1.0 + 0 * mean, 4 * torch.relu(mean - 0.5)], dim=1)

    images = torch.full((4, 1, 8, 8), 0.25)
    images[1::2] = 0.625
    margins = measure(Half(), images, SuperDeepFool(), "l2", noise_retries=0)
    assert margins.status == (Status.NOT_FOUND, Status.FOUND) * 2
    assert margins.forwards[::2].tolist() == [3.0, 3.0]
    torch.testing.assert_close(margins.distance[1::2], torch.ones(2).double(), rtol=2e-4, atol=0)


class Torn(nn.Module):
    """Two classes with NaN gradients: everywhere, or only beyond the boundary."""

    def __init__(self, beyond: bool) -> None:
        super().__init__()
        self.beyond = beyond

    def forward(self, images: Tensor) -> Tensor:
        lead = 0.2 - (images.flatten(1)[:, 0] - 0.5)
        torn = (lead * ((lead > 0) & self.beyond)).sqrt()  # 0 / 0 where it is 0
        return torch.stack([lead + 0 * torn, torch.zeros_like(lead)], dim=1)


def test_nonfinite_gradients_end_a_row() -> None:
    images = torch.full((2, 1, 8, 8), 0.5)
    lost = measure(Torn(beyond=False), images, SuperDeepFool(), "l2", noise_retries=0)
    assert lost.status == (Status.NOT_FOUND,) * 2
    assert lost.witness.isfinite().all()
    # the witness is kept, and no NaN is passed
    truth = Oracle("torn", Torn(beyond=True), images, {"l2": torch.full((2,), 0.2, dtype=torch.float64)})
    assert ratios(truth, SuperDeepFool()).max() < 1.0002
    assert passes(truth, SuperDeepFool())[0].tolist() == [2, 2]
