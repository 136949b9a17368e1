"""`benchmarks.compare`: numbers against hand calculation, and remarks on estimators with planted defects."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from attacks.estimator import Estimator, Settings
from attacks.isolation import Classifier
from attacks.registry import create
from attacks.types import DOMAINS, NORMS, Domain, Norm
from benchmarks import problems as built_in
from benchmarks.compare import audit
from benchmarks.compare.__main__ import PROBLEMS, main
from benchmarks.compare.anytime import best_within, within_budget
from benchmarks.compare.drawing import anytime_figure, cost_figure, security_figure
from benchmarks.compare.measuring import Measured, measure_problem
from benchmarks.compare.remarks import LEVELS, RULES, remark
from benchmarks.compare.results import Results, evaluate
from benchmarks.problems import affine_problem, run_problems
from harness.runs import read_run
from harness.store import RunFolder, Unit
from harness.store.tables import read_part
from harness.track import main as track
from tests.runs import ONE_LINE

INF, NAN = math.inf, math.nan


# --- the numbers ---


def test_ratios_of_ties_missed_images_and_unknown_references() -> None:
    distance = pd.Series([0.0, 3.0, INF, INF, 2.0, 2.0, 1.0])
    reference = pd.Series([0.0, 2.0, 2.0, INF, NAN, 0.0, INF])
    np.testing.assert_equal(audit.ratios(distance, reference), [1.0, 1.5, INF, INF, NAN, INF, 0.0])


def test_one_missed_image_makes_the_mean_infinite_and_counts_in_every_share() -> None:
    described = audit.describe(np.array([1.0, 1.01, 1.04, INF, NAN]))
    assert described["mean"] == described["worst"] == INF
    assert described["mean_found"] == pytest.approx(3.05 / 3)
    assert described["median"] == pytest.approx(1.025)
    assert (described["within_1"], described["within_5"], described["least"]) == (0.5, 0.75, 1.0)
    assert all(math.isnan(value) for value in audit.describe(np.array([NAN])).values())


def test_the_envelope_leaves_out_named_estimators_and_the_truth() -> None:
    wide = pd.DataFrame({"one": [2.0, INF], "two": [3.0, INF], "exact:limit=9": [1.0, 1.0]})
    assert audit.envelope(wide).tolist() == [2.0, INF]
    assert audit.envelope(wide, ["one"]).tolist() == [3.0, INF]
    assert audit.envelope(wide, ["one", "two"]).tolist() == [INF, INF]


def test_ties_count_as_wins_and_missed_images_do_not() -> None:
    #        level               both tied  missed    alone
    one = [1.0, 1.0 + 2e-5, 0.0, INF, 0.9]
    two = [1.0 + 9e-5, 1.0, 0.0, INF, 1.0]
    wide = pd.DataFrame({"one": one, "two": two})
    assert audit.wins(wide, "one") == {"wins": 4, "sole_wins": 1}
    assert audit.wins(wide, "two") == {"wins": 3, "sole_wins": 0}
    assert audit.wins(wide[["one"]], "one") == {"wins": 4, "sole_wins": 4}


def area(distance: np.ndarray, correct: np.ndarray, end: float) -> float:
    """The area under the robust accuracy curve, by numerical integration."""
    own = np.where(correct, distance, 0.0)
    grid = (np.arange(200_000) + 0.5) * end / 200_000
    return float((own[None] > grid[:, None]).mean() * end)


def test_attackbench_optimality_matches_hand_calculation_and_definition() -> None:
    best = np.array([1.0, 2.0, 3.0, 0.7])
    correct = np.array([True, True, True, False])
    assert audit.local_optimality(best, best, correct) == 1.0
    # rho e0 = 3/4 * 3; the areas are 7/4 and 6/4
    own = np.array([1.0, 3.0, INF, 9.0])
    assert audit.local_optimality(own, best, correct) == pytest.approx((2.25 - 1.75) / (2.25 - 1.5))
    most = correct.mean() * 3.0
    by_area = (most - area(own, correct, 3.0)) / (most - area(best, correct, 3.0))
    assert audit.local_optimality(own, best, correct) == pytest.approx(by_area, abs=1e-4)
    # control: distances of the predicted class give a different number
    assert audit.local_optimality(own, best, np.ones(4, dtype=bool)) != pytest.approx(by_area, abs=1e-2)
    assert audit.local_optimality(np.full(4, INF), best, correct) == 0.0
    assert audit.local_optimality(best / 2, best, correct) == 1.0  # clipped: better than the reference
    assert math.isnan(audit.local_optimality(own, np.array([1.0, INF, 1.0, 1.0]), correct))
    assert math.isnan(audit.local_optimality(own, best, np.zeros(4, dtype=bool)))


def test_rank_correlation_matches_spearman() -> None:
    one, other = pd.Series([1.0, 2.0, 2.0, 5.0, INF, INF]), pd.Series([2.0, 1.0, 3.0, 4.0, 9.0, 8.0])
    far = one.replace(INF, 1e9)
    assert audit.rank_correlation(one, other) == pytest.approx(spearmanr(far, other)[0])
    assert audit.rank_correlation(one, -other) == pytest.approx(-spearmanr(far, other)[0])
    assert math.isnan(audit.rank_correlation(pd.Series([INF] * 6), other))


def test_the_pareto_front_holds_the_undominated_points() -> None:
    passes = np.array([10.0, 20.0, 20.0, 30.0, 5.0, 40.0, 10.0])
    quality = np.array([1.2, 1.1, 1.15, 1.1, INF, 1.0, 1.2])
    # the first and the last are the same point, and neither dominates the other
    assert audit.pareto_front(passes, quality).tolist() == [True, True, False, False, False, True, True]
    assert not audit.pareto_front(passes, np.full(7, INF)).any()


# --- budgets ---

FINAL = pd.Series([0.5, 0.0, INF, 0.3], index=[7, 8, 9, 11])
TRACE = pd.DataFrame(
    {
        "image": [7, 11, 7, 7, 9],
        "passes": [3.0, 4.0, 5.0, 9.0, 2.0],
        "distance": [2.0, 0.4, 0.6, 0.49, 1.0],
    }
)


def test_the_best_within_a_budget_matches_hand_calculation() -> None:
    best = best_within(TRACE, FINAL, np.array([2.0, 3.0, 8.0, 9.0, 99.0]))
    np.testing.assert_array_equal(
        best[:, 0], [INF, 2.0, 0.6, 0.5, 0.5]
    )  # 0.49 is smaller than the final verified distance
    np.testing.assert_array_equal(best[:, 1], 0.0)  # tied
    np.testing.assert_array_equal(best[:, 2], INF)  # seen on the way, but not found in the end
    np.testing.assert_array_equal(best[:, 3], [INF, INF, 0.4, 0.4, 0.4])


def units(**distances: list[float]) -> pd.DataFrame:
    """Rows of one problem as `evaluate` makes them, with these distances."""
    tables = []
    for name, values in distances.items():
        found = np.isfinite(values)
        table = pd.DataFrame({"image": np.arange(len(values)), "distance": values, "attack_distance": values})
        status = np.where(found, "found", "not_found")
        facts: dict[str, Any] = {"problem": "p", "norm": "l2", "estimator": name, "status": status, "message": ""}
        facts |= {"forwards": 10.0, "backwards": 5.0, "passes": 15.0, "seconds": 0.1, "hidden": 0.0, "correct": True}
        facts |= {"role": "estimator", "exact": NAN, "exact_lower": NAN, "exact_upper": NAN, "declared": NAN}
        tables.append(table.assign(**facts))
    return pd.concat(tables, ignore_index=True)


def test_a_budget_removes_late_witnesses_but_not_those_of_references() -> None:
    whole = units(slow=[1.0, 2.0], reference=[0.9, 2.0])
    whole.loc[whole["estimator"] == "reference", "role"] = "reference"
    key = {"problem": "p", "norm": "l2"}
    traces = pd.DataFrame([{**key, "estimator": "slow", "image": 0, "passes": 4.0, "distance": 1.5}])
    rows = within_budget(whole, traces, 6)
    assert rows["distance"].tolist() == [1.5, INF, 0.9, 2.0]
    assert rows["status"].tolist() == ["found", "not_found", "found", "found"]
    assert rows["passes"].tolist() == [6.0, 6.0, 15.0, 15.0]
    table = audit.estimator_table(rows, whole).set_index("estimator")
    assert table.loc["slow", "mean"] == INF
    assert table.loc["slow", "mean_found"] == pytest.approx(1.5 / 0.9)
    assert (table.loc["slow", "not_found"], table.loc["slow", "passes"], table.loc["slow", "forwards"]) == (
        1,
        6.0,
        10.0,
    )
    assert table.loc["slow", "overstep"] == 1.0  # of the whole run


def test_ratios_with_and_without_an_estimator_in_the_envelope() -> None:
    rows = units(good=[1.0, 1.0], bad=[2.0, 4.0], other=[1.5, 1.5])
    rows["exact"] = rows["exact_lower"] = rows["exact_upper"] = np.tile([0.5, INF], 3)
    table = audit.ratio_table(rows, leaving=["good", "absent"]).set_index(["estimator", "against"])
    assert table.loc[("bad", "envelope"), "mean"] == 3.0
    assert table.loc[("good", "without good"), "mean"] == pytest.approx(2 / 3)
    assert table.loc[("bad", "without good"), "mean"] == pytest.approx((2 / 1.5 + 4 / 1.5) / 2)
    assert table.loc[("good", "the others"), "mean"] == pytest.approx(2 / 3)
    assert table.loc[("other", "the others"), "mean"] == 1.5
    assert table.loc[("envelope", "exact"), "mean"] == 2.0
    assert table.loc[("envelope", "exact"), "images"] == 1
    assert "without absent" not in table.index.get_level_values("against")


def test_a_bare_name_excludes_all_of_its_settings() -> None:
    rows = units(**{"good": [1.0, 1.0], "good:steps=9": [1.2, 1.2], "other": [1.5, 1.5]})
    table = audit.ratio_table(rows, leaving=["good", "good:steps=9"]).set_index(["estimator", "against"])
    assert table.loc[("good", "without good"), "mean"] == pytest.approx(2 / 3)
    assert table.loc[("good", "without good:steps=9"), "mean"] == 1.0
    assert table.loc[("good:steps=9", "the others"), "mean"] == pytest.approx(1.2)  # "good" is a different estimator


def test_unsolved_images_count_against_every_estimator() -> None:
    rows = units(good=[1.0, 1.0, 3.0, 5.0], bad=[2.0, INF, 9.0, 4.0])
    rows["exact"] = np.tile([1.0, 0.995, NAN, INF], 2)
    rows["exact_lower"] = np.tile([1.0, 0.995, 2.9, INF], 2)
    rows["exact_upper"] = np.tile([1.0, 0.995, 3.1, INF], 2)
    table = audit.ratio_table(rows)
    exact = table[table["against"] == "exact"].set_index("estimator")
    assert (exact["images"] == 3).all()  # an image without a boundary has no margin
    assert (exact["open"] == 1).all()
    assert exact.loc[["good", "envelope"], "within_1"].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert exact.loc["good", "mean"] == pytest.approx((1 + 1 / 0.995) / 2)
    assert exact.loc["good", "worst"] == pytest.approx(1 / 0.995)
    assert exact["missed"].to_dict() == {"good": 0, "bad": 1, "envelope": 0}
    assert exact.loc["bad", "within_5"] == 0.0
    # control: an unsolved image has no effect for other references
    assert (table.loc[table["against"] == "envelope", "open"] == 0).all()
    (left,) = audit.open_table(rows).to_dict("records")
    assert left == {
        **{"problem": "p", "norm": "l2", "image": 2, "lower": 2.9, "upper": 3.1},
        **{"envelope": 3.0, "nearest": "good"},
    }
    rows["exact"] = NAN
    everything = audit.ratio_table(rows[rows["image"] == 2]).set_index(["estimator", "against"])
    assert everything.loc[("good", "exact"), "within_1"] == 0.0
    assert math.isnan(everything.loc[("good", "exact"), "mean"])
    assert audit.open_table(units(one=[1.0])).empty


# --- remarks ---

BLAMELESS: dict[str, Any] = {
    **{"images": 100, "not_found": 0, "failed": 0, "after_noise": 4, "tied": 1, "message": ""},
    **{"median": 1.001, "within_1": 0.9, "within_5": 0.95},
    **{"rank": 0.99, "attack_rank": 0.99, "overstep": 1.01, "hidden": 0.0},
    **{"least_exact": 0.9999, "median_exact": 1.001, "declared_exact": 1.002},
}


@pytest.mark.parametrize(
    ("level", "words", "changed"),
    [
        ("do not use", "none of 100 images was moved", {"not_found": 95, "median": INF}),
        ("do not use", "the 99 distances are those of noisy starts", {"after_noise": 99, "median": 9.0, "rank": 0.1}),
        ("do not use", "unsound: a distance of 0.9500 times the exact", {"least_exact": 0.95}),
        ("do not use", "median 1.50 times the envelope, no image within 1%", {"median": 1.5, "within_1": 0.0}),
        ("do not use", "median 1.03 times", {"median": 1.03, "within_1": 0.0, "within_5": 0.0}),
        ("do not use", "hardly follow the margin: rank correlation 0.20", {"rank": 0.2}),
        ("do not use", "(rank correlation 0.30) and lies 1.40 times", {"attack_rank": 0.3, "overstep": 1.4}),
        ("beware", "oversteps: what it returns lies 1.50 times", {"overstep": 1.5}),
        ("beware", "finds 90 of 100 images only", {"not_found": 10}),
        ("beware", "30 of 100 images were found from noisy starts only", {"after_noise": 30}),
        ("beware", "raised on 1 of 100 images: OSError: oh", {"failed": 1, "message": "OSError: oh"}),
        ("beware", "median 1.0030 times the exact margin, where it declares 1.002", {"median_exact": 1.003}),
        ("note", "over-estimates: median 1.07 times the envelope, 10% of", {"median": 1.07, "within_1": 0.1}),
        ("note", "hides which images 20% of its forwards", {"hidden": 0.2}),
    ],
)
def test_every_rule_has_its_own_message_and_reports_its_own_fault_only(
    level: str, words: str, changed: dict[str, Any]
) -> None:
    assert not [rule for rule, _ in RULES if rule(BLAMELESS)]
    remarks = [(grade, rule(BLAMELESS | changed)) for rule, grade in RULES if rule(BLAMELESS | changed)]
    assert len(remarks) == 1
    assert remarks[0][0] == level
    assert words in remarks[0][1]


@dataclass(frozen=True, kw_only=True)
class Planted(Settings):
    """DeepFool with a defect: ``clean`` images, ``beyond`` (1.5 times its step), or ``aside`` (1.5 times as far where
    the boundary is met, by a detour along directions that no logit sees)."""

    name: ClassVar[str] = "planted"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = True

    defect: str = "none"

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        if self.defect == "clean":
            return images
        step = create("deepfool").perturb(model, images, labels, norm, seeds=seeds) - images
        if self.defect == "beyond":
            return images + 1.5 * step
        if self.defect == "aside":
            weight = next(p for p in model.network.parameters() if p.ndim == 2).double()
            draw = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            unseen = draw - torch.linalg.pinv(weight) @ (weight @ draw)
            length = step.flatten(1).norm(dim=1, keepdim=True)
            detour = math.sqrt(1.5**2 - 1) * length * (unseen / unseen.norm()).to(step)
            return images + step + detour.view_as(step)
        return images + step


@pytest.fixture(scope="module")
def planted() -> Results:
    estimators: dict[str, Estimator] = {name: Planted(defect=name) for name in ("none", "clean", "beyond", "aside")}
    stock = "foolbox:L2FMNAttack"
    measured = measure_problem(affine_problem(40, boxed=False), {**estimators, stock: create(stock)}, ["l2"])
    return evaluate(measured)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clean", "do not use: clean l2 (affine): no witness of its own: none of 40 images"),
        ("aside", "do not use: aside l2 (affine): median 1.50 times the envelope, no image within 1%"),
        ("beyond", "beware: beyond l2 (affine): oversteps: what it returns lies 1.5"),
        (
            "foolbox:L2FMNAttack",
            "do not use: foolbox:L2FMNAttack l2 (affine): what it returns hardly follows the margin",
        ),
    ],
)
def test_planted_defects_are_reported(planted: Results, name: str, words: str) -> None:
    assert [str(item) for item in planted.remarks if item.estimator == name and str(item).startswith(words)]


def test_the_same_estimator_without_a_defect_is_not_reported(planted: Results) -> None:
    assert "none" not in {item.estimator for item in planted.remarks}
    levels = [LEVELS.index(item.level) for item in planted.remarks]
    assert levels == sorted(levels)
    table = planted.estimators.set_index("estimator")
    # the noise retries found these witnesses, so the distances are not margins of the attack
    assert table.loc["clean", "after_noise"] == 40
    assert table.loc["clean", "median"] > 5
    assert table.loc["aside", "median"] == pytest.approx(1.5, abs=0.01)
    assert table.loc["aside", "within_5"] == 0.0
    assert table.loc["beyond", "median"] == pytest.approx(1.0, abs=2e-4)  # refinement corrects it
    assert table.loc["foolbox:L2FMNAttack", "attack_rank"] < 0.5 < 0.95 < table.loc["foolbox:L2FMNAttack", "rank"]


def test_references_get_no_remark(planted: Results) -> None:
    rows = planted.whole.assign(role="reference")
    assert remark(audit.estimator_table(rows), audit.ratio_table(rows)) == []


# --- measured ---


@pytest.fixture(scope="module")
def measured() -> Measured:
    names = ("deepfool", "fmn:steps=40", "pgd:steps=5", "ddn:steps=40")
    return measure_problem(affine_problem(24, boxed=True), {name: create(name) for name in names}, NORMS, repeats=2)


@pytest.mark.slow
def test_on_affine_problems_the_envelope_is_exact(measured: Measured) -> None:
    results = evaluate(measured)
    exact = results.ratios[results.ratios["against"] == "exact"].set_index(["norm", "estimator"])
    for norm in NORMS:
        assert exact.loc[(norm, "envelope"), "mean"] == pytest.approx(1.0, abs=1e-3)
        assert exact.loc[(norm, "envelope"), "worst"] <= exact.loc[(norm, "fmn:steps=40"), "worst"]
        assert exact.loc[(norm, "deepfool"), "declared"] == 1.0002
        assert exact.loc[(norm, "deepfool"), "median"] <= 1.0002
    assert exact["least"].min() > 1 - 1e-4
    assert measured.skipped == ("ddn:steps=40 has no linf: skipped in that norm",)
    # control: most of these are not exact on every problem
    assert exact.loc[("l2", "fmn:steps=40"), "worst"] > 1.05


@pytest.mark.slow
def test_more_passes_never_increase_distances_and_end_at_the_final_ones(measured: Measured) -> None:
    free = evaluate(measured)
    before = None
    for budget in (1, 30, 80, 200, 100_000):
        held = evaluate(measured, budget=budget)
        distance = held.rows["distance"].to_numpy()
        assert before is None or (distance <= before).all()
        assert (held.rows["passes"] <= budget).all()
        before = distance
    pd.testing.assert_frame_equal(held.estimators, free.estimators)
    assert np.isinf(evaluate(measured, budget=1).rows["distance"]).all()
    for key, line in free.curves.groupby(["norm", "estimator"]):
        own = free.estimators.set_index(["norm", "estimator"]).loc[key]
        assert line["within_1"].is_monotonic_increasing
        assert line["median"].is_monotonic_decreasing
        assert line["found"].iloc[0] == 0.0
        assert line["mean"].iloc[-1] == own["mean"]
        assert line["within_1"].iloc[-1] == own["within_1"]


@pytest.mark.slow
def test_references_affect_only_the_envelope(measured: Measured) -> None:
    results = evaluate(measured, references=["deepfool"], leaving=["deepfool"])
    assert (
        set(results.curves["estimator"])
        == set(results.correlations["estimator"])
        == {*("fmn:steps=40", "pgd:steps=5", "ddn:steps=40")}
    )
    with_it = results.ratios.set_index(["norm", "estimator", "against"])["mean"]
    assert with_it["l2", "fmn:steps=40", "envelope"] > with_it["l2", "fmn:steps=40", "without deepfool"]


def test_an_estimator_without_the_domain_is_skipped_unless_it_is_alone() -> None:
    problem, box = affine_problem(3, boxed=True, domain="free"), create("pgd:steps=2")
    both = measure_problem(problem, {"deepfool": create("deepfool"), "pgd:steps=2": box}, ["l2"])
    assert both.skipped == ("pgd:steps=2 has no domain free: skipped there",)
    assert set(both.rows["estimator"]) == {"deepfool"}
    with pytest.raises(ValueError, match="--domain free, got pgd:steps=2"):
        measure_problem(problem, {"pgd:steps=2": box}, ["l2"])


# --- the command ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "run"
    options = ["--model", "dense", "--train-images", "96", "--test-images", "40", "--probe", "12", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert (
            track([*options, "--estimator", "ddn:steps=10", "--device", "cpu", "--threads", "1", "--out", str(out)])
            == 0
        )
    return out


@pytest.mark.slow
def test_margins_of_a_run_are_reproduced(run_folder: Path) -> None:
    problems = list(run_problems(read_run(run_folder), [0, 1], ["train", "test"], 12))
    assert [problem.name for problem in problems][::3] == ["run, epoch 0, train", "run, epoch 1, test"]
    for problem in problems:
        ours = measure_problem(problem, {"ddn:steps=10": create("ddn:steps=10")}, ["l2"]).rows
        theirs = read_part(RunFolder(run_folder).margins(problem.epoch, Unit("ddn:steps=10", "l2")))[0]
        theirs = theirs[theirs["split"] == problem.split].reset_index(drop=True)
        same = [name for name in theirs if name != "seconds"]
        pd.testing.assert_frame_equal(ours[same], theirs[same], check_exact=True)
    first = next(run_problems(read_run(run_folder), [], ["test"], 5))
    assert (first.epoch, len(first.images), first.seeding) == (1, 5, (0, 1, "test"))


@pytest.mark.slow
def test_the_command_prints_and_writes_its_results(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = [
        "--estimator",
        "deepfool",
        "--estimator",
        "ddn:steps=10",
        "--reference",
        "fmn:steps=30",
        "--without",
        "deepfool",
    ]
    assert (
        main([str(run_folder), "--problem", "affine", "--images", "6", "--budget", "60", *asked, "--out", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    for words in (
        "run, epoch 1, test, l2: 6 images, within 60 passes per image",
        "in the envelope only (images on which it beats every estimator): fmn:steps=30",
        "against the envelope without deepfool",
        "against the exact margins (6 images)",
        "rank correlation of distances",
        "on whole runs",
    ):
        assert words in printed
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["options"]["budget"] == 60
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["machine"]["threads"] == 1
    assert [item["estimator"] for item in content["settings"]] == ["deepfool", "ddn:steps=10", "fmn:steps=30"]
    table = pd.read_csv(out / "estimators.csv")
    assert len(table) == len(content["estimators"]) == 2 * 5
    assert (table["passes"][table["role"] == "estimator"] <= 60).all()
    figures = {path.stem for path in out.iterdir() if path.suffix == ".svg"}
    names = {
        f"{kind}-{problem}" for kind in ("cost", "anytime", "security") for problem in ("affine", "run-epoch-1-test")
    }
    assert figures == {path.stem for path in out.iterdir() if path.suffix == ".png"} == names
    written = {
        "comparison.json",
        *(f"{name}.csv" for name in ("estimators", "ratios", "unsolved", "correlations", "anytime", "margins")),
    }
    assert {path.name for path in out.iterdir() if path.suffix not in (".png", ".svg")} == written


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "a run folder or --problem, got neither"),
        (["--problem", "affine", "--epoch", "1"], 2, "a run folder with --epoch"),
        (["--problem", "affine", "--estimator", "deepfol"], 2, "did you mean 'deepfool'?"),
        (["--problem", "affine", "--images", "0"], 2, "expected --images of at least 1"),
        (["--problem", "affine", "--device", "tpu"], 2, "got 'tpu'"),
        (["--problem", "affine", "--without", "cw"], 2, "expected --without to name what is measured"),
        (["--problem", "affine", "--estimator", "ddn", "--norm", "linf"], 2, "a norm that ddn has (l2)"),
        (["RUN", "--epoch", "7"], 1, "a checkpoint in run (0, 1), got 7"),
        (["RUN", "--split", "tost"], 1, "splits of run (train, test), got tost"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    arguments = [str(run_folder) if word == "RUN" else word for word in options]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == code
    stderr = capsys.readouterr().err
    assert words in stderr
    assert ONE_LINE.fullmatch(stderr.rstrip("\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_exact_margins_of_a_relu_network_are_listed_with_the_estimators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in, "relu_problem", partial(built_in.relu_problem, epochs=3))
    asked = ["--problem", "relu", "--images", "6", "--estimator", "cascade", "--estimator", "linear", "--norm", "linf"]
    assert main([*asked, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "exact margins linf: 6 of 6 solved" in printed
    assert "against the exact margins (6 images)" in printed
    assert "left open" not in printed
    table = pd.read_csv("out/ratios.csv")
    exact = table[table["against"] == "exact"].set_index("estimator")
    assert (exact["least"] > 1 - 1e-5).all()
    assert exact.loc["envelope", "worst"] < 1.01
    # control: one step of linearisation is not exact
    assert exact.loc["linear", "worst"] > exact.loc["envelope", "worst"]
    assert len(list((tmp_path / ".exact").iterdir())) == 6
    monkeypatch.setattr(built_in, "exact_margins", partial(built_in.exact_margins, nodes=1))
    shutil.rmtree(tmp_path / ".exact")
    assert main([*asked, "--out", "out"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "against the exact margins (6 images, 6 of them open: in no share" in printed
    assert (
        len(re.findall(r"left open: image \d+, its margin is between 0 and 0\.\d+; the nearest found is", printed)) == 6
    )
    assert len(pd.read_csv("out/unsolved.csv")) == 6


def test_the_command_lists_all_problems() -> None:
    assert tuple(built_in.BUILT_IN) == PROBLEMS


# --- the figures ---


def test_an_estimator_that_missed_images_is_drawn_hollow_and_off_the_front() -> None:
    whole = units(cheap=[1.1, 2.2, INF], good=[1.0, 2.0, 3.0], blind=[INF, INF, INF])
    table = audit.estimator_table(whole)
    table["passes"] = [10.0, 100.0, 5.0]
    (panel,) = cost_figure(table).axes
    drawn = {line.get_marker(): line for line in panel.lines if line.get_marker() not in ("None", "")}
    assert len(drawn) == 2  # the third estimator found nothing
    cheap, good = (drawn[marker] for marker in "os")
    assert (cheap.get_markerfacecolor(), good.get_markerfacecolor()) == ("white", good.get_color())
    assert cheap.get_ydata()[0] == pytest.approx(0.1)
    assert good.get_ydata()[0] == 1e-4  # equal to the envelope
    (front,) = [line for line in panel.lines if line.get_marker() in ("None", "")]
    assert front.get_xdata()[0] == 100.0


def test_security_curves_start_at_the_clean_accuracy_and_never_increase() -> None:
    whole = units(one=[0.5, 1.0, INF, 2.0])
    whole["correct"] = [True, True, True, False]
    (panel,) = security_figure(whole, whole).axes
    own, envelope = panel.lines
    assert own.get_xdata().tolist() == [0.0, 0.0, 0.5, 1.0, pytest.approx(panel.get_xlim()[1])]
    assert own.get_ydata().tolist() == [1.0, 0.75, 0.5, 0.25, 0.25]
    assert envelope.get_ydata().tolist() == own.get_ydata().tolist()


def test_figures_without_data_say_so() -> None:
    nothing = units(one=[1.0]).iloc[:0]
    for figure in (cost_figure(nothing), anytime_figure(nothing), security_figure(nothing, nothing)):
        assert "There is n" in figure.texts[0].get_text()
