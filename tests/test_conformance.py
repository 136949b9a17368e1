"""Every named estimator x norm x oracle against exact margins, and planted estimators that must fail.

An estimator is added by a row in ``TABLE``.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import measure as judge
from attacks.estimator import Estimator, Margins, Status
from attacks.geometry import row_norm
from attacks.measure import measure
from attacks.registry import ESTIMATORS, WRAPPERS, Entry, create
from attacks.seeds import derive_seed
from attacks.types import NORMS, Domain, EstimatorError, InputError, Norm
from tests import oracles
from tests.oracles import OBLONG, Oracle

Limits = tuple[float, float]  # median and 90th percentile of distance / exact margin
FOUND = (Status.FOUND, Status.FOUND_AFTER_NOISE)


@dataclass(frozen=True)
class Row:
    """The limits of an estimator besides the ``tightness`` of its class (the median outside the box).

    Attributes:
        ninetieth: 90th percentile of distance / exact margin on affine models, the box far away.
        boxed: median and 90th percentile where the box binds.
        near: median and 90th percentile within 1e-6 to 1e-4 of the boundary, where float32 has few digits left.
        coupling: largest relative difference of distances from batches of different sizes: two of the
            bisection's last steps, or the tolerance of a radius search, which amplifies rounding to it.
        text: the settings, cheaper than the defaults where they meet the same limits.
        retries: noise retries on models without a boundary.
        marks: pytest's.
    """

    ninetieth: Mapping[Norm, float]
    boxed: Mapping[Norm, Limits]
    near: Limits = (1.05, 1.4)
    coupling: float = 2e-4
    text: str = ""
    retries: int = 6
    marks: tuple[pytest.MarkDecorator, ...] = ()


TABLE: dict[str, Row] = {
    "deepfool": Row({"l2": 1.0005, "linf": 1.0005}, {"l2": (1.0002, 1.0005), "linf": (1.0002, 1.001)}),
    "deepfool:refine=polish": Row({"l2": 1.0002, "linf": 1.0002}, {"l2": (1.0002, 1.0005), "linf": (1.0002, 1.001)}),
    "deepfool:engine=foolbox": Row({"l2": 1.0005, "linf": 1.0005}, {"l2": (1.0002, 1.0005), "linf": (1.0002, 1.001)}),
    # these three follow the runner-up class, whose boundary need not be the nearest
    "fmn": Row({"l2": 1.25, "linf": 1.2}, {"l2": (1.0005, 1.1), "linf": (1.0002, 1.1)}),
    "cw": Row({"l2": 1.25}, {"l2": (1.001, 1.1)}, retries=1),
    "pgd": Row({"l2": 1.2, "linf": 1.15}, {"l2": (1.002, 1.06), "linf": (1.002, 1.05)}, coupling=1e-2),
    "ddn": Row({"l2": 1.15}, {"l2": (1.0002, 1.02)}),
    "bb": Row(
        {"l2": 1.001, "linf": 1.005},
        {"l2": (1.0002, 1.001), "linf": (1.0005, 1.01)},
        near=(1.15, 1.8),
        marks=(pytest.mark.slow,),
    ),
    "apgd": Row({"l2": 1.04, "linf": 1.06}, {"l2": (1.002, 1.005), "linf": (1.004, 1.02)}, coupling=1e-2, retries=2),
    "fab": Row({"l2": 1.0005, "linf": 1.0005}, {"l2": (1.0002, 1.001), "linf": (1.0005, 1.003)}),
    "sdf": Row({"l2": 1.0002}, {"l2": (1.0002, 1.0006)}),
    "linear": Row({"l2": 1.0002, "linf": 1.0002}, {"l2": (1.0002, 1.0002), "linf": (1.0002, 1.0002)}),
    "cascade": Row({"l2": 1.0005, "linf": 1.0005}, {"l2": (1.0002, 1.0015), "linf": (1.0002, 1.001)}),
    "best": Row(
        {"l2": 1.0005, "linf": 1.0005},
        {"l2": (1.0002, 1.0005), "linf": (1.0002, 1.001)},
        text="best:of=deepfool+fmn:steps=20",
    ),
}

# seconds per cell: ordinarily each of them meets one oracle without and one with a binding box
COSTLY = ("cw", "apgd", "best", "pgd", "bb", "deepfool:engine=foolbox")
CHEAPEST = "linear"

UNBOXED: dict[str, Callable[[], Oracle]] = {
    "two": lambda: oracles.affine(2),
    "three": lambda: oracles.affine(3),
    "ten": lambda: oracles.affine(10),
    "oblong": lambda: oracles.affine(10, OBLONG),
    "confident": oracles.confident,
}
BOXED: dict[str, Callable[[], Oracle]] = {"two": lambda: oracles.boxed(2), "ten": lambda: oracles.boxed(10)}
OTHERS: dict[str, Callable[[], Oracle]] = {
    "thousand": lambda: oracles.affine(10, scale=1000.0),
    "double": lambda: oracles.affine(10).to(torch.float64),
    "double-boxed": lambda: oracles.boxed(10).to(torch.float64),
    "free": lambda: oracles.boxed(10, domain="free"),
    "hundred": lambda: oracles.confident(100, lead=10.0, count=32),
    "near": oracles.near,
    "flat": lambda: oracles.flat(count=32),
    "constant": oracles.constant,
    "tied": oracles.tied,
}
MAKERS = UNBOXED | {f"boxed-{name}": make for name, make in BOXED.items()} | OTHERS

# flat regions, constant classifiers and models without gradients give warnings
pytestmark = pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")


@cache
def oracle(name: str) -> Oracle:
    """An oracle, made once; `untouched` ensures that no test changes it."""
    return MAKERS[name]()


def entry_of(name: str) -> Entry:
    """The registry entry of a row, whose estimator may have other settings."""
    return ESTIMATORS[name.partition(":")[0]]


def pairs(domain: Domain = "box") -> list[Any]:
    """(name, norm) of every estimator that has the domain; those that take seconds per cell are slow."""
    return [
        pytest.param(name, norm, id=f"{name}-{norm}", marks=(pytest.mark.slow,) if name in COSTLY else ())
        for name, row in TABLE.items()
        for norm in entry_of(name).norms
        if domain in entry_of(name).domains
    ]


def alternating() -> list[Any]:
    """Every estimator in one norm, alternating; the other norm is marked slow."""
    seen: dict[str, int] = {}
    grid = []
    for pair in pairs():
        name, norm = pair.values
        first = seen.setdefault(name, len(seen)) % 2 == 0
        chosen = len(entry_of(name).norms) == 1 or (norm == "l2") == first
        grid.append(pair if chosen else pytest.param(name, norm, id=pair.id, marks=pytest.mark.slow))
    return grid


def cells(oracle_names: Collection[str]) -> list[Any]:
    """(name, norm, oracle): each pair with one oracle, each oracle with the cheapest estimator; others are slow."""
    names, grid = list(oracle_names), []
    for number, pair in enumerate(pairs()):
        name, norm = pair.values
        for which in names:
            ordinary = which == names[number % len(names)] or name == CHEAPEST
            marks = TABLE[name].marks if ordinary else (pytest.mark.slow,)
            grid.append(pytest.param(name, norm, which, id=f"{pair.id}-{which}", marks=marks))
    return grid


def build(name: str) -> Estimator:
    return create(TABLE[name].text or name)


# Requirements for every result.


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Parameters, gradients, buffers, flags and the global generators are the same afterwards."""

    def state() -> list[object]:
        modules = [module.training for module in model.modules()]
        flags = [(p.requires_grad, id(p.grad), p.device, p.dtype) for p in model.parameters()]
        generators = [random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
        return [modules, flags, generators]

    def values() -> list[Tensor]:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        tensors = [*model.parameters(), *model.buffers(), *grads, torch.get_rng_state()]
        return [t.detach().clone() for t in tensors]

    before, numbers = state(), values()
    yield
    assert state() == before, "flags, gradients or a Python generator changed"
    after = values()
    assert len(after) == len(numbers), "gradients appeared"
    assert all(torch.equal(a, b) for a, b in zip(after, numbers, strict=True)), "a tensor or torch's generator changed"


def classes(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Predictions of the original model in evaluation mode."""
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(1) for chunk in images.split(batch_size)])


def assert_honest(margins: Margins, truth: Oracle, norm: Norm, batch_size: int = 64) -> None:
    """Every status is correct, every witness has another class, and no distance is below the exact margin."""
    model, images, exact = truth.model, truth.images, truth.exact[norm]
    distance, attack_distance, witness = margins.distance, margins.attack_distance, margins.witness
    found = torch.tensor([status in FOUND for status in margins.status])
    tied = torch.tensor([status is Status.TIED for status in margins.status])
    assert all(isinstance(status, Status) for status in margins.status)
    assert distance.shape == exact.shape
    assert distance.dtype == torch.float64
    assert not distance.isnan().any()
    assert torch.equal(tied, exact == 0)
    assert (distance[tied] == 0).all()
    assert (distance[~tied] > 0).all()
    assert distance[found].isfinite().all()
    assert distance[~found & ~tied].isinf().all()
    assert (attack_distance >= distance).all()
    assert torch.equal(margins.target == -1, ~found)

    predicted = classes(model, images, batch_size)
    assert torch.equal(margins.prediction, predicted)
    assert (margins.target[found] != predicted[found]).all()
    # near the boundary the class may depend on the batch: the same batches as `measure` used
    assert torch.equal(classes(model, witness, batch_size)[found], margins.target[found])
    torch.testing.assert_close(row_norm(witness - images, norm)[found], distance[found], rtol=1e-12, atol=0)
    if truth.domain == "box":
        assert (witness >= 0).all()
        assert (witness <= 1).all()

    rounding = torch.finfo(images.dtype).eps  # of a pixel, or of logits over their slope
    relative = 1e-5 if images.dtype == torch.float32 else 1e-9
    below = exact[found] * (1 - relative) - rounding - distance[found]
    assert (below <= 0).all(), f"{int((below > 0).sum())} distances below the exact margin, by up to {below.max():.3g}"


def assert_tight(margins: Margins, truth: Oracle, norm: Norm, limits: Limits, found: float = 0.99) -> None:
    """Enough is found, and distances are near the exact margins."""
    median, ninetieth = limits
    share = float(margins.distance.isfinite().double().mean())
    assert share >= found, f"found {share:.1%}"
    ratio = margins.distance / truth.exact[norm]
    q = ratio.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64), interpolation="higher").tolist()
    assert q[0] <= median, f"median distance / exact margin is {q[0]:.4f}, more than {median}"
    assert q[1] <= ninetieth, f"90th percentile of distance / exact margin is {q[1]:.4f}, more than {ninetieth}"


def assert_conforms(
    estimator: Estimator, truth: Oracle, norm: Norm, limits: Limits, *, batch_size: int = 64, **options: Any
) -> Margins:
    """The checks of the suite, for good and for planted estimators."""
    with untouched(truth.model):
        margins = measure(
            truth.model, truth.images, estimator, norm, domain=truth.domain, batch_size=batch_size, **options
        )
    assert_honest(margins, truth, norm, batch_size)
    assert_tight(margins, truth, norm, limits)
    return margins


# The table itself.


def test_table_covers_the_registry() -> None:
    assert {name.partition(":")[0] for name in TABLE} == set(ESTIMATORS) - set(WRAPPERS)


@pytest.mark.parametrize("name", TABLE)
def test_registry_states_what_the_class_can_do(name: str) -> None:
    entry, estimator = entry_of(name), create(name)
    module, _, attribute = entry.target.partition(":")
    assert type(getattr(estimator, "inner", estimator)) is getattr(importlib.import_module(module), attribute)
    assert estimator.name == name.partition(":")[0]
    assert estimator.norms == set(entry.norms)
    assert estimator.domains == set(entry.domains)
    row = TABLE[name]
    assert set(estimator.tightness) == set(row.ninetieth) == set(row.boxed) == estimator.norms


@pytest.mark.parametrize("name", TABLE)
def test_declared_limits_are_within_the_contract(name: str) -> None:
    assert all(1 <= limit <= 1.05 for limit in create(name).tightness.values())
    assert all(1 <= limit <= 1.4 for limit in TABLE[name].ninetieth.values())


# Exact margins.


@pytest.mark.parametrize(("name", "norm", "which"), cells(UNBOXED))
def test_affine(name: str, norm: Norm, which: str) -> None:
    estimator = build(name)
    assert_conforms(estimator, oracle(which), norm, (estimator.tightness[norm], TABLE[name].ninetieth[norm]))


@pytest.mark.parametrize(("name", "norm", "which"), cells(BOXED))
def test_affine_where_the_box_binds(name: str, norm: Norm, which: str) -> None:
    assert_conforms(build(name), oracle(f"boxed-{which}"), norm, TABLE[name].boxed[norm])


@pytest.mark.parametrize(("name", "norm"), pairs("free"))
def test_free_domain(name: str, norm: Norm) -> None:
    estimator, truth = build(name), oracle("free")
    margins = assert_conforms(estimator, truth, norm, (estimator.tightness[norm], TABLE[name].ninetieth[norm]))
    outside = ((margins.witness < 0) | (margins.witness > 1)).flatten(1).any(1)
    assert outside.double().mean() > 0.9
    assert (truth.exact[norm] < oracle("boxed-ten").exact[norm]).double().mean() > 0.9


@pytest.mark.parametrize("which", [pytest.param("double", marks=pytest.mark.slow), "double-boxed"])
@pytest.mark.parametrize(("name", "norm"), alternating())
def test_float64(name: str, norm: Norm, which: str) -> None:
    estimator, row = build(name), TABLE[name]
    limits = row.boxed[norm] if "boxed" in which else (estimator.tightness[norm], row.ninetieth[norm])
    assert assert_conforms(estimator, oracle(which), norm, limits).witness.dtype == torch.float64


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_thousandfold_logits_change_no_margin(name: str, norm: Norm) -> None:
    """Where the softmax is exactly one-hot in float32."""
    estimator, row = build(name), TABLE[name]
    limits = (estimator.tightness[norm], row.ninetieth[norm])
    thousand = assert_conforms(estimator, oracle("thousand"), norm, limits).distance
    once = assert_conforms(estimator, oracle("ten"), norm, limits).distance
    apart = (thousand / once).log().abs().exp()
    assert apart.median() <= estimator.tightness[norm]
    assert apart.quantile(0.9) <= max(estimator.tightness[norm], 1.005)


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_images_at_the_boundary(name: str, norm: Norm) -> None:
    """No estimator may get stuck just inside the boundary and return a distant witness."""
    assert_conforms(build(name), oracle("near"), norm, TABLE[name].near)


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_one_of_a_hundred_classes_far_ahead(name: str, norm: Norm) -> None:
    """The logit gap is large and the softmax nearly one-hot: no estimator may need noise retries."""
    margins = assert_conforms(build(name), oracle("hundred"), norm, (1.15, 1.5))
    assert set(margins.status) == {Status.FOUND}


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_wrong_predictions_and_permuted_classes(name: str, norm: Norm) -> None:
    """With labels of the first model every prediction of the second is wrong: no margin changes."""
    estimator, row, truth = build(name), TABLE[name], oracle("ten").head(32)
    order = torch.tensor([3, 7, 1, 0, 9, 2, 8, 4, 6, 5])
    weight, bias = truth.model.linear.weight.detach(), truth.model.linear.bias.detach()
    permuted = replace(truth, model=oracles.Affine(weight[order], bias[order]))
    limits = (estimator.tightness[norm], row.ninetieth[norm])
    first = assert_conforms(estimator, truth, norm, limits)
    second = assert_conforms(estimator, permuted, norm, limits)
    assert torch.equal(order[second.prediction], first.prediction)
    assert (second.prediction != first.prediction).all()
    torch.testing.assert_close(second.distance, first.distance, rtol=row.coupling, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("name", "norm"), alternating())
def test_batches(name: str, norm: Norm, dtype: torch.dtype) -> None:
    """Batches of one, of seven, of all images and in reverse order give the same margins."""
    estimator, row, truth = build(name), TABLE[name], oracle("ten").head(14).to(dtype)
    seeds = torch.tensor([derive_seed("image", i) for i in range(14)])
    reverse = replace(truth, images=truth.images.flip(0), exact={n: v.flip(0) for n, v in truth.exact.items()})
    limits = (estimator.tightness[norm], row.ninetieth[norm])
    whole = assert_conforms(estimator, truth, norm, limits).distance
    sevens = assert_conforms(estimator, truth, norm, limits, batch_size=7).distance
    alone = assert_conforms(estimator, truth.head(2), norm, (1.05, 1.4), batch_size=1).distance
    back = assert_conforms(estimator, reverse, norm, limits, seeds=seeds.flip(0)).distance.flip(0)
    tolerance = row.coupling if estimator.batch_invariant else 1e-2
    for other in (sevens, alone, back):
        torch.testing.assert_close(other, whole[: len(other)], rtol=tolerance, atol=1e-8)


# Models with few or no witnesses.


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_flat_regions(name: str, norm: Norm) -> None:
    """The gradient is exactly 0 at every image: noise retries find a witness, or the status is not found."""
    truth = oracle("flat")
    with untouched(truth.model):
        margins = measure(truth.model, truth.images, build(name), norm, noise_retries=TABLE[name].retries)
    assert_honest(margins, truth, norm)


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_constant_classifier(name: str, norm: Norm) -> None:
    truth = oracle("constant")
    with untouched(truth.model):
        margins = measure(truth.model, truth.images, build(name), norm, noise_retries=TABLE[name].retries)
    assert_honest(margins, truth, norm)
    assert set(margins.status) == {Status.NOT_FOUND}
    assert margins.distance.isinf().all()


class Deaf(nn.Module):
    """Logits without a gradient to the image."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([0.0, 2.0, 1.0]).repeat(len(images), 1)


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_model_without_gradients(name: str, norm: Norm) -> None:
    if "refine=polish" in name:
        with pytest.raises(InputError, match="got logits that do not depend on the image"):
            measure(Deaf(), oracles.grey_images(3), build(name), norm)
        return
    margins = measure(Deaf(), oracles.grey_images(3), build(name), norm, noise_retries=1)
    assert set(margins.status) <= {Status.FAILED, Status.NOT_FOUND}
    assert margins.distance.isinf().all()


@pytest.mark.parametrize(("name", "norm"), alternating())
def test_ties(name: str, norm: Norm) -> None:
    truth = oracle("tied")
    with untouched(truth.model):
        margins = measure(truth.model, truth.images, build(name), norm)
    assert_honest(margins, truth, norm)
    assert margins.status[0::2] == (Status.TIED,) * 4
    assert margins.status[1::2] == (Status.FOUND,) * 4
    assert (margins.distance[1::2] <= 1.05 * truth.exact[norm][1::2]).all()


# Estimators that must fail, and the checks that detect them.


@dataclass(frozen=True)
class Planted:
    """An estimator with arbitrary declarations."""

    propose: Callable[[nn.Module, Tensor, Tensor, Norm], Tensor]
    name: str = "planted"
    norms: frozenset[Norm] = frozenset(NORMS)
    domains: frozenset[Domain] = frozenset({"box"})
    tightness: Mapping[Norm, float] = field(default_factory=dict)
    batch_invariant: bool = True

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        return self.propose(model, images, labels, norm)


LIMITS: Limits = (1.05, 1.4)


def exact_step(images: Tensor, norm: Norm, factor: float = 1.0) -> Tensor:
    """``factor`` times the shortest perturbation to the boundary of oracle "two"."""
    model, exact = oracle("two").model, oracle("two").exact[norm]
    normal = (model.weight[1] - model.weight[0]).view_as(images[0])
    unit = normal.sign() if norm == "linf" else normal / normal.norm()
    towards = 1.0 - 2.0 * classes(model, images, 64).double()
    return (factor * towards * exact[: len(images)]).view(-1, 1, 1, 1) * unit


def oblique_step(images: Tensor, norm: Norm) -> Tensor:
    """A witness just across the boundary at 1.5 times the margin, which bisection towards the image cannot improve."""
    step = exact_step(images, norm, 1.001)
    normal = step.flatten(1)
    if norm == "l2":
        across = torch.randn_like(normal)
        across -= (across * normal).sum(1, keepdim=True) / normal.square().sum(1, keepdim=True) * normal
        across *= (1.5**2 - 1) ** 0.5 * normal.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
        return step + across.view_as(step)
    # L-infinity: two thirds of the slope in pixels that move 1.5 times as far, the rest stay
    model = oracle("two").model
    share, order = (model.weight[1] - model.weight[0]).abs().sort(descending=True)
    kept = order[share.cumsum(0) <= (2 / 3 + 0.03) * share.sum()]
    result = torch.zeros_like(normal)
    result[:, kept] = 1.5 * normal[:, kept]
    return result.view_as(step)


@pytest.mark.parametrize("norm", NORMS)
def test_control_exact_steps_pass(norm: Norm) -> None:
    """The exact step passes, so the controls below fail because of their defect only."""
    planted = Planted(lambda model, images, labels, norm: images + exact_step(images, norm, 1.001))
    assert_conforms(planted, oracle("two"), norm, LIMITS)


@pytest.mark.parametrize("norm", NORMS)
def test_control_clean_images(norm: Norm) -> None:
    planted = Planted(lambda model, images, labels, norm: images)
    with pytest.raises(AssertionError, match=r"found 0\.0%"):
        assert_conforms(planted, oracle("two"), norm, LIMITS, noise_retries=0)


@pytest.mark.parametrize("norm", NORMS)
def test_control_witnesses_half_too_far(norm: Norm) -> None:
    planted = Planted(lambda model, images, labels, norm: images + oblique_step(images, norm))
    with pytest.raises(AssertionError, match=r"median distance / exact margin is 1\.[45]"):
        assert_conforms(planted, oracle("two"), norm, LIMITS)


@pytest.mark.parametrize("norm", NORMS)
def test_control_witnesses_half_too_far_along_the_segment(norm: Norm) -> None:
    """`measure` refines it along the segment; the attack's own distance reveals it."""
    planted = Planted(lambda model, images, labels, norm: images + exact_step(images, norm, 1.5))
    truth = oracle("two")
    margins = assert_conforms(planted, truth, norm, LIMITS)
    torch.testing.assert_close(margins.attack_distance, 1.5 * truth.exact[norm], rtol=1e-3, atol=1e-7)
    with pytest.raises(AssertionError, match=r"median distance / exact margin is 1\.5"):
        assert_tight(replace(margins, distance=margins.attack_distance), truth, norm, LIMITS)


@pytest.mark.parametrize("norm", NORMS)
def test_control_short_of_the_boundary(norm: Norm) -> None:
    planted = Planted(lambda model, images, labels, norm: images + exact_step(images, norm, 0.99))
    with pytest.raises(AssertionError, match=r"found 0\.0%"):
        assert_conforms(planted, oracle("two"), norm, LIMITS, noise_retries=0)


@pytest.mark.parametrize("norm", NORMS)
def test_control_nan(norm: Norm) -> None:
    planted = Planted(lambda model, images, labels, norm: torch.full_like(images, float("nan")))
    with pytest.raises(AssertionError, match=r"found 0\.0%"):
        assert_conforms(planted, oracle("two"), norm, LIMITS, noise_retries=0)


@pytest.mark.parametrize("norm", NORMS)
def test_control_outside_of_the_box(norm: Norm) -> None:
    """Candidates are clipped before they are judged."""
    truth = oracle("boxed-two")
    normal = (truth.model.weight[1] - truth.model.weight[0]).view_as(truth.images[0])
    towards = (1.0 - 2.0 * classes(truth.model, truth.images, 64)).view(-1, 1, 1, 1)
    margins = measure(truth.model, truth.images, Planted(lambda m, x, y, n: x + 100 * towards * normal), norm)
    assert_honest(margins, truth, norm)
    assert margins.distance.isfinite().any()
    beyond = truth.images - truth.images.round() * 0.5 - 0.5  # pixels fall below 0
    with pytest.raises(AssertionError):
        assert_honest(replace(margins, witness=beyond, distance=row_norm(beyond - truth.images, norm)), truth, norm)


def test_control_wrong_shape() -> None:
    planted = Planted(lambda model, images, labels, norm: images[:1])
    with pytest.raises(EstimatorError, match="expected witnesses of shape"):
        assert_conforms(planted, oracle("two"), "l2", LIMITS)


@pytest.mark.parametrize("part", ["distance", "witness", "target", "status"])
def test_control_results_that_a_judge_could_get_wrong(part: str) -> None:
    truth = oracle("two")
    margins = assert_conforms(build("deepfool"), truth, "l2", LIMITS)
    assert_honest(margins, truth, "l2")
    far = truth.images + exact_step(truth.images, "l2", 0.9).float()
    wrong = {
        "distance": 0.99 * margins.distance,
        "witness": far,  # not across
        "target": margins.prediction,
        "status": (Status.NOT_FOUND, *margins.status[1:]),
    }
    with pytest.raises(AssertionError):
        assert_honest(replace(margins, **{part: wrong[part]}), truth, "l2")
    if part == "witness":
        with pytest.raises(AssertionError):
            assert_honest(replace(margins, witness=far, distance=row_norm(far - truth.images, "l2")), truth, "l2")


def own_oracle() -> Oracle:
    """An oracle whose model may be changed."""
    return oracles.affine(2)


def test_control_writes_gradients() -> None:
    """Through its own reference to the caller's model, which no view can prevent."""
    truth = own_oracle()

    def propose(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        truth.model(images).sum().backward()
        return images + exact_step(images, norm, 1.001)

    with pytest.raises(AssertionError, match="gradient"):
        assert_conforms(Planted(propose), truth, "l2", LIMITS)


def test_gradients_written_through_the_view_stay_there() -> None:
    def propose(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        leaf = images.clone().requires_grad_()
        model(leaf).sum().backward()
        assert leaf.grad is not None
        return images + exact_step(images, norm, 1.001)

    assert_conforms(Planted(propose), oracle("two"), "l2", LIMITS)


def reseed(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    return images + exact_step(images, norm, 1.001)


def test_control_reseeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` restores the generators; without that, the suite detects the change."""
    assert_conforms(Planted(reseed), oracle("two"), "l2", LIMITS)
    monkeypatch.setattr(judge, "forked_generators", contextlib.nullcontext)
    with pytest.raises(AssertionError, match="generator"):
        assert_conforms(Planted(reseed), oracle("two"), "l2", LIMITS)


def test_control_reseeds_outside_the_isolation() -> None:
    """In a property that is read before the generators are saved."""

    class Reseeding:
        name, domains, tightness, batch_invariant = "planted", frozenset({"box"}), dict[Norm, float](), True
        perturb = Planted(lambda model, images, labels, norm: images + exact_step(images, norm, 1.001)).perturb

        @property
        def norms(self) -> frozenset[Norm]:
            torch.manual_seed(7)
            return frozenset(NORMS)

    with pytest.raises(AssertionError, match="torch's generator"):
        assert_conforms(Reseeding(), oracle("two"), "l2", LIMITS)


@pytest.mark.parametrize("spoil", ["flag", "buffer", "parameter", "python", "numpy", "torch"])
def test_control_every_part_of_the_isolation_check(spoil: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2)).eval()

    def change() -> None:
        if spoil == "flag":
            model[1].train()
        elif spoil == "buffer":
            model[1].running_mean += 1
        elif spoil == "parameter":
            with torch.no_grad():
                model[2].bias += 1
        elif spoil == "python":
            random.random()
        elif spoil == "numpy":
            np.random.rand()  # noqa: NPY002
        else:
            torch.rand(1)

    with untouched(model):
        model(oracles.grey_images(3))
    with pytest.raises(AssertionError), untouched(model):
        change()


def test_estimators_get_the_predicted_class() -> None:
    """No label of the caller enters a margin."""
    seen = []

    def propose(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        seen.append(labels)
        return images + exact_step(images, norm, 1.001)

    truth = oracle("two")
    assert_conforms(Planted(propose), truth, "l2", LIMITS)
    assert torch.equal(seen[0], classes(truth.model, truth.images, 64))
