"""Any attack of the two libraries by class name: verified distances, failures as rows, refusals in one line."""

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.adapters.ladder import LADDER, climb_ladder
from attacks.affine import affine_margins
from attacks.estimator import Status
from attacks.estimators.foolbox import UNUSABLE, foolbox_attacks
from attacks.estimators.torchattacks import torchattacks_attacks
from attacks.geometry import row_norm
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.registry import create
from attacks.types import EstimatorError

ONE_LINE = re.compile(r"expected .+, got .+; .+")


class Affine(nn.Module):
    """Random directions over 36 grey pixels; the boundaries pass near mid-grey."""

    def __init__(self, classes: int = 5, channels: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(21)
        self.weight = nn.Parameter(torch.randn(classes, channels * 36, generator=generator))
        centre = 0.5 * self.weight.detach().sum(1)
        self.bias = nn.Parameter(0.3 * torch.randn(classes, generator=generator) - centre)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def some_images(count: int = 4, channels: int = 1) -> Tensor:
    return 0.4 + 0.2 * torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(22))


# text, norm, largest allowed distance / exact margin (largest for random starts); the ratio is never below 1
EXAMPLES = [
    # minimisation
    ("foolbox:L2DeepFoolAttack", "l2", 1.01),
    ("foolbox:LInfFMNAttack:steps=30", "linf", 1.1),
    ("foolbox:DDNAttack:steps=30", "l2", 2),
    ("foolbox:NewtonFoolAttack:steps=30", "l2", 1.5),
    ("foolbox:LinearSearchBlendedUniformNoiseAttack:directions=50,steps=50", "linf", 40),
    ("torchattacks:DeepFool", "l2", 1.01),
    ("torchattacks:CW:steps=30,lr=0.05", "l2", 3),
    ("torchattacks:EADEN:max_iterations=20,binary_search_steps=3,lr=0.05", "l2", 3),
    # fixed epsilon, on the ladder
    ("foolbox:L2BasicIterativeAttack", "l2", 1.5),
    ("foolbox:LinfFastGradientAttack", "linf", 1.5),
    ("foolbox:LinfPGD:steps=5", "linf", 40),
    ("torchattacks:PGDL2:steps=5", "l2", 3),
    ("torchattacks:FGSM", "linf", 1.5),
    ("torchattacks:APGD:steps=5", "l2", 1.5),
    ("torchattacks:FAB:steps=5", "linf", 1.1),
    ("torchattacks:SPSA:nb_iter=5,max_batch_size=8", "linf", 20),
    # one epsilon
    ("foolbox:L2BasicIterativeAttack:epsilon=2", "l2", 1.5),
    ("foolbox:LinfFastGradientAttack:epsilon=0.3", "linf", 2),
    ("torchattacks:PGD:eps=0.3,alpha=0.1,random_start=false", "linf", 2),
    ("torchattacks:PGDL2:eps=3.0", "l2", 60),
]


@pytest.mark.parametrize(("text", "norm", "loosest"), EXAMPLES, ids=[text for text, *_ in EXAMPLES])
def test_distances_are_verified(text: str, norm: Any, loosest: float) -> None:
    model, images = Affine(), some_images()
    margins = measure(model, images, create(text), norm, noise_retries=0)
    exact = affine_margins(model.weight, model.bias, images, norm, domain="box")
    found = torch.tensor([status is Status.FOUND for status in margins.status])
    assert set(margins.status) <= {Status.FOUND, Status.NOT_FOUND}
    assert found.sum() >= 3
    assert torch.equal(model(margins.witness).argmax(1)[found], margins.target[found])
    assert torch.equal(row_norm(margins.witness - images, norm)[found], margins.distance[found])
    assert (margins.distance[found] >= exact[found] * (1 - 1e-5)).all()
    assert (margins.distance[found] <= exact[found] * loosest).all()
    assert margins.witness.amin() >= 0
    assert margins.witness.amax() <= 1
    assert margins.distance[~found].isinf().all()


@pytest.mark.parametrize(
    "text",
    ["foolbox:L2DeepFoolAttack", "torchattacks:FAB:steps=5", "torchattacks:EADEN:max_iterations=20", "foolbox:FGM"],
)
def test_double_precision_is_converted_for_the_libraries(text: str) -> None:
    model, images = Affine().double(), some_images().double()
    margins = measure(model, images, create(text), "l2")
    assert margins.message == ("",) * 4
    assert Status.FOUND in margins.status
    assert margins.witness.dtype == torch.float64


def test_an_attack_with_a_norm_parameter_supports_both_norms() -> None:
    for text in ("torchattacks:APGD:steps=3", "foolbox:InversionAttack"):
        assert create(text).norms == {"l2", "linf"}
    estimator = create("torchattacks:APGD:steps=10")
    model, images = Affine(), some_images()
    by_l2, by_linf = (measure(model, images, estimator, norm) for norm in ("l2", "linf"))  # type: ignore[arg-type]
    # each has the smaller distance in its own norm
    assert (row_norm(by_linf.witness - images, "l2") > by_l2.distance).all()
    assert (row_norm(by_l2.witness - images, "linf") > by_linf.distance).all()


# --- the ladder ---


def test_the_ladder_doubles_epsilon_and_rows_stop_at_their_first_success() -> None:
    images = torch.tensor([0.1, 0.3, 0.45]).view(3, 1, 1, 1)
    tried: list[tuple[list[int], float]] = []

    class Step(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            gap = images.flatten(1) - 0.5
            return torch.cat([-gap, gap], 1)

    with frozen_view(Step(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(3)

        def attempt(rows: Tensor, radius: float) -> Tensor:
            tried.append((rows.tolist(), radius))
            return images[rows] + radius

        result = climb_ladder(attempt, view, images, torch.zeros(3, dtype=torch.int64), "linf")
        passes = view.forwards.tolist()
    largest = 0.9
    radii = [largest * 2.0 ** (rung + 1 - LADDER) for rung in range(LADDER)]
    assert [radius for _, radius in tried] == pytest.approx(radii[: len(tried)])
    # 0.9 / 2**4 = 0.056 > 0.05; 0.9 / 4 = 0.225 > 0.2; 0.9 / 2 = 0.45 > 0.4
    assert [rows for rows, _ in tried] == [[0, 1, 2]] * 6 + [[0, 1]] * 2 + [[0]]
    assert result.flatten().tolist() == pytest.approx([0.55, 0.525, 0.50625])
    assert passes == [9, 8, 6]


def test_nan_logits_are_not_a_success_on_the_ladder() -> None:
    images = torch.full((1, 1, 1, 1), 0.3)

    class Never(nn.Module):
        """NaN has argmax 0, which is not this model's class 1."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images.flatten(1) - 1, 1 - images.flatten(1)], 1)

    with frozen_view(Never(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(1)
        calls = []

        def attempt(rows: Tensor, radius: float) -> Tensor:
            calls.append(radius)
            return torch.full_like(images[rows], torch.nan)

        climb_ladder(attempt, view, images, torch.ones(1, dtype=torch.int64), "linf")
    assert len(calls) == LADDER


def test_one_epsilon_costs_one_rung() -> None:
    model, images = Affine(), some_images(1)
    ladder = measure(model, images, create("foolbox:LinfFastGradientAttack"), "linf", noise_retries=0)
    alone = measure(model, images, create("foolbox:LinfFastGradientAttack:epsilon=0.3"), "linf", noise_retries=0)
    assert alone.backwards.item() == 1 < ladder.backwards.item()
    # an epsilon that is too small finds nothing: epsilon is not a margin
    small = measure(model, images, create("foolbox:LinfFastGradientAttack:epsilon=0.0001"), "linf", noise_retries=0)
    assert small.status == (Status.NOT_FOUND,)


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("foolbox:HopSkipJumpAttack", ["(minimisation, distance L1 distance)", "l2 or linf"]),
        ("foolbox:SparseL1DescentAttack", ["(fixed epsilon, distance L1 distance)"]),
        ("foolbox:L0FMNAttack", ["(minimisation, distance L0 distance)"]),
        ("foolbox:SpatialAttack", ["(minimisation, distance its own)"]),
        ("torchattacks:OnePixel", ["got torchattacks:OnePixel (L0)", "l2 or linf"]),
        ("torchattacks:EADL1", ["(L1)"]),
        ("torchattacks:MultiAttack", ["(no norm stated)"]),
        ("foolbox:L2DeepFool", ["an attack class of foolbox.attacks, got 'L2DeepFool'", "L2DeepFoolAttack"]),
        ("foolbox:Attack", ["got 'Attack'"]),
        ("foolbox:base", ["got 'base'"]),
        ("foolbox:LinfPGD2", ["got 'LinfPGD2'"]),
        ("torchattacks:Pgd", ["an attack class of torchattacks, got 'Pgd'", "PGDL2"]),
        ("torchattacks:attack", ["got 'attack'"]),
        ("torchattacks:torch", ["got 'torch'"]),
        ("foolbox:L2PGD:step=3", ["parameters of foolbox:L2PGD (", "steps: int = 50", "'step'"]),
        ("foolbox:VirtualAdversarialAttack", ["(steps: int, xi: float = 1e-06)", "'steps'"]),
        ("foolbox:L2DeepFoolAttack:epsilon=1", ["parameters of foolbox:L2DeepFoolAttack (", "'epsilon'"]),
        ("torchattacks:PGD:step=3", ["parameters of torchattacks:PGD (eps=", "steps=10", "got 'step'"]),
        ("torchattacks:PGD:model=3", ["got 'model'"]),
        ("torchattacks:APGD:norm=L2", ["got 'norm'"]),
    ],
)
def test_refusals_name_the_kind_the_norms_or_the_parameters(text: str, parts: list[str]) -> None:
    with pytest.raises(EstimatorError) as caught:
        create(text)
    message = str(caught.value)
    assert ONE_LINE.fullmatch(message), message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("text", "norm", "has"), [("foolbox:L2PGD", "linf", "l2"), ("torchattacks:PGD", "l2", "linf")])
def test_an_unsupported_norm_is_refused(text: str, norm: Any, has: str) -> None:
    with pytest.raises(EstimatorError, match=rf"^expected a norm that \w+ has \({has}\), got {norm}; "):
        measure(Affine(), some_images(), create(text), norm)


@pytest.mark.parametrize("name", UNUSABLE)
def test_attacks_that_need_more_than_images_and_labels_are_refused(name: str) -> None:
    assert name not in foolbox_attacks()
    with pytest.raises(EstimatorError, match=rf"got foolbox:{name} \({UNUSABLE[name]}\); choose another"):
        create(f"foolbox:{name}")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # foolbox imports numba when a Brendel-Bethge attack is made
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "foolbox.attacks.brendel_bethge", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    import foolbox.attacks.brendel_bethge as fresh

    monkeypatch.setattr("foolbox.attacks.L2BrendelBethgeAttack", fresh.L2BrendelBethgeAttack)
    with pytest.raises(
        EstimatorError, match=r"^expected the packages of foolbox:L2BrendelBethgeAttack, got .+; install"
    ):
        create("foolbox:L2BrendelBethgeAttack")


def test_an_attack_that_raises_gives_failed_rows() -> None:
    """torchattacks' TIFGSM filters three channels, its APGDT needs four classes."""
    grey = measure(Affine(), some_images(), create("torchattacks:TIFGSM"), "linf")
    assert grey.status == (Status.FAILED,) * 4
    assert all(message.startswith("RuntimeError: Given groups=3") for message in grey.message)
    rgb = measure(Affine(channels=3), some_images(channels=3), create("torchattacks:TIFGSM"), "linf")
    assert rgb.status == (Status.FOUND,) * 4
    two = measure(Affine(classes=2), some_images(), create("torchattacks:APGDT:steps=3"), "l2")
    assert two.status == (Status.FAILED,) * 4
    assert all(message.startswith("IndexError: ") for message in two.message)


def test_a_value_that_the_library_refuses_gives_failed_rows() -> None:
    margins = measure(Affine(), some_images(), create("foolbox:L2DeepFoolAttack:loss=hinge"), "l2")
    assert margins.status == (Status.FAILED,) * 4
    assert margins.message[0] == "ValueError: expected loss to be 'logits' or 'crossentropy', got 'hinge'"


def test_lists_of_attacks_hold_supported_attacks_only() -> None:
    assert {"L2DeepFoolAttack", "LInfFMNAttack", "L2BrendelBethgeAttack", "NewtonFoolAttack"} <= set(foolbox_attacks())
    assert {"PGD", "PGDL2", "FAB", "CW", "AutoAttack", "Square"} <= set(torchattacks_attacks())
    assert not {"HopSkipJumpAttack", "L0FMNAttack", "MinimizationAttack"} & set(foolbox_attacks())
    assert not {"OnePixel", "JSMA", "MultiAttack", "Attack"} & set(torchattacks_attacks())


@pytest.mark.parametrize(
    "name", [*(f"foolbox:{n}" for n in foolbox_attacks()), *(f"torchattacks:{n}" for n in torchattacks_attacks())]
)
def test_every_listed_attack_can_be_constructed(name: str) -> None:
    if name == "foolbox:VirtualAdversarialAttack":  # its number of steps has no default
        name += ":steps=5"
    if "BrendelBethge" in name:
        pytest.importorskip("numba")
    estimator = create(name)
    assert estimator.norms
    assert not estimator.batch_invariant
    assert estimator.domains == {"box"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("foolbox:L2BasicIterativeAttack:steps=abc", "steps to be of type int (default 10), got 'abc'; "),
        ("foolbox:L2PGD:rel_stepsize=x", "rel_stepsize to be of type float"),
        ("foolbox:L2PGD:epsilon=x", "epsilon to be a number, got 'x'; "),
        ("torchattacks:PGD:eps=abc", "eps to be of type float"),
        ("torchattacks:PGD:steps=2.5", "steps to be of type int (default 10), got 2.5; "),
    ],
)
def test_values_of_the_wrong_type_are_refused_before_any_work(text: str, words: str) -> None:
    with pytest.raises(EstimatorError) as caught:
        create(text)
    assert words in str(caught.value)
    assert create("torchattacks:PGD:eps=1,steps=3").norms == {"linf"}
