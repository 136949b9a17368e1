"""`measure`: statuses, noise, halving of raising batches, refinement, units, and errors for bad input."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.checks import GradientWarning
from attacks.estimator import Margins, Status
from attacks.isolation import Classifier
from attacks.measure import measure
from attacks.registry import create
from attacks.seeds import derive_seed
from attacks.types import EstimatorError, InputError
from tests.grids import covering

Propose = Callable[[Classifier, Tensor, Tensor, Tensor], Any]


class Planted:
    """An estimator made of a function (model, images, labels, seeds) -> candidates; records its arguments."""

    name = "planted"
    norms = frozenset({"l2", "linf"})
    domains = frozenset({"box", "free"})
    tightness: dict[str, float] = {}  # noqa: RUF012
    batch_invariant = True

    def __init__(self, propose: Propose) -> None:
        self.propose = propose
        self.calls: list[Tensor] = []
        self.seeds: list[list[int]] = []
        self.starts: list[Tensor | None] = []

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: str,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Any:
        self.calls.append(images.clone())
        self.seeds.append(seeds.tolist())
        self.starts.append(start)
        return self.propose(model, images, labels, seeds)


def always(point: float) -> Planted:
    """Proposes the same grey for every image."""
    return Planted(lambda model, images, labels, seeds: torch.full_like(images, point))


def hopeless() -> Planted:
    """Proposes the images themselves."""
    return Planted(lambda model, images, labels, seeds: images)


class Line(nn.Module):
    """Class 1 where the mean pixel has passed an odd number of ``crossings``; logit gaps grow off them."""

    def __init__(self, *crossings: float, slope: float = 1.0) -> None:
        super().__init__()
        self.crossings, self.slope = crossings, slope

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1)
        gap = torch.full_like(mean, self.slope)
        for crossing in self.crossings:
            gap = gap * (crossing - mean)
        return torch.stack([gap, -gap], 1)


class Affine(nn.Module):
    """``classes`` random directions over ``pixels`` in ``bounds``, all boundaries near mid-grey."""

    def __init__(self, classes: int = 4, pixels: int = 16, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator))
        middle = sum(bounds) / 2 * self.weight.detach().sum(1)
        scale = 0.2 * (bounds[1] - bounds[0])
        self.bias = nn.Parameter(scale * torch.randn(classes, generator=generator) - middle)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def greys(*values: float, size: int = 1) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, size, size).clone()


def mixed_images(count: int = 6, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    unit = 0.4 + 0.2 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(12))
    return unit * (bounds[1] - bounds[0]) + bounds[0]


def small_cnn() -> nn.Module:
    torch.manual_seed(13)
    layers = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
    return nn.Sequential(*layers)


def check(margins: Margins, model: nn.Module, images: Tensor, norm: str = "l2") -> None:
    """Properties that hold for any estimator."""
    count = len(images)
    logits = model(images)
    assert torch.equal(margins.prediction, logits.argmax(1))
    moved = model(margins.witness).argmax(1)
    for row, status in enumerate(margins.status):
        distance, raw = margins.distance[row].item(), margins.attack_distance[row].item()
        difference = (margins.witness[row] - images[row]).double().flatten()
        if status in (Status.FOUND, Status.FOUND_AFTER_NOISE):
            assert 0 < distance <= raw < math.inf
            assert distance == pytest.approx(difference.norm(p=2 if norm == "l2" else math.inf).item(), rel=1e-6)
            assert margins.target[row] == moved[row] != margins.prediction[row]
            assert margins.message[row] == ""
        else:
            assert distance == raw == (0.0 if status is Status.TIED else math.inf)
            assert difference.eq(0).all()
            assert margins.target[row] == -1
        assert (status is Status.FAILED) == bool(margins.message[row])
    assert all(len(getattr(margins, name)) == count for name in Margins.__dataclass_fields__)
    for column in (margins.distance, margins.attack_distance, margins.forwards, margins.backwards):
        assert column.dtype == torch.float64
        assert not column.isnan().any()


# --- statuses ---


def test_every_status_in_one_batch() -> None:
    model, images = Line(0.5), greys(0.2, 0.47, 0.5, 0.3, 0.4, size=4)

    def propose(view: Classifier, points: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        if (points == greys(0.4)).flatten(1).all(1).any():
            raise RuntimeError("never this one")
        # the first image is always found, the second only from a noisy start, the others never
        result = points.clone()
        for row, point in enumerate(points):
            noisy = len(point.unique()) > 1
            if torch.equal(point, images[0]) or (noisy and seeds[row] == derive_seed("retry", 101, 0)):
                result[row] = 0.9
        return result

    margins = measure(model, images, Planted(propose), "l2", seeds=[100, 101, 102, 103, 104], noise_retries=1)
    check(margins, model, images)
    assert margins.status == (
        Status.FOUND,
        Status.FOUND_AFTER_NOISE,
        Status.TIED,
        Status.NOT_FOUND,
        Status.FAILED,
    )
    assert margins.noise_retries.tolist() == [0, 1, 0, 1, 0]
    assert margins.message[4] == "RuntimeError: never this one"
    assert margins.distance[0].item() == pytest.approx(0.3 * 4, rel=2e-4)
    assert margins.attack_distance[0].item() == pytest.approx(0.7 * 4)
    assert margins.logit_margin.tolist() == pytest.approx([0.6, 0.06, 0.0, 0.4, 0.2], abs=1e-6)
    assert margins.confidence[2].item() == 0.5
    assert margins.forwards[2].item() == 1, "a tied image costs its clean pass and is not attacked"


@pytest.mark.parametrize("text", ["deepfool", "fmn:steps=10", "pgd:rounds=2,steps=5", "apgd:rounds=2,steps=5", "fab"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_image_without_a_boundary_is_not_found(text: str, norm: Any) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] * 0 + torch.tensor([0.0, 2.0, 1.0])

    images = mixed_images(3)
    with pytest.warns(GradientWarning):
        margins = measure(Constant(), images, create(text), norm, noise_retries=2)
    check(margins, Constant(), images, norm)
    assert margins.status == (Status.NOT_FOUND,) * 3
    assert margins.noise_retries.tolist() == [2, 2, 2]


def test_a_classifier_with_a_boundary_out_of_the_box_is_found_in_free_space_only() -> None:
    model, images = Line(1.5), greys(0.2, 0.6)
    boxed = measure(model, images, always(2.0), "linf", domain="box", noise_retries=0)
    free = measure(model, images, always(2.0), "linf", domain="free", noise_retries=0)
    check(boxed, model, images, "linf")
    check(free, model, images, "linf")
    assert boxed.status == (Status.NOT_FOUND,) * 2
    assert free.distance.tolist() == pytest.approx([1.3, 0.9], rel=2e-4)


# --- misbehaving estimators ---


@pytest.mark.parametrize(
    ("value", "domain", "expected"),
    [
        (math.nan, "box", None),
        (math.inf, "free", None),
        (-math.inf, "free", None),
        (math.inf, "box", (0.3, 0.8)),  # clipped to 1
        (7.0, "box", (0.3, 0.8)),
        (-7.0, "box", None),
        (7.0, "free", (0.3, 6.8)),
    ],
)
def test_candidates_on_or_outside_the_bounds(value: float, domain: Any, expected: tuple[float, float] | None) -> None:
    model, images = Line(0.5), greys(0.2, 0.2)
    margins = measure(model, images, always(value), "linf", domain=domain, noise_retries=0)
    check(margins, model, images, "linf")
    if expected is None:
        assert margins.status == (Status.NOT_FOUND,) * 2
    else:
        assert margins.distance.tolist() == pytest.approx([expected[0]] * 2, rel=2e-4)
        assert margins.attack_distance.tolist() == pytest.approx([expected[1]] * 2, rel=1e-6)


def test_one_nan_pixel_invalidates_only_its_row() -> None:
    def propose(view: Classifier, images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        points = torch.full_like(images, 0.9)
        points[1, 0, 0, 0] = math.nan
        return points

    model, images = Line(0.5), greys(0.2, 0.2, 0.2, size=2)
    margins = measure(model, images, Planted(propose), "l2", noise_retries=0)
    check(margins, model, images)
    assert margins.status == (Status.FOUND, Status.NOT_FOUND, Status.FOUND)


def test_the_clean_image_is_never_a_witness() -> None:
    """Not even if the class depends on the batch: a candidate equal to the image never gives a margin of 0."""
    model, images = Line(0.5), greys(0.2, 0.7)
    margins = measure(model, images, hopeless(), "l2", noise_retries=0)
    check(margins, model, images)
    assert margins.status == (Status.NOT_FOUND,) * 2


def test_a_point_with_nan_logits_is_no_witness() -> None:
    class Fragile(Line):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return torch.where(images.flatten(1).mean(1, keepdim=True) > 0.8, torch.nan, logits)

    model, images = Fragile(0.5), greys(0.2)
    margins = measure(model, images, always(0.9), "l2", noise_retries=0)
    check(margins, model, images)
    assert margins.status == (Status.NOT_FOUND,)


def test_candidates_of_other_dtypes_are_accepted() -> None:
    model, images = Line(0.5), greys(0.2)
    for dtype in (torch.float64, torch.float16, torch.int64):
        margins = measure(model, images, Planted(lambda m, i, *_, d=dtype: torch.ones_like(i, dtype=d)), "l2")
        check(margins, model, images)
        assert margins.witness.dtype == torch.float32


@pytest.mark.parametrize(
    ("candidates", "got"),
    [
        (lambda images: images[:-1], r"\(2, 1, 1, 1\)"),
        (lambda images: images.flatten(1), r"\(3, 1\)"),
        (lambda images: None, "NoneType"),
        (lambda images: [images], "list"),
        (lambda images: images.numpy(), "ndarray"),
    ],
)
def test_results_that_are_not_a_batch_of_witnesses_are_refused(candidates: Callable[[Tensor], Any], got: str) -> None:
    estimator = Planted(lambda model, images, labels, seeds: candidates(images))
    with pytest.raises(EstimatorError, match=rf"^expected witnesses of shape \(3, 1, 1, 1\) from planted, got {got}; "):
        measure(Line(0.5), greys(0.1, 0.2, 0.3), estimator, "l2")


@pytest.mark.parametrize("bad", [{5}, {0, 7}, {3, 4}, set(range(8)), set()])
def test_a_raising_library_fails_only_the_rows_that_raise(bad: set[int]) -> None:
    images = greys(*(0.1 + 0.01 * i for i in range(8)))

    def propose(view: Classifier, points: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        raising = bad & set(seeds.tolist())
        if raising:
            raise ValueError(f"cannot do {sorted(raising)}\nsecond line")
        return torch.full_like(points, 0.9)

    model, estimator = Line(0.5), Planted(propose)
    margins = measure(model, images, estimator, "l2", seeds=range(8))
    check(margins, model, images)
    for row, status in enumerate(margins.status):
        assert status is (Status.FAILED if row in bad else Status.FOUND)
        assert margins.message[row].startswith(f"ValueError: cannot do [{row}]" if row in bad else "")
    undisturbed = measure(model, images, always(0.9), "l2", seeds=range(8))
    good = [row for row in range(8) if row not in bad]
    assert torch.equal(margins.distance[good], undisturbed.distance[good])
    if bad == {5}:
        assert [len(call) for call in estimator.calls] == [8, 4, 4, 2, 1, 1, 2]
    assert margins.noise_retries.sum() == 0, "what raises is not tried again"


def test_passes_of_raising_attempts_are_counted() -> None:
    def propose(view: Classifier, points: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        view(points)
        if 1 in seeds:
            raise RuntimeError("no")
        return points

    margins = measure(Line(0.5), greys(0.1, 0.2), Planted(propose), "l2", seeds=[0, 1], noise_retries=0)
    # clean, together, alone; the good row's check
    assert margins.forwards.tolist() == [4, 3]


@pytest.mark.parametrize("error", [EstimatorError("ours"), InputError("ours too")])
def test_our_own_exceptions_are_raised_and_not_recorded_as_failures(error: Exception) -> None:
    def propose(view: Classifier, points: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match="ours"):
        measure(Line(0.5), greys(0.1, 0.2), Planted(propose), "l2")


# --- noise ---


def own_noise(seed: int, attempt: int, size: int) -> Tensor:
    """Standard normal noise that depends only on the image's seed."""
    generator = torch.Generator().manual_seed(derive_seed("noise", seed, attempt))
    return torch.randn(1, size, size, generator=generator, dtype=torch.float64)


def noises(estimator: Planted, clean: Tensor) -> list[Tensor]:
    """The noise of each retry that the estimator was given."""
    return [call - clean for call in estimator.calls[1:]]


def test_noise_grows_and_depends_only_on_the_images_seed() -> None:
    # far from the boundary, so that noise alone does not change the class
    model, images = Line(5.0), greys(0.5, 0.5, 0.5, size=32)
    together, alone, again = hopeless(), hopeless(), hopeless()
    margins = measure(model, images, together, "l2", seeds=[7, 8, 9])
    check(margins, model, images)
    assert margins.noise_retries.tolist() == [6, 6, 6]
    # clean, the attack's check; then per retry the checks of the noisy point and of its witness
    assert margins.forwards.tolist() == [2 + 6 * 2] * 3
    measure(model, images[1:2], alone, "l2", seeds=[8])
    measure(model, images.flip(0), again, "l2", seeds=[9, 8, 7], batch_size=2)
    for attempt, noise in enumerate(noises(together, images)):
        scale = 0.01 * 2**attempt
        assert noise.flatten(1).std(1).tolist() == pytest.approx([scale] * 3, rel=0.1 if attempt < 5 else 0.2)
        assert not torch.equal(noise[0], noise[1])
        assert torch.equal(noise[1], noises(alone, images[1:2])[attempt][0])
    order = [call for call in again.calls if len(call) == 2][1:]
    for attempt, noise in enumerate(noises(together, images)):
        assert torch.equal(order[attempt] - images[:2], noise[[2, 1]])
    assert (noises(together, images)[5] + images).amax() <= 1.0
    expected = (0.04 * own_noise(8, 2, 32)).float()
    torch.testing.assert_close(noises(together, images)[2][1], expected, rtol=0, atol=1e-6)


def test_noise_is_in_units_of_the_pixel_range() -> None:
    estimator, images = hopeless(), torch.full((1, 1, 32, 32), 20.0)
    measure(Line(5000.0), images, estimator, "l2", bounds=(-80.0, 120.0), noise_retries=1)
    clean, noisy = estimator.calls
    assert clean.unique().tolist() == [0.5]
    assert (noisy - clean).std().item() == pytest.approx(0.01, rel=0.1)


def test_free_noise_is_not_clipped() -> None:
    estimator, images = hopeless(), torch.ones(1, 1, 8, 8)
    measure(Line(5.0), images, estimator, "l2", domain="free", noise_retries=1)
    assert estimator.calls[1].amax() > 1
    measure(Line(5.0), images, estimator, "l2", domain="box", noise_retries=1)
    assert estimator.calls[3].amax() == 1


def test_a_noisy_point_of_another_class_is_a_witness() -> None:
    model, images, estimator = Line(0.5, slope=1.0), greys(0.49999, 0.2, size=2), hopeless()
    crossing = next(seed for seed in range(100) if 0.01 * own_noise(seed, 0, 2).mean() > 0.001)
    seeds = [crossing, 0]
    margins = measure(model, images, estimator, "l2", seeds=seeds, noise_retries=1)
    check(margins, model, images)
    assert margins.status == (Status.FOUND_AFTER_NOISE, Status.NOT_FOUND)
    assert [len(call) for call in estimator.calls] == [2, 1], "it is not attacked again"
    length = 0.01 * own_noise(crossing, 0, 2).norm().item()
    assert margins.attack_distance[0].item() == pytest.approx(length, rel=1e-3)


def test_distance_is_from_the_image_and_not_from_the_noise() -> None:
    model, images = Line(0.5), greys(0.3, size=4)

    def from_noise_only(view: Classifier, points: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        noisy = points.flatten(1).std(1) > 1e-3
        return torch.where(noisy.view(-1, 1, 1, 1), points + 0.4, points)

    margins = measure(model, images, Planted(from_noise_only), "l2", noise_retries=3)
    check(margins, model, images)
    assert margins.status == (Status.FOUND_AFTER_NOISE,)
    assert margins.noise_retries.tolist() == [1]
    # the witness's mean lies at the boundary and its pixels are noisy, so it is slightly beyond the margin
    assert 0.2 * 4 < margins.distance.item() < 0.2 * 4 * 1.02


def test_without_retries_every_image_is_attacked_once() -> None:
    estimator = hopeless()
    margins = measure(Line(0.5), greys(0.2), estimator, "l2", noise_retries=0)
    assert len(estimator.calls) == 1
    assert margins.noise_retries.tolist() == [0]


# --- refinement ---


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_refinement_removes_the_overshoot(norm: Any, overshoot: float) -> None:
    model, images = Affine(classes=2), mixed_images()
    exact = affine_margins(model.weight, model.bias, images, norm)
    margins = measure(model, images, create(f"deepfool:overshoot={overshoot}"), norm)
    check(margins, model, images, norm)
    assert (margins.attack_distance / exact > 1 + overshoot - 1e-3).all()
    torch.testing.assert_close(margins.distance, exact, rtol=2e-4, atol=0)
    assert (margins.distance > exact * (1 - 1e-5)).all()


def test_a_witness_782_times_too_far_is_refined_to_the_boundary() -> None:
    # grey 0.001 below the boundary; white is 782 times as far
    crossing = 1 - 781 * 0.001
    model, images = Line(crossing), greys(crossing - 0.001, size=3)
    margins = measure(model, images, always(1.0), "linf", noise_retries=0)
    check(margins, model, images, "linf")
    assert margins.attack_distance.item() == pytest.approx(0.782, rel=1e-3)
    assert margins.distance.item() == pytest.approx(0.001, rel=3e-3)  # float32 greys
    bisections = margins.forwards.item() - 3  # the clean pass, the witness, the refined witness
    assert bisections <= 24


def test_bisection_stops_after_24_passes() -> None:
    model, images = Line(1e-9), greys(0.0).double()
    margins = measure(model, images, always(1.0), "linf", noise_retries=0)
    check(margins, model, images, "linf")
    assert margins.forwards.item() == 3 + 24
    assert margins.distance.item() == pytest.approx(2.0**-24 * (1 + 5e-5))


def test_a_witness_behind_three_boundaries_gives_a_verified_point() -> None:
    """The classes along the segment are 0, 1, 0, 1: any verified crossing is a valid result."""
    model, images = Line(0.3, 0.5, 0.7), greys(0.05, 0.1, 0.2, 0.25)
    margins = measure(model, images, always(0.97), "linf", noise_retries=0)
    check(margins, model, images, "linf")
    for clean, distance in zip(images.flatten().tolist(), margins.distance.tolist(), strict=True):
        assert min(abs(clean + distance - crossing) for crossing in (0.3, 0.7)) < 2e-4


@pytest.mark.parametrize("text", ["deepfool", "fmn:steps=20", "ddn:steps=20", "pgd:rounds=3", "apgd:rounds=3", "fab"])
def test_verified_and_no_farther_than_the_attack_on_a_network(text: str) -> None:
    model, images = small_cnn(), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(14))
    margins = measure(model, images, create(text), "l2")
    check(margins, model, images)
    assert Status.FOUND in margins.status
    assert margins.witness.amin() >= 0
    assert margins.witness.amax() <= 1


# --- units, batches, seeds ---


@pytest.mark.parametrize(
    ("text", "bounds"), covering(["deepfool", "fmn", "pgd", "apgd"], [(-1.0, 1.0), (0.0, 255.0), (-3.0, 0.5)])
)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_are_in_pixel_units(text: str, norm: Any, bounds: tuple[float, float]) -> None:
    model, images = Affine(classes=2, bounds=bounds), mixed_images(4, bounds)
    exact = affine_margins(model.weight, model.bias, images, norm, domain="box", bounds=bounds)
    margins = measure(model, images, create(text), norm, bounds=bounds)
    check(margins, model, images, norm)
    assert set(margins.status) == {Status.FOUND}
    assert margins.witness.amin() >= bounds[0]
    assert margins.witness.amax() <= bounds[1]
    assert (margins.distance >= exact * (1 - 1e-4)).all()
    assert (margins.distance <= exact * 1.05).all()


def test_estimators_see_unit_pixels_and_their_witnesses_are_mapped_back() -> None:
    seen = Planted(lambda model, images, labels, seeds: torch.ones_like(images))
    images = torch.tensor([-50.0, 30.0]).view(2, 1, 1, 1)
    start = torch.full_like(images, 150.0)
    margins = measure(Line(100.0), images, seen, "linf", bounds=(-50.0, 150.0), start=start)
    assert seen.calls[0].flatten().tolist() == pytest.approx([0.0, 0.4])
    assert seen.starts[0] is not None
    assert seen.starts[0].flatten().tolist() == [1.0, 1.0]
    assert margins.attack_distance.tolist() == pytest.approx([200.0, 120.0])
    assert margins.distance.tolist() == pytest.approx([150.0, 70.0], rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "norm"),
    covering(
        ["deepfool", "fmn:steps=20", "pgd:rounds=3,restarts=2,steps=5", "apgd:rounds=3,steps=5", "fab:steps=5"],
        ["l2", "linf"],
    ),
)
def test_margins_do_not_depend_on_batch_size(text: str, norm: Any) -> None:
    """Up to rounding, 1e-16 here: larger differences would mean that rows depend on each other."""
    model = small_cnn().double()
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(15)).double()
    whole = measure(model, images, create(text), norm, noise_retries=1)
    for size in (1, 3):
        parts = measure(model, images, create(text), norm, batch_size=size, noise_retries=1)
        torch.testing.assert_close(parts.distance, whole.distance, rtol=1e-6 if "fab" in text else 1e-9, atol=0)
        assert parts.status == whole.status


def test_chunks_progress_and_seeds() -> None:
    done: list[int] = []
    estimator, images = always(0.9), greys(0.1, 0.2, 0.3, 0.4, 0.45)
    margins = measure(Line(0.5), images, estimator, "l2", batch_size=2, on_progress=done.append)
    check(margins, Line(0.5), images)
    assert [len(call) for call in estimator.calls] == [2, 2, 1]
    assert done == [2, 2, 1]
    positions = [derive_seed("image", i) for i in range(5)]
    assert [seed for seeds in estimator.seeds for seed in seeds] == positions
    for given in (torch.arange(5), [0, 1, 2, 3, 4], range(5)):
        asked = always(0.9)
        measure(Line(0.5), images, asked, "l2", seeds=given)
        assert asked.seeds == [[0, 1, 2, 3, 4]]


def test_library_generators_are_seeded_by_the_seeds_of_the_chunk() -> None:
    draws: list[float] = []

    def draw(view: Classifier, images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        draws.append(torch.rand(1).item())
        return images

    for seeds in ([1, 2], [1, 2], [3, 4]):
        torch.rand(5)  # earlier draws of the caller have no effect
        measure(Line(0.5), greys(0.1, 0.2), Planted(draw), "l2", seeds=seeds, noise_retries=0)
    assert draws[0] == draws[1] != draws[2]


def test_derived_seeds_are_stable() -> None:
    assert derive_seed("image", 0) == derive_seed("image", 0)
    assert derive_seed("a", 1) != derive_seed("a", 2) != derive_seed("a1", 2)
    assert 0 <= derive_seed("image", 3) < 2**63
    # equal on every machine and version, as resumed runs rely on it
    assert derive_seed("noise", 8, 2) == 5252201512514804315


def test_start_reaches_the_estimator_of_the_first_attack_only() -> None:
    estimator, images = hopeless(), greys(0.1, 0.2, 0.3)
    start = greys(0.9, 0.8, 0.7)
    measure(Line(0.5), images, estimator, "l2", start=start, batch_size=2, noise_retries=1)
    given = [s for s in estimator.starts if s is not None]
    assert torch.equal(torch.cat(given), start)
    assert [s is None for s in estimator.starts] == [False, True, False, True]


@pytest.mark.parametrize("text", ["fmn:steps=20", "deepfool"])
def test_a_start_that_is_not_a_witness_changes_no_distance(text: str) -> None:
    model, images = Affine(), mixed_images()
    without = measure(model, images, create(text), "l2")
    start = without.witness.clone()
    start[2] = images[2]
    margins = measure(model, images, create(text), "l2", start=start)
    check(margins, model, images)
    assert set(margins.status) == {Status.FOUND}
    torch.testing.assert_close(margins.distance, without.distance, rtol=0.02, atol=0)


# --- other precisions ---


@pytest.mark.parametrize(
    ("text", "dtype"),
    covering(
        ["deepfool", "fmn:steps=20", "pgd:rounds=3", "apgd:rounds=3,steps=10", "fab"],
        [torch.float64, torch.float16, torch.bfloat16],
    ),
)
def test_models_are_measured_in_their_own_precision(text: str, dtype: torch.dtype) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(16)).to(dtype)
    model = small_cnn().to(dtype)
    margins = measure(model, images, create(text), "l2")
    assert margins.witness.dtype == dtype
    assert margins.distance.dtype == torch.float64
    assert margins.message == ("",) * 4
    found = torch.tensor([status is Status.FOUND for status in margins.status])
    assert found.any()
    assert torch.equal(model(margins.witness)[found].argmax(1), margins.target[found])
    single = measure(small_cnn(), images.float(), create(text), "l2")
    rough = {torch.float64: 0.02, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(margins.distance[found], single.distance[found], rtol=rough, atol=0)


# --- bad input: one-line errors ---


def lambda_model(forward: Callable[[Tensor], Any]) -> nn.Module:
    class Model(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return forward(images)

    return Model()


GREY = greys(0.2, 0.3)


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"images": GREY - 1}, InputError, "images in [0, 1], got [-0.8, -0.7]; undo a Normalize"),
        ({"images": GREY * 255}, InputError, "images in [0, 1], got [51, 76.5]"),
        ({"bounds": (0.25, 1.0)}, InputError, "images in [0.25, 1], got [0.2, 0.3]"),
        ({"images": (GREY * 10).long()}, InputError, "in floating point, got (2, 1, 1, 1) torch.int64"),
        ({"images": (GREY * 10).byte()}, InputError, "in floating point, got (2, 1, 1, 1) torch.uint8"),
        ({"images": GREY[:, 0]}, InputError, "images of shape (B, C, H, W) in floating point, got (2, 1, 1)"),
        ({"images": GREY[:0]}, InputError, "images of shape (B, C, H, W) in floating point, got (0, 1, 1, 1)"),
        ({"images": GREY * math.nan}, InputError, "finite images, got NaN or inf"),
        ({"images": GREY / 0}, InputError, "finite images, got NaN or inf"),
        ({"model": lambda_model(lambda x: x)}, InputError, "got (2, 1, 1, 1) on cpu; return one row of logits"),
        ({"model": lambda_model(lambda x: x.flatten(1).argmax(1))}, InputError, "got (2,) on cpu"),
        (
            {"model": lambda_model(lambda x: x.flatten(1))},
            InputError,
            "at least 2 classes, got one logit per image, (2, 1); read",
        ),
        ({"model": lambda_model(lambda x: x.new_zeros(1, 5))}, InputError, "shape (2, classes) with at least 2"),
        ({"model": lambda_model(lambda x: [x.flatten(1), x])}, InputError, "got list; return one row"),
        ({"model": lambda_model(lambda x: {"scores": x})}, InputError, "got dict; return one row"),
        ({"model": lambda_model(lambda x: x.flatten(1).to("meta").repeat(1, 3))}, InputError, "got (2, 3) on meta"),
        ({"model": Line(math.nan)}, InputError, "finite logits, got NaN or inf for 2 of 2 images"),
        (
            {"model": nn.Linear(7, 2)},
            InputError,
            "a model that takes images of shape (2, 1, 1, 1), torch.float32 on cpu",
        ),
        ({"model": Affine().double()}, InputError, "got RuntimeError: "),
        ({"norm": "l1"}, EstimatorError, "a norm that deepfool has (l2, linf), got l1"),
        ({"estimator": create("ddn"), "norm": "linf"}, EstimatorError, "a norm that ddn has (l2), got linf"),
        ({"estimator": create("fab"), "domain": "free"}, EstimatorError, "a domain that fab has (box), got free"),
        ({"estimator": create("foolbox:L2PGD"), "norm": "linf"}, EstimatorError, "a norm that foolbox has (l2), got"),
        ({"domain": "sphere"}, EstimatorError, "a domain that deepfool has (box, free), got sphere"),
        ({"batch_size": 0}, InputError, "batch_size of at least 1, got 0; give a whole number"),
        ({"noise_retries": -1}, InputError, "noise_retries of at least 0, got -1; give a whole"),
        ({"seeds": [1]}, InputError, "2 seeds, got shape (1,)"),
        ({"expect_over": 0}, InputError, "expected expect_over of at least 1, got 0; "),
        ({"start": GREY[:1]}, InputError, "start of shape (2, 1, 1, 1), got (1, 1, 1, 1)"),
    ],
)
def test_bad_input_gives_a_one_line_error(change: dict[str, Any], error: type[Exception], part: str) -> None:
    asked = {"model": Line(0.5), "images": GREY, "estimator": create("deepfool"), "norm": "l2"} | change
    with pytest.raises(error) as caught:
        measure(**asked)
    message = str(caught.value)
    assert re.fullmatch(r"expected [^\n]+, got [^\n]+; [^\n]+", message), message
    assert part in message


def test_the_exception_of_the_model_is_kept_as_the_cause() -> None:
    def refuse(images: Tensor) -> Tensor:
        raise ValueError("too small\nby far")

    with pytest.raises(InputError, match="got ValueError: too small; give it") as caught:
        measure(lambda_model(refuse), GREY, create("deepfool"), "l2")
    assert isinstance(caught.value.__cause__, ValueError)
