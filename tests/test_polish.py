"""Polished witnesses: never farther, and equal to known exact margins, in both norms and domains.

The controls at the end plant a wrong polish, which the same checks must detect.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from attacks import polish
from attacks.affine import affine_margins
from attacks.certify.exact import exact_margins
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.regions import newton, walk
from attacks.certify.regions.cells import Cells, Passes, cells_at
from attacks.certify.regions.faces import Task
from attacks.certify.regions.newton import nearest_moves
from attacks.certify.regions.walk import nearest_boundary
from attacks.estimator import Margins, Status
from attacks.geometry import row_norm
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.polish import Polished
from attacks.registry import create, text_form
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, InputError, Norm
from harness.tracking.manifest import describe
from tests import oracles
from tests.grids import covering
from tests.test_exact import trained

FREE = (-math.inf, math.inf)
COUNT = 24


@cache
def network(widths: tuple[int, ...]) -> nn.Sequential:
    return trained(widths)


@cache
def images() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images[1500 : 1500 + COUNT] / 16, dtype=torch.float32)[:, None]


@cache
def measured(widths: tuple[int, ...], text: str, norm: Norm, domain: Domain = "box") -> Margins:
    return measure(network(widths), images(), create(text), norm, domain=domain)


def cnn(pool: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)]
    if pool is not None:
        layers.append(pool)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 5))
    model(torch.rand(8, 1, 8, 8))
    return model.eval().requires_grad_(False)


def task(model: nn.Module, points: Tensor, labels: Tensor, norm: Norm, limits: tuple[float, float]) -> Task:
    read = PiecewiseNetwork(model, tuple(points.shape[1:]), points.device)
    return Task(read, points.double(), labels, norm, limits, torch.arange(len(points)), Passes.none(points))


# --- the solver ---


@pytest.mark.parametrize("limits", [(-0.4, 0.6), FREE], ids=["box", "free"])
@pytest.mark.parametrize("norm", NORMS)
def test_moves_have_least_norm(norm: Norm, limits: tuple[float, float]) -> None:
    """The dual weights prove optimality: by weak duality, the dual problem has the same value."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 7, 30, generator=generator, dtype=torch.float64)
    inside = 0.2 * torch.randn(20, 30, generator=generator, dtype=torch.float64)
    gaps = (rows @ inside[..., None])[..., 0] - 0.02
    low, high = (torch.full((20, 30), limit, dtype=torch.float64) for limit in limits)
    known = row_norm(inside, norm)
    solution = nearest_moves(
        rows, gaps, low, high, norm, start=torch.zeros_like(gaps), known=known, softness=(*newton.FAST, *newton.SHARP)
    )
    assert solution.solved.all()
    length = row_norm(solution.moves, norm)
    assert ((gaps - (rows @ solution.moves[..., None])[..., 0]) <= 1e-7).all()
    assert ((solution.moves >= low) & (solution.moves <= high)).all()
    pull = (solution.weights[:, None] @ rows)[:, 0]
    gain = (solution.weights * gaps).sum(1)
    if norm == "l2":
        best = pull.clamp(low, high)
        bound = (2 * (gain - (best * (pull - best / 2)).sum(1))).sqrt()
    else:
        # with weights of dual norm 1 a perturbation of length t gains at most t; pixels at their bounds count apart
        held = torch.where(solution.moves.abs() < length[:, None] * (1 - 1e-9), pull * solution.moves, 0.0).sum(1)
        bound = (gain - held) / torch.where(solution.moves.abs() >= length[:, None] * (1 - 1e-9), pull.abs(), 0.0).sum(
            1
        )
    torch.testing.assert_close(length, bound, rtol=1e-4, atol=0)


def test_an_infeasible_problem_has_no_solution() -> None:
    rows = torch.stack([torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)])
    gaps = torch.tensor([[2.0, 0.0], [0.1, 0.1]], dtype=torch.float64)
    low, high = -torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    for norm in NORMS:
        solution = nearest_moves(
            rows, gaps, low, high, norm, start=torch.zeros_like(gaps), known=torch.ones(2, dtype=torch.float64)
        )
        assert solution.solved.tolist() == [False, True]


# --- regions ---


def test_functionals_equal_the_network_in_the_region() -> None:
    model, points = cnn(), images()[:6].double()
    labels = model.double()(points).argmax(1)
    read = PiecewiseNetwork(model, (1, 8, 8), points.device)
    cells = cells_at(read, points, labels, torch.arange(6), Passes.none(points))
    values = cells.values(points)
    logits = model(points)
    torch.testing.assert_close(values[:, cells.units :], logits - logits.gather(1, labels[:, None]))
    assert (values[:, : cells.units] >= 0).all()
    numbers = torch.randint(0, values.shape[1], (6,))
    rows = cells.rows(torch.arange(6), numbers)
    moved = points + 1e-3 * torch.randn_like(points)
    change = (rows * (moved - points).flatten(1)).sum(1)
    torch.testing.assert_close(
        cells.values(moved).gather(1, numbers[:, None])[:, 0] - values.gather(1, numbers[:, None])[:, 0], change
    )


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_affine_models(norm: Norm, domain: Domain) -> None:
    linear = nn.Linear(64, 5)
    model = nn.Sequential(nn.Flatten(), linear).requires_grad_(False)
    exact = affine_margins(linear.weight, linear.bias, images(), norm, domain=domain)
    far = measure(model, images(), create("fmn"), norm, domain=domain)
    limits = (0.0, 1.0) if domain == "box" else FREE
    ends = nearest_boundary(task(model, images(), far.prediction, norm, limits), far.witness.double())
    torch.testing.assert_close(row_norm(ends - images().double(), norm), exact, rtol=1e-6, atol=0)


# --- against exact margins ---


def assert_polished(model: nn.Module, far: Margins, norm: Norm, domain: Domain) -> None:
    """No distance is below the exact margin or beyond the unpolished one; most are exact and all are on average."""
    near = measure(model, images(), create("deepfool:refine=polish"), norm, domain=domain)
    exact = exact_margins(model, images(), norm, domain=domain, witnesses=near.witness, seconds=2)
    solved = exact.solved
    assert solved.double().mean() > 0.8
    ratio = (near.distance / exact.margin)[solved]
    assert (near.distance <= far.distance * (1 + 2e-4)).all()
    assert (near.distance >= exact.lower * (1 - 1e-6)).all()
    assert (ratio <= 1 + 1e-3).double().mean() >= 0.75
    assert ratio.mean() <= 1.005


@pytest.mark.parametrize("widths", [(32,), pytest.param((12, 12), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("norm", "domain"), covering(NORMS, DOMAINS))
def test_exact_margins_are_reached(norm: Norm, domain: Domain, widths: tuple[int, ...]) -> None:
    far = measured(widths, "deepfool", norm, domain)
    assert_polished(network(widths), far, norm, domain)


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_max_pooling(norm: Norm) -> None:
    model = cnn(nn.MaxPool2d(2))
    points = images()[:12]
    plain, near = (measure(model, points, create(text), norm) for text in ("deepfool", "deepfool:refine=polish"))
    exact = exact_margins(model, points, norm, witnesses=near.witness, nodes=1000)
    ratio = (near.distance / exact.upper)[exact.solved]
    assert exact.solved.double().mean() > 0.7
    assert (near.distance >= exact.lower * (1 - 1e-6)).all()
    before = (plain.distance / exact.upper)[exact.solved]
    # more of them end in the nearest local minimum
    assert (ratio <= 1.001).sum() >= (before <= 1.001).sum() + 2
    assert ratio.mean() < 0.98 * before.mean()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_convolutional_network_with_other_pixel_bounds(norm: Norm) -> None:
    model = nn.Sequential(cnn())
    plain = measure(model, 4 * images() - 2, create("deepfool"), norm, bounds=(-2.0, 2.0))
    near = measure(model, 4 * images() - 2, create("deepfool:refine=polish"), norm, bounds=(-2.0, 2.0))
    assert near.status == plain.status
    assert (near.distance <= plain.distance * (1 + 2e-4)).all()
    assert (near.distance < 0.99 * plain.distance).any()
    assert (near.backwards > plain.backwards).all()


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch() -> None:
    whole = measured((12, 12), "deepfool:refine=polish", "linf")
    for row in (0, 7):
        alone = measure(network((12, 12)), images()[row : row + 1], create("deepfool:refine=polish"), "linf")
        torch.testing.assert_close(alone.distance[0], whole.distance[row], rtol=2e-4, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_rounding_loses_no_image_near_the_boundary(norm: Norm) -> None:
    """In another batch, a point just beyond the boundary may have the original class."""
    truth = oracles.near()
    margins = measure(truth.model, truth.images, create("deepfool:refine=polish"), norm, noise_retries=0)
    plain = measure(truth.model, truth.images, create("deepfool"), norm, noise_retries=0)
    assert margins.status == plain.status


@pytest.mark.parametrize("norm", NORMS)
def test_searches_without_improvement_return_their_start(norm: Norm) -> None:
    far = measured((12, 12), "deepfool", norm)
    problem = task(network((12, 12)), images(), far.prediction, norm, (0.0, 1.0))
    points = far.witness.double()
    assert torch.equal(walk.local_minima(problem, points, torch.zeros(COUNT).double()), points)


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_rows_without_a_witness_stay_unchanged() -> None:
    truth = oracles.constant()
    margins = measure(truth.model, truth.images, create("deepfool:refine=polish"), "l2", noise_retries=0)
    assert set(margins.status) == {Status.NOT_FOUND}


# --- the text form ---


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("deepfool:refine=polish", "deepfool:refine=polish"),
        ("fmn:refine=polish,steps=200", "fmn:steps=200,refine=polish"),
        ("fmn:steps=200,refine=segment", "fmn:steps=200"),
        ("foolbox:L2PGD:refine=polish", "foolbox:L2PGD:refine=polish"),
        ("foolbox:L2PGD:steps=5,refine=polish", "foolbox:L2PGD:steps=5,refine=polish"),
        (
            "best:of=fmn:refine=polish/steps=9+apgd,refine=polish",
            "best:of=fmn:steps=9/refine=polish+apgd,refine=polish",
        ),
    ],
)
def test_the_text_form_is_canonical(text: str, canonical: str) -> None:
    assert text_form(create(text)) == canonical
    assert create(canonical) == create(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fmn:refine=smooth", "expected refine=segment or refine=polish, got 'smooth'; choose one of them"),
        ("fmn:refine=", "expected refine=segment or refine=polish, got ''"),
        (
            "fmn:warm=100,refine=polish",
            "expected refine=polish of an estimator without warm starts, got fmn with warm=100",
        ),
        ("fmn:refine=polish,refine=polish", "write each once"),
    ],
)
def test_settings_that_cannot_run_are_refused(text: str, message: str) -> None:
    with pytest.raises(EstimatorError) as caught:
        create(text)
    assert message in str(caught.value)


def test_a_polished_estimator_has_the_attributes_of_the_inner_one() -> None:
    inner, outer = create("apgd"), create("apgd:refine=polish")
    for attribute in ("name", "norms", "domains", "tightness", "batch_invariant"):
        assert getattr(outer, attribute) == getattr(inner, attribute)
    (entry,) = json.loads(json.dumps(describe({text_form(outer): outer})))
    assert entry["estimator"] == "apgd:refine=polish"
    assert entry["parameters"] == {"inner": json.loads(json.dumps(dataclasses.asdict(inner)))}  # type: ignore[call-overload]
    with pytest.raises(EstimatorError, match="refine=polish once"):
        Polished(inner=outer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "named"),
    [(nn.Sequential(nn.Flatten(), nn.Sigmoid()), "Sigmoid"), (nn.MaxPool2d(2, ceil_mode=True), "MaxPool")],
    ids=["sigmoid", "pool"],
)
def test_unsupported_networks_are_refused_and_best_skips_polishing(layer: nn.Module, named: str) -> None:
    model = cnn(layer)
    with pytest.raises(InputError, match=named):
        measure(model, images()[:2], create("deepfool:refine=polish"), "l2")
    left = measure(model, images()[:4], create("best:of=deepfool+fmn"), "l2")
    plain = measure(model, images()[:4], create("best:of=deepfool+fmn,polish=false"), "l2")
    assert torch.equal(left.distance, plain.distance)
    assert left.message == plain.message


@pytest.mark.slow
def test_best_polishes_its_members() -> None:
    margins = measured((12, 12), "best:of=deepfool+fmn", "l2")
    each = [measured((12, 12), f"{name}:refine=polish", "l2") for name in ("deepfool", "fmn")]
    torch.testing.assert_close(margins.distance, torch.stack([m.distance for m in each]).amin(0), rtol=2e-4, atol=0)
    assert set(margins.message) <= {"deepfool:refine=polish", "fmn:refine=polish"}


# --- controls ---


@pytest.mark.slow
def test_control_without_the_confirmation_step_points_are_not_witnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's points lie on the boundary; without the step beyond it verification finds no witness."""

    def believed(model: object, x: Tensor, labels: Tensor, witness: Tensor, points: Tensor, norm: Norm) -> Tensor:
        return (x + 0.99 * (points - x)).to(x)

    monkeypatch.setattr(polish, "_confirmed", believed)
    with pytest.raises(AssertionError):
        assert_polished(network((12, 12)), measured((12, 12), "deepfool", "l2"), "l2", "box")


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["rows", "starts"])
def test_control_wrong_parts_are_detected(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients with the wrong sign, or no walks: the result is still an upper bound, but not exact."""
    if spoil == "rows":
        right = Cells.rows
        monkeypatch.setattr(Cells, "rows", lambda self, regions, numbers: -right(self, regions, numbers))
    else:
        monkeypatch.setattr(walk, "CLASSES", 0)
    with pytest.raises(AssertionError):
        assert_polished(network((12, 12)), measured((12, 12), "deepfool", "linf"), "linf", "box")


@pytest.mark.parametrize("norm", NORMS)
def test_walks_never_increase_the_distance(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "CLASSES", 0)
    hopped = measure(network((32,)), images(), create("deepfool:refine=polish"), norm)
    monkeypatch.setattr(walk, "REGIONS", 0)
    still = measure(network((32,)), images(), create("deepfool:refine=polish"), norm)
    assert (hopped.distance <= still.distance * (1 + 2e-4)).all()
    assert (hopped.distance < still.distance * 0.999).any()


def test_the_view_counts_passes_charged_from_outside() -> None:
    model, points = network((12, 12)), images()[:3]
    with frozen_view(model, (0.0, 1.0), "box", points.device) as view:
        view.start_chunk(3)
        with view.rows(torch.tensor([2, 0])):
            view.charge(torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double())
        assert view.forwards.tolist() == [2.0, 0.0, 1.0]
        assert view.backwards.tolist() == [4.0, 0.0, 3.0]
