"""The speed benchmark: not its times, but that it prints no misleading ratio."""

import contextlib
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks.registry import create
from attacks.types import EstimatorError, Norm
from benchmarks.speed import __main__ as command
from benchmarks.speed import comparing, peers, report, timing
from benchmarks.speed.agreement import ROUNDING, agree, judge
from benchmarks.speed.comparing import compare
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.peers import PEERS, missing
from benchmarks.speed.problems import NETWORKS, WALL, Problem, built_in, of_run, with_unreachable
from benchmarks.speed.sides import SIDES, Side, ours, sides_against
from harness.config.options import ConfigError
from harness.runs import read_run
from harness.track import main as track
from harness.tracking.finished_run import probes_of

STOCK = next(side for side in sides_against("deepfool") if side.name == "foolbox")


@pytest.fixture(scope="module")
def digits() -> Problem:
    return built_in("dense-digits", 10, 20, 10)


def side_of(attack: object, **settings: object) -> Side:
    return Side(name="planted", library="foolbox", attack=attack, about="", **settings)  # type: ignore[arg-type]


def lengthened(by: float) -> Side:
    """Stock Foolbox with every point moved slightly farther from its image."""

    def attack(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        return (images + by * (STOCK.attack(model, images, labels, norm) - images)).clamp(0, 1)

    return side_of(attack, same=True)


def compared(problem: Problem, side: Side, norm: Norm = "l2") -> comparing.Table:
    return compare(problem, "deepfool", norm, [side], repeats=1, memory=False, images=len(problem.images))


def test_names_of_the_command_match_the_tables() -> None:
    assert tuple(NETWORKS) == command.PROBLEMS
    assert tuple(PEERS) == command.PEER_NAMES
    assert {side.library for sides in SIDES.values() for side in sides} == set(PEERS)
    for name in SIDES:
        create(name)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_stock_foolbox_and_ours_give_the_same_margins(digits: Problem, norm: Norm) -> None:
    row = compared(digits, STOCK, norm).rows[1]
    assert row.agreement is not None
    assert row.agreement.comparable
    assert row.agreement.found == row.agreement.found_theirs == 20
    assert row.agreement.mean == pytest.approx(1, abs=1e-5)
    assert not row.agreement.differing


@pytest.mark.slow
def test_a_planted_wrong_peer_is_not_comparable(digits: Problem) -> None:
    table = compared(digits, lengthened(1.001))
    agreement = table.rows[1].agreement
    assert agreement is not None
    assert not agreement.comparable
    assert len(agreement.differing) == 20
    shown = list(report.lines(table))
    margins = next(place for place, line in enumerate(shown) if "NOT COMPARABLE" in line)
    times = next(place for place, line in enumerate(shown) if "×" in line)
    assert margins < times
    assert "(not comparable)" in shown[times]
    assert "(not comparable)" in report.markdown([table], {})
    # control: an error below the tolerance passes
    control = compared(digits, lengthened(1.00001)).rows[1].agreement
    assert control is not None
    assert control.comparable


def test_few_images_may_differ_and_are_listed() -> None:
    theirs = torch.linspace(1, 2, 100, dtype=torch.float64)
    ours_ = theirs.clone()
    ours_[[3, 50]] *= 1.01
    agreement = agree(ours_, theirs, same=True)
    assert agreement.comparable
    assert [image for image, _, _ in agreement.differing] == [3, 50]
    assert agreement.differing[0][1:] == pytest.approx((1.01 * float(theirs[3]), float(theirs[3])))
    ours_[51] = math.inf
    assert not agree(ours_, theirs, same=True).comparable
    assert agree(torch.full((3,), math.inf), torch.full((3,), math.inf), same=True).comparable


def test_another_algorithm_may_be_beaten_but_must_not_be_nearer_or_fail() -> None:
    theirs = torch.ones(100, dtype=torch.float64)
    assert agree(0.5 * theirs, theirs, same=False).comparable
    assert agree(1.009 * theirs, theirs, same=False).comparable
    assert not agree(1.011 * theirs, theirs, same=False).comparable
    missed = theirs.clone()
    missed[0] = math.inf
    assert agree(theirs, missed, same=False).comparable
    assert not agree(missed, theirs, same=False).comparable
    missed[:3] = math.inf
    assert not agree(theirs, missed, same=False).comparable
    # except those on the boundary to rounding
    agreement = agree(theirs, missed, same=False, near=theirs)
    assert agreement.comparable
    assert (agreement.found, agreement.found_theirs, agreement.touching) == (100, 97, 3)
    none = torch.full((100,), math.inf, dtype=torch.float64)
    assert not agree(none, none, same=False).comparable


def test_points_of_the_same_class_or_outside_the_box_are_not_found(digits: Problem) -> None:
    assert judge(digits, digits.images, "l2").isinf().all()
    points = ours("deepfool").solve(digits, "l2")
    assert judge(digits, points, "l2").isfinite().all()
    points[0] = math.nan
    points[1] = 1 + points[1]
    assert judge(digits, points, "l2").isinf().tolist() == [True, True, *[False] * 18]


def test_points_on_the_boundary_up_to_rounding_are_distinguished() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    images = torch.tensor([[0.75, 0.25, 0.5, 0.5]]).reshape(1, 1, 2, 2)
    problem = Problem("two", nn.Sequential(nn.Flatten(), layer), images, torch.tensor([0]), 2, 1)

    def at(second: float) -> Tensor:
        return torch.tensor([[0.5, second, 0.5, 0.5]]).reshape(1, 1, 2, 2)

    # ties are classified as the first class
    for second, across, near in [(0.51, True, True), (0.5, False, True), (0.499, False, False)]:
        assert judge(problem, at(second), "linf").isfinite().item() is across
        assert judge(problem, at(second), "linf", rounding=ROUNDING).isfinite().item() is near
    assert judge(problem, at(0.5), "linf", rounding=ROUNDING).item() == 0.25


def test_ratios_are_computed_per_round() -> None:
    # the second round was slow for both: the ratio of medians is 6 / 3, those of rounds 2, 4, 3
    ratio = timing.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.least, ratio.most) == (3.0, 2.0, 4.0)


def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    runs = {name: (lambda name=name: run(name)) for name in "ab"}
    timed = timing.take_turns(
        runs,
        3,
        torch.device("cpu"),
        between=lambda: order.append("-"),
        after_round=lambda: order.append("|"),
    )
    assert "".join(order) == "a-b-|b-a-|a-b-|"
    assert [timed[name].result for name in "ab"] == [1, 3]
    assert all(len(timed[name].seconds) == len(timed[name].processor) == 3 for name in "ab")


@pytest.mark.slow
def test_the_floor_is_the_cost_of_its_passes(digits: Problem) -> None:
    costs = timing.PassCosts(forward=1.0, backward=3.0)
    assert costs.floor(2.0, 9) == 3 * 1.0 + 18 * 3.0
    measured = timing.pass_costs(digits, 10)
    assert 0 < measured.forward < 1e-2
    assert 0 < measured.backward < 1e-2
    floor = compared(digits, STOCK).floor
    assert floor is not None
    # Foolbox's loop, one image at a time: nine gradients per step, and one that it does not use
    alone = [digits.first(row + 1) for row in range(len(digits.images))]
    alone = [replace(one, images=one.images[-1:], labels=one.labels[-1:]) for one in alone]
    steps = [float(ours("deepfool:engine=foolbox").counted(one, "l2")[2].item() - 1) / 9 for one in alone]
    assert floor.steps == pytest.approx(sum(steps) / len(steps))
    assert floor.an_image == pytest.approx((floor.steps + 1) * floor.forward + floor.steps * 9 * floor.backward)


def test_only_our_own_engine_has_a_floor(digits: Problem) -> None:
    table = compare(digits, "deepfool:engine=foolbox", "l2", [], repeats=1, memory=False, images=4)
    assert table.floor is None
    assert table.rows[0].images == 4


@pytest.mark.slow
def test_the_unreachable_image_never_changes_class_and_has_gradients(digits: Problem) -> None:
    walled = with_unreachable(digits)
    assert walled.labels[[0, 10]].tolist() == [0, 0]
    generator = torch.Generator().manual_seed(0)
    corners = (torch.rand(2000, 1, 8, 8, generator=generator) > 0.5).float()
    with torch.no_grad():
        # for any values of the other pixels
        corners[:, 0, 0, 0] = 1
        assert (walled.model(corners).argmax(1) == 0).all()
        assert digits.model(corners).abs().max() < WALL / 10
        # control: without the mark these have many classes
        corners[:, 0, 0, 0] = 0
        assert len(walled.model(corners).argmax(1).unique()) > 2
    for name in ("foolbox", "torchattacks-fab"):
        side = next(side for side in sides_against("deepfool") if side.name == name)
        found = judge(walled, side.solve(walled, "l2"), "l2").isfinite()
        assert found.tolist() == [row % 10 != 0 for row in range(20)]
    _, _, backwards = ours("deepfool").counted(walled, "l2")
    # the attack uses all its steps: the gradients are nonzero
    assert backwards[[0, 10]].tolist() == [450, 450]
    assert backwards[1:10].max() < 450


@pytest.mark.slow
def test_slow_sides_are_extrapolated_and_reported(digits: Problem) -> None:
    slow = replace(STOCK, most=5)
    table = compared(digits, slow)
    row = table.rows[1]
    assert (row.timed, row.images) == (5, 20)
    assert row.an_image.median == pytest.approx(row.seconds[0] / 5)
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(row.seconds[0] / 5 / (table.rows[0].seconds[0] / 20))
    assert any("extrapolated" in line for line in table.remarks)
    # if one image differs from the others, a few do not represent all
    without = compared(with_unreachable(digits), slow)
    assert len(without.rows) == 1
    assert any("would not stand for all" in line for line in without.remarks)


def test_a_side_that_raises_is_left_out(digits: Problem) -> None:
    def attack(*_: object) -> Tensor:
        raise RuntimeError("no\nway")

    table = compared(digits, side_of(attack))
    assert len(table.rows) == 1
    assert "planted is left out: it raised RuntimeError: no way" in table.remarks


def test_leftovers_of_a_library_are_cleared(digits: Problem) -> None:
    assert all(parameter.requires_grad for parameter in digits.model.parameters())
    STOCK.solve(digits.first(2), "l2")
    assert all(parameter.grad is not None for parameter in digits.model.parameters())
    compared(digits.first(2), STOCK)
    assert all(parameter.grad is None for parameter in digits.model.parameters())


def test_a_missing_library_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "adv-lib", ("no_such_module", "pip install --no-deps adv-lib"))
    assert missing("adv-lib") == "adv-lib is not installed: left out (pip install --no-deps adv-lib)"
    assert missing("foolbox") == ""


def test_visdom_is_stubbed_only_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = type(sys)("adv_lib.attacks")
    monkeypatch.setitem(sys.modules, "adv_lib", type(sys)("adv_lib"))
    monkeypatch.setitem(sys.modules, "adv_lib.attacks", attacks)
    real = type(sys)("visdom")
    monkeypatch.setitem(sys.modules, "visdom", real)
    with peers._adv_lib() as library:
        assert library is attacks
    assert sys.modules["visdom"] is real
    monkeypatch.delitem(sys.modules, "visdom")
    with peers._adv_lib():
        pass
    assert sys.modules.pop("visdom").Visdom is object


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
def test_networks_are_trained_the_same_every_time(classes: int) -> None:
    one, other = (built_in("dense-digits", classes, 100, 10) for _ in range(2))
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.images, other.images)
    assert one.images.shape == (100, 1, 8, 8)
    assert len(one.labels.unique()) > 8 * classes / 20
    assert not one.model.training
    with pytest.raises(ConfigError, match="expected at most 1000 --images"):
        built_in("dense-digits", classes, 1001, 10)


@pytest.mark.slow
def test_a_run_gives_its_test_images_and_then_its_training_images(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--model", "dense", "--epochs", "1", "--probe", "6", "--estimator", "linear", "--norm", "l2"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert track([*options, "--device", "cpu", "--threads", "1", "--out", str(folder)]) == 0
    run = read_run(folder)
    (problem,) = of_run(run, [0], 10, 4)
    stored = probes_of(run)
    assert torch.equal(problem.images, torch.cat([stored["test"].images, stored["train"].images[:4]]))
    assert problem.name == "run, epoch 0"
    assert (problem.classes, problem.batch_size) == (10, 4)
    # at least a full batch, for the floor
    assert len(of_run(run, [], 1, 8)[0].images) == 8
    with pytest.raises(ConfigError, match="expected at most 12 --images, which run has, got 13"):
        of_run(run, [0], 13, 4)


@pytest.mark.slow
def test_foolbox_keeps_all_gradients_in_memory_and_ours_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    images = torch.rand(100, 3, 64, 64)
    with torch.no_grad():
        labels = model(images).argmax(1)
    problem = Problem("wide", model.eval(), images, labels, 10, 100)
    theirs, own = (peak_bytes(side, "deepfool", problem, "l2") for side in (STOCK, ours("deepfool")))
    assert theirs is not None
    assert own is not None
    batch = 4 * images.numel()
    # one copy of the batch per gradient, nine in all, and their stack
    assert 18 * batch < theirs < 60 * batch
    assert 4 * batch < own < theirs / 2


def test_the_command_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--problem", "dense-digits", "--images", "4", "--repeats", "1", "--peer", "foolbox", "--no-memory"]
    assert command.main([*options, "--out", str(tmp_path)]) == 0
    stdout = capsys.readouterr().out
    assert stdout.count("4 of 4 the same within 0.0001") == 4
    written = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [len(table["rows"]) for table in written["tables"]] == [3, 3]
    row = written["tables"][0]["rows"][1]
    assert (row["side"], row["images"], row["memory"]) == ("foolbox", 4, None)
    assert row["agreement"]["comparable"]
    assert row["ratio"]["median"] > 0
    assert written["versions"]["foolbox"] == "3.3.4"
    assert written["machine"]["threads"] == 1
    page = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| foolbox", page, re.MULTILINE)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "0"], "--images of at least 1, got 0"),
        (["--repeats", "0"], "--repeats of at least 1, got 0"),
        (["--epoch", "1"], "expected a run folder with --epoch"),
        (["--estimator", "deepfol"], "did you mean 'deepfool'?"),
        (["--estimator", "ddn", "--norm", "linf"], "expected a norm that ddn has, got linf"),
        (["--problem", "dense-digits", "--images", "1001"], "expected at most 1000 --images"),
    ],
)
def test_bad_options_give_a_one_line_error(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert words in stderr


def test_debug_raises_the_original_error() -> None:
    with pytest.raises(EstimatorError):
        command.main(["--estimator", "deepfol", "--debug"])
