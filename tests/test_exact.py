"""Exact margins of ReLU networks: checks by closed forms, patterns, integer programs, attacks and samples.

The controls at the end plant a wrong solver, which the same checks must detect.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.certify.branch_and_bound import cache as cached
from attacks.certify.branch_and_bound import tree
from attacks.certify.branch_and_bound.relu_network import ReluNetwork, read_network
from attacks.certify.branch_and_bound.search import Search
from attacks.certify.exact import ExactMargins, exact_margins
from attacks.geometry import row_norm
from attacks.measure import measure
from attacks.registry import create
from attacks.types import DOMAINS, NORMS, Domain, InputError, Norm, UnsoundError
from tests import oracles
from tests.brute_force import FREE, brute_force, lines_of_low_chords, tiny
from tests.grids import covering
from tests.milp import linf_margin

GAP = 1e-6


def trained(widths: tuple[int, ...], epochs: int = 15) -> nn.Sequential:
    """A dense network of digits, trained for a second."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:1500, None], torch.tensor(data.target)[:1500]
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise((64, *widths, 10)):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    network = nn.Sequential(*modules[:-1])
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for batch in torch.randperm(1500).split(100) * epochs:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shallow() -> nn.Sequential:
    return trained((32,))


@pytest.fixture(scope="module")
def deep() -> nn.Sequential:
    return trained((12, 12))


@pytest.fixture(scope="module")
def digits(trained_digits: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
    return trained_digits[1]


# --- independently known margins ---


@pytest.mark.parametrize(
    "bounds",
    [(-1.0, 2.0), *(pytest.param(bounds, marks=pytest.mark.slow) for bounds in ((0.0, 1.0), (0.0, 255.0)))],
    ids=str,
)
@pytest.mark.parametrize(("norm", "domain"), covering(NORMS, DOMAINS))
def test_affine_models(norm: Norm, domain: Domain, bounds: tuple[float, float]) -> None:
    low, high = bounds
    model, images = oracles.affine_model(5, spread=4.0), oracles.inked_images(12)
    # the oracle's images and weights in other pixel bounds
    with torch.no_grad():
        model.linear.weight /= high - low
        model.linear.bias += model.linear.weight.sum(1) * (0.5 - (low + high) / 2)
    images = low + (high - low) * images
    solved = exact_margins(model, images, norm, domain=domain, bounds=bounds)
    expected = affine_margins(model.weight, model.bias, images, norm, domain=domain, bounds=bounds)
    assert solved.solved.all()
    torch.testing.assert_close(solved.margin, expected, rtol=2 * GAP, atol=0)
    assert (solved.lower <= expected * (1 + 1e-9)).all()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_images_without_a_boundary_and_on_the_boundary(norm: Norm, domain: Domain) -> None:
    nowhere = oracles.constant()
    solved = exact_margins(nowhere.model, nowhere.images, norm, domain=domain)
    assert torch.isinf(solved.margin).all()
    torch.testing.assert_close(solved.witness, nowhere.images.double(), rtol=0, atol=0)
    edge = oracles.tied()
    solved = exact_margins(edge.model, edge.images, norm, domain=domain)
    assert (solved.margin[::2] == 0).all()
    torch.testing.assert_close(solved.margin, edge.exact[norm], rtol=2 * GAP, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_margins_behind_a_region_of_constant_logits(norm: Norm) -> None:
    flat = oracles.flat(count=6)
    solved = exact_margins(flat.model, flat.images, norm, domain="free")
    # the oracle's edge and depth are float32 numbers, its margins are not
    torch.testing.assert_close(solved.margin, flat.exact[norm][:6], rtol=1e-5, atol=0)


def disagreements(norm: Norm, domain: Domain, seeds: range = range(5)) -> int:
    """How many margins of tiny networks differ from brute force over patterns; a raised alarm counts."""
    wrong = 0
    for seed, widths in itertools.product(seeds, ((3, 5, 3), (3, 3, 3, 3))):
        model = tiny(seed, *widths)
        images = torch.rand(1, 1, 1, widths[0], generator=torch.Generator().manual_seed(seed)).double()
        point = images.flatten().numpy()
        low, high = (-point, 1 - point) if domain == "box" else (np.full_like(point, -FREE), np.full_like(point, FREE))
        try:
            solved = exact_margins(model, images, norm, domain=domain)
        except UnsoundError:
            wrong += 1
            continue
        expected = brute_force(model, point, norm, low, high)
        # without a boundary, the free domain is searched up to a limit only
        if math.isinf(expected) and domain == "free":
            wrong += bool(solved.upper.item() < FREE)
        elif solved.margin.item() != pytest.approx(expected, rel=1e-5):
            wrong += 1
    return wrong


@pytest.mark.parametrize("domain", ["box", pytest.param("free", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_margins_match_every_activation_pattern(norm: Norm, domain: Domain) -> None:
    assert disagreements(norm, domain) == 0


def program_disagreements(model: nn.Module, images: Tensor, result: ExactMargins) -> int:
    """How many L-infinity margins HiGHS does not confirm."""
    network, wrong = read_network(model, tuple(images.shape[1:])), 0
    for image, lower, upper in zip(images, result.lower.tolist(), result.upper.tolist(), strict=True):
        point = image.double().flatten().numpy()
        program = linf_margin(network, point, -point, 1 - point, reach=1.05 * upper)
        agrees = program.upper == pytest.approx(upper, rel=1e-5) and program.lower == pytest.approx(lower, rel=1e-5)
        wrong += not agrees
    return wrong


@pytest.mark.slow
def test_margins_match_integer_programs_on_trained_networks(
    shallow: nn.Module, deep: nn.Module, digits: Tensor
) -> None:
    for model, count in ((shallow, 8), (deep, 3)):
        images = digits[:count]
        assert program_disagreements(model, images, exact_margins(model, images, "linf")) == 0


class WithOffset(nn.Module):
    def __init__(self, inner: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.inner, self.offset = inner, offset

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images) + self.offset
        return logits


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.first(images.flatten(1)), 0.2)
        logits: Tensor = self.last(x - self.second(x).relu())
        return logits


def pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [pooling, Residual])
def test_pooling_and_residual_networks(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(2)
    raw, images = make(), torch.rand(6, 1, 4, 4)
    # near the boundary, where brackets close soon
    model = WithOffset(raw, -raw(images).detach().mean(0))
    for norm in NORMS:
        solved = exact_margins(model, images, norm)
        assert solved.solved.all()
        distance = measure(model, images, create("cascade"), norm).distance
        assert (distance >= solved.lower * (1 - 1e-5)).all()
        assert (distance / solved.margin).median() < 1.001
    assert program_disagreements(model, images, solved) == 0


@pytest.mark.slow
def test_margins_match_integer_programs_on_more_images(shallow: nn.Module, deep: nn.Module, digits: Tensor) -> None:
    for model, count in ((shallow, 60), (deep, 30)):
        images = digits[:count]
        assert program_disagreements(model, images, exact_margins(model, images, "linf")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_no_attack_is_below_the_exact_margin(shallow: nn.Module, digits: Tensor, norm: Norm) -> None:
    images = digits[:24]
    solved = exact_margins(shallow, images, norm)
    assert solved.solved.all()
    ratios = []
    for text in ("cascade", "apgd:steps=20"):
        distance = measure(shallow, images, create(text), norm).distance
        # attacks and verification compute in float32
        assert (distance >= solved.lower * (1 - 1e-5)).all()
        ratios.append(distance / solved.margin)
    # control: the attacks are close enough to refute a bound that is 1% too high
    assert torch.stack(ratios).amin(0).median() < 1.01


def changed_in_ball(
    model: nn.Module, images: Tensor, norm: Norm, domain: Domain, radius: Tensor, towards: Tensor
) -> int:
    """On how many images a random point at the radius, or the one towards another image, has another class."""
    draw, exact, changed = torch.Generator().manual_seed(0), copy.deepcopy(model).double(), 0
    for image, length, end in zip(images.double(), radius, towards, strict=True):
        ways = torch.randn(500, *image.shape, generator=draw, dtype=torch.float64)
        ways = ways.sign() * torch.rand(500, *image.shape, generator=draw).round() if norm == "linf" else ways
        ways = torch.cat([ways, (end - image)[None]])
        points = image + ways * (length / row_norm(ways, norm)).view(-1, 1, 1, 1)
        points = points.clamp(0, 1) if domain == "box" else points
        label = exact(image[None]).argmax(1)
        changed += bool((exact(points).argmax(1) != label).any())
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_point_in_the_ball_has_another_class(deep: nn.Module, digits: Tensor, norm: Norm, domain: Domain) -> None:
    images = digits[:12]
    solved = exact_margins(deep, images, norm, domain=domain)
    inside = solved.lower * (1 - 1e-9)
    assert changed_in_ball(deep, images, norm, domain, inside, solved.witness) == 0
    # control: just beyond the margin a point has another class
    assert changed_in_ball(deep, images, norm, domain, solved.upper * (1 + 1e-6), solved.witness) == len(images)


# --- properties of results ---


@pytest.mark.parametrize("norm", NORMS)
def test_witnesses_have_their_stated_properties(deep: nn.Module, digits: Tensor, norm: Norm) -> None:
    images = digits[:12]
    solved = exact_margins(deep, images, norm)
    exact = copy.deepcopy(deep).double()
    assert solved.witness.dtype == torch.float64
    assert ((solved.witness >= 0) & (solved.witness <= 1)).all()
    assert (exact(images.double()).argmax(1) == solved.label).all()
    assert (exact(solved.witness).argmax(1) != solved.label).all()
    torch.testing.assert_close(row_norm(solved.witness - images.double(), norm), solved.upper, rtol=1e-12, atol=0)
    assert (solved.lower >= solved.upper * (1 - GAP)).all()


@pytest.mark.slow
def test_brackets_close_with_the_budget(digits: Tensor) -> None:
    model, images = trained((48, 48), epochs=8), digits[:4]
    brackets = [exact_margins(model, images, "linf", nodes=nodes) for nodes in (1, 10, 30, 100, 3000)]
    assert not brackets[0].solved.any()
    assert brackets[-1].solved.all()
    for less, more in itertools.pairwise(brackets):
        assert (less.lower <= more.lower).all()
        assert (more.upper <= less.upper).all()
        assert (less.nodes <= more.nodes).all()
    assert (brackets[2].lower < brackets[3].lower).any()
    for bracket in brackets:
        assert (bracket.lower <= bracket.upper).all()
        assert bracket.margin.isnan().equal(~bracket.solved)
    again = exact_margins(model, images, "linf", nodes=30)
    for name in ("lower", "upper", "witness", "label", "solved", "nodes"):
        assert getattr(again, name).equal(getattr(brackets[2], name)), name


def test_tiny_margins_are_bracketed_up_to_rounding(deep: nn.Module, digits: Tensor) -> None:
    images = digits[:4].double()
    solved = exact_margins(deep, images, "l2")
    for remaining, width in ((1e-3, 1e-5), (1e-5, 1e-3)):
        near = images + (1 - remaining) * (solved.witness - images)
        bracket = exact_margins(deep, near, "l2", nodes=2000)
        assert (bracket.lower >= (1 - width) * bracket.upper).all()
        torch.testing.assert_close(bracket.upper, remaining * solved.upper, rtol=5e-3, atol=0)


def test_the_time_budget_ends_the_search(digits: Tensor) -> None:
    solved = exact_margins(trained((48, 48), epochs=2), digits[:1], "linf", seconds=1e-9)
    assert not solved.solved.any()
    assert 0 < solved.upper.item() < 1
    assert solved.nodes.item() <= 1


def test_given_witnesses_are_used_and_invalid_ones_ignored(shallow: nn.Module, digits: Tensor) -> None:
    images = digits[:2]
    solved = exact_margins(shallow, images, "l2")
    known = exact_margins(shallow, images, "l2", nodes=1, witnesses=solved.witness)
    torch.testing.assert_close(known.upper, solved.upper, rtol=1e-12, atol=0)
    assert not known.solved.any()
    for useless in (images, torch.full_like(images, math.nan), images + 1e-9):
        result = exact_margins(shallow, images, "l2", witnesses=useless)
        torch.testing.assert_close(result.margin, solved.margin, rtol=GAP, atol=0)


@pytest.mark.slow
def test_free_margins_never_exceed_margins_in_the_box(deep: nn.Module, digits: Tensor) -> None:
    for norm in NORMS:
        box, free = (exact_margins(deep, digits[:8], norm, domain=domain).margin for domain in DOMAINS)
        assert (free <= box * (1 + 2 * GAP)).all()
        assert (free < 0.99 * box).any()


def test_the_model_is_left_as_it_was(digits: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact_margins(model, digits[:2], "l2")
    assert model.training
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": torch.full((1, 1, 8, 8), 1.5)}, "expected images in [0, 1], got [1.5, 1.5]"),
        ({"images": torch.zeros(1, 64)}, "expected images of shape (B, C, H, W)"),
        ({"images": torch.zeros(1, 1, 4, 4)}, "RuntimeError"),
        ({"norm": "l1"}, "expected a norm of l2, linf, got 'l1'"),
        ({"domain": "sphere"}, "expected a domain of box, free, got 'sphere'"),
        ({"witnesses": torch.zeros(2, 1, 8, 8)}, "expected witnesses of shape (1, 1, 8, 8), got (2, 1, 8, 8)"),
        ({"gap": 1e-9}, "expected a gap of at least 1e-07 and below 1, got 1e-09"),
        ({"nodes": 0}, "expected nodes of at least 1"),
        ({"seconds": 0.0}, "expected seconds above 0, got 0.0"),
    ],
)
def test_refusals_give_a_one_line_error(shallow: nn.Module, changed: dict[str, Any], words: str) -> None:
    arguments = {"images": torch.zeros(1, 1, 8, 8), "norm": "l2", **changed}
    images, norm = arguments.pop("images"), arguments.pop("norm")
    with pytest.raises(InputError) as raised:
        exact_margins(shallow, images, norm, **arguments)
    assert words in str(raised.value)
    assert "; " in str(raised.value)
    assert "\n" not in str(raised.value)


# --- the cache ---


def no_search(*_: object) -> None:
    raise AssertionError("searched in spite of the cache")


def same(one: ExactMargins, other: ExactMargins) -> bool:
    return all(getattr(one, name).equal(getattr(other, name)) for name in ("lower", "upper", "witness", "seconds"))


def test_a_solved_margin_is_read_from_the_cache(
    shallow: nn.Module, digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(**changed: Any) -> ExactMargins:
        arguments = {"model": shallow, "images": digits[:2], "norm": "l2", "nodes": 5000, **changed}
        return exact_margins(
            arguments.pop("model"), arguments.pop("images"), arguments.pop("norm"), cache=tmp_path, **arguments
        )

    first = solve()
    assert len(list(tmp_path.iterdir())) == 2
    other = trained((32,), epochs=1)
    monkeypatch.setattr(Search, "run", no_search)
    assert same(solve(), first)
    # a larger budget does not change solved margins
    assert same(solve(nodes=90_000, seconds=9.0), first)
    for changed in (
        {"model": other},
        {"images": digits[:2] * 0.999},
        {"norm": "linf"},
        {"domain": "free"},
        {"bounds": (0.0, 2.0)},
        {"gap": 1e-4},
    ):
        with pytest.raises(AssertionError, match="in spite"):
            solve(**changed)


@pytest.mark.slow
def test_a_larger_budget_continues_from_an_open_bracket(
    digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = trained((48, 48), epochs=8), digits[12:13]
    little = exact_margins(model, images, "linf", nodes=30, cache=tmp_path)
    assert not little.solved.any()
    with monkeypatch.context() as patch:
        patch.setattr(Search, "run", no_search)
        assert same(exact_margins(model, images, "linf", nodes=20, cache=tmp_path), little)
        # a nearer witness is still used
        near = exact_margins(model, images, "linf", nodes=20, cache=tmp_path, witnesses=little.witness)
        assert same(near, little)
        with pytest.raises(AssertionError, match="in spite"):
            exact_margins(model, images, "linf", nodes=31, cache=tmp_path)
    assert exact_margins(model, images, "linf", nodes=3000, cache=tmp_path).solved.all()
    assert exact_margins(model, images, "linf", nodes=1, cache=tmp_path).solved.all()


def cut(text: str) -> str:
    return text[: len(text) // 2]


def raised_lower(text: str) -> str:
    """The lower bound doubled, with the old checksum."""
    content = json.loads(text)
    content["body"]["answer"]["lower"] *= 2
    return json.dumps(content)


def clean_witness(text: str) -> str:
    """A witness that is the image itself, with a correct checksum."""
    content = json.loads(text)
    content["body"]["answer"] |= {"move": [0.0] * 64, "upper": 0.0, "lower": 0.0}
    return signed(content)


def shorter(text: str) -> str:
    """A distance other than the witness's, with a correct checksum."""
    content = json.loads(text)
    content["body"]["answer"]["upper"] *= 0.5
    content["body"]["answer"]["lower"] *= 0.5
    return signed(content)


def another_image(text: str) -> str:
    """The result for another image, with a correct checksum."""
    content = json.loads(text)
    content["body"]["question"]["image"] = "0" * 64
    return signed(content)


def signed(content: dict[str, Any]) -> str:
    return json.dumps({**content, "checksum": cached._checksum(content["body"])})


@pytest.mark.parametrize("damage", [cut, raised_lower, clean_witness, shorter, another_image, lambda _: "[1]"])
def test_a_damaged_record_is_computed_again(
    shallow: nn.Module, digits: Tensor, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    image = digits[:1]
    first = exact_margins(shallow, image, "l2", cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    again = exact_margins(shallow, image, "l2", cache=tmp_path)
    for name in ("lower", "upper", "witness", "nodes"):
        assert getattr(again, name).equal(getattr(first, name)), name
    # and it was rewritten, with no other file next to it
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_text(encoding="utf-8"))["body"]["answer"]["lower"] == first.lower.item()


# --- controls: a wrong solver ---


def test_a_witness_below_a_lower_bound_raises_the_alarm(shallow: nn.Module, digits: Tensor, tmp_path: Path) -> None:
    image = digits[:1]
    exact_margins(shallow, image, "l2", cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["body"]["answer"]["lower"] *= 1.001
    path.write_text(signed(content), encoding="utf-8")
    with pytest.raises(UnsoundError, match="no result of this solver can be trusted"):
        exact_margins(shallow, image, "l2", cache=tmp_path)


def last_class_forgotten(network: ReluNetwork) -> int:
    return len(network.biases[-1]) - 1


def plant(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    if defect == "chords":
        monkeypatch.setattr(tree, "upper_lines", lines_of_low_chords)
    else:
        monkeypatch.setattr(ReluNetwork, "classes", property(last_class_forgotten))
        monkeypatch.setattr(
            ReluNetwork,
            "lead",
            lambda self, other, own: np.eye(len(self.biases[-1]))[other] - np.eye(len(self.biases[-1]))[own],
        )


@pytest.mark.slow
@pytest.mark.parametrize("defect", ["chords", "class"])
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_activation_patterns_detect_a_planted_defect(monkeypatch: pytest.MonkeyPatch, norm: Norm, defect: str) -> None:
    plant(monkeypatch, defect)
    assert disagreements(norm, "box") > 0


@pytest.mark.slow
def test_integer_programs_detect_a_forgotten_class(
    monkeypatch: pytest.MonkeyPatch, deep: nn.Module, digits: Tensor
) -> None:
    true = exact_margins(deep, digits[:40], "linf")
    towards = copy.deepcopy(deep).double()(true.witness).argmax(1)
    images = digits[:40][towards == 9][:2]
    assert len(images) == 2
    with monkeypatch.context() as patch:
        plant(patch, "class")
        solved = exact_margins(deep, images, "linf")
    assert program_disagreements(deep, images, solved) == 2
