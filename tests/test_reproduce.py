"""The study: its file, the stored summaries of runs, and a page that agrees with the tables."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from attacks.affine import affine_margins
from benchmarks.problems import Problem, affine_problem
from benchmarks.reproduce import numbers
from benchmarks.reproduce.__main__ import STUDY, main
from benchmarks.reproduce.around import crossings, free_against_box
from benchmarks.reproduce.around import main as surround
from benchmarks.reproduce.claims import by_test, read_off
from benchmarks.reproduce.collecting import confidence, flow
from benchmarks.reproduce.page import NOTES
from benchmarks.reproduce.running import StepError, run_step, steps_of
from benchmarks.reproduce.stored import FILE, Stored, number, span
from benchmarks.reproduce.study import read_study
from benchmarks.reproduce.tables import Key, read_tables, write_tables
from harness.config.options import ConfigError
from harness.data.probes import Probe
from harness.store.identity import StoreError
from harness.track import main as track

ROOT = Path(__file__).parents[1]
SMALL = """
[defaults]
epochs = 40
probe = 8
estimator = ["deepfool"]
checkpoints = [0, 1]

[[group]]
name = "pair"
title = "A pair"
stage = 1
options = { dataset = "digits", model = "dense", estimator = ["deepfool", "fmn"] }
runs = [{ training = "standard" }, { training = "pgd" }]
added = { linear = [1] }
pictures = { "digits-dense-pgd/margins" = "A picture" }

[[group]]
name = "seeds"
title = "Seeds"
stage = 2
options = { dataset = "digits", model = "dense" }
runs = [{ training = "standard" }, { loss = "hinge" }]
seeds = [0, 3]
added = { linear = [1, 2], fmn = [2] }
checkpoints = [2]
"""


def written(folder: Path, text: str = SMALL) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


# the file


def test_a_run_of_two_groups_is_run_once_with_the_options_of_both(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    assert [group.name for group in study.groups] == ["pair", "seeds"]
    assert study.groups[1].runs == (
        "digits-dense-standard",
        "digits-dense-standard-seed-3",
        "digits-dense-standard-loss-hinge",
        "digits-dense-standard-loss-hinge-seed-3",
    )
    shared = study.runs["digits-dense-standard"]
    assert shared.options["estimator"] == ["deepfool", "fmn"]
    assert shared.added == {"linear": (1, 2)}  # fmn already measures every epoch
    assert shared.checkpoints == (0, 1, 2)
    own = study.runs["digits-dense-standard-loss-hinge-seed-3"]
    assert (own.options["estimator"], own.options["seed"], own.options["loss"]) == (["deepfool"], 3, "hinge")
    assert list(study.upto(1).runs) == ["digits-dense-standard", "digits-dense-pgd"]


def test_steps_are_valid_commands(tmp_path: Path) -> None:
    run = read_study(written(tmp_path)).runs["digits-dense-pgd"]
    track, compare, around = steps_of(run, tmp_path, "data")
    assert " ".join(track).startswith("-m harness.track --resume --out ")
    assert " ".join(track).endswith(
        "--epochs 40 --probe 8 --estimator deepfool --estimator fmn "
        "--dataset digits --model dense --training pgd --seed 0"
    )
    assert compare[-6:] == ["--estimator", "linear", "--threads", "1", "--epoch", "1"]
    assert around[1:] == ["benchmarks.reproduce.around", str(tmp_path / "digits-dense-pgd"), "--epoch", "0", "1"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("probe = 8", "prob = 8", "expected options of .*, got prob"),
        ('loss = "hinge"', 'loss = "mse"', "expected --loss"),
        ("stage = 1\n", "", "got or missed stage"),
        ("seeds = [0, 3]", "seed = [0, 3]", "got or missed seed"),
        ('model = "dense" }\nruns', 'model = "dense", probe = 9 }\nruns', "two of different probe"),
        ("[[group]]", "[[grup]]", "expected groups in"),
        ("[defaults]", "[defaults", "expected a TOML file"),
    ],
)
def test_an_invalid_study_file_is_refused(
    before: str, after: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, SMALL.replace(before, after))
    with pytest.raises(ConfigError, match=message):
        read_study(path)
    assert main(["--study", str(path), "--runs", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_committed_study_is_valid() -> None:
    study = read_study(STUDY)
    assert len(study.runs) == len({name for group in study.groups for name in group.runs})
    assert {group.stage for group in study.groups} == set(range(1, 7))
    for planned in study.runs.values():
        last = planned.options["epochs"]
        assert all(0 <= epoch <= last for epochs in planned.added.values() for epoch in epochs)


def test_a_step_is_done_once_and_a_failing_one_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    once = ["-c", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"]
    for _ in range(2):
        run_step("run", once, tmp_path, said.append)
    assert (tmp_path / "count").read_text() == "x"
    assert len(said) == 1
    for _ in range(2):
        with pytest.raises(StepError, match=r"exit code 3 \(gone wrong\); see .*run\.log"):
            run_step("run", ["-c", "print('gone wrong'); raise SystemExit(3)"], tmp_path, said.append)
    assert len(said) == 3


# free margins and random directions


def test_random_directions_cross_as_often_as_geometry_predicts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    images = torch.full((200, 1, 1, 2), 0.5)
    problem = Problem("plane", model, Probe(images, torch.zeros(200, dtype=torch.int64), torch.arange(200)))
    rows = crossings(problem, "l2", np.full(200, 0.5))
    for row in rows:
        # the angle to the normal must be below arccos(1 / times), on one side
        expected = math.acos(1 / row["times"]) / math.pi  # type: ignore[operator]
        error = math.sqrt(expected * (1 - expected) / 2000)
        assert row["crossed"] == pytest.approx(expected, abs=4 * error + 1e-3)
        assert (row["images"], row["directions"]) == (200, 10)
    # with twice the margin the same directions cross later
    assert crossings(problem, "l2", np.full(200, 0.25))[1]["crossed"] < rows[1]["crossed"]  # type: ignore[operator]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_free_margins_are_compared_with_those_in_the_box(norm: str) -> None:
    problem = affine_problem(40, boxed=True)
    layer = problem.model[1]  # type: ignore[index]
    exact = {
        domain: affine_margins(layer.weight, layer.bias, problem.images, norm, domain=domain).numpy()  # type: ignore[arg-type]
        for domain in ("box", "free")
    }
    exact["box"][3] = np.inf
    row = free_against_box(problem, norm, exact["box"])  # type: ignore[arg-type]
    kept = np.arange(40) != 3
    expected = exact["free"][kept].mean() / exact["box"][kept].mean()
    assert expected < 0.99  # the box binds
    assert row["ratio"] == pytest.approx(expected, rel=1e-3)
    assert (row["images"], row["box_unfound"], row["free_unfound"]) == (39, 1, 0)
    inside = replace(affine_problem(40, boxed=False))
    layer = inside.model[1]  # type: ignore[index]
    box = affine_margins(layer.weight, layer.bias, inside.images, norm, domain="box").numpy()  # type: ignore[arg-type]
    assert free_against_box(inside, norm, box)["nearer"] == 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_without_deepfool_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    options = ["--epochs", "0", "--probe", "4", "--estimator", "linear", "--model", "dense", "--device", "cpu"]
    assert track([*options, "--out", run]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        surround([run, "--epoch", "0"])
    assert "expected l2 margins by deepfool at epoch 0 of run, got none" in capsys.readouterr().err
    assert not (tmp_path / "run.around").exists()


# stored tables


def test_flow_and_confidence_count_whole_sets() -> None:
    correct = pd.DataFrame({0: [0, 0, 0, 0], 1: [1, 0, 0, 0], 2: [1, 0, 1, 1], 3: [0, 0, 1, 1]}).astype(bool)
    table = flow("train", correct)
    assert table["incorrect"].tolist() == [4, 3, 1, 2]
    assert table["incorrect_before"].tolist()[1:] == [3, 1, 1]
    assert table["of_first_now_correct"].tolist()[1:] == pytest.approx([0, 2 / 3, 2 / 3])
    assert table.loc[0, ["incorrect_before", "of_first_now_correct"]].isna().all()
    predictions = {
        "epoch": 1,
        "split": "test",
        "label": [1, 2, 3],
        "prediction": [1, 2, 0],
        "confidence": [0.9, 0.7, 0.6],
    }
    averages = confidence(pd.DataFrame(predictions)).set_index("correct")
    assert averages.loc[True, "confidence"] == pytest.approx(0.8)
    assert averages["images"].to_dict() == {False: 1, True: 2}


def test_tables_round_trip(tmp_path: Path) -> None:
    tables: dict[Key, pd.DataFrame] = {
        ("run", "summary"): pd.DataFrame(
            {
                "epoch": [0, 1],
                "avg": [0.1, 1 / 3],
                "correct": [True, False],
                "note": [None, "a, b"],
                "low": [None, None],
            }
        ),
        ("other", "summary"): pd.DataFrame({"epoch": [2], "avg": [2.0], "split": pd.Categorical(["test"])}),
        ("run", "flow"): pd.DataFrame({"epoch": [0, 1], "incorrect_before": [None, 3]}),
        ("run", "nothing"): pd.DataFrame({"epoch": []}),
    }
    path = tmp_path / FILE
    write_tables(path, tables)
    stored = read_tables(path)
    assert list(stored) == [("run", "summary"), ("other", "summary"), ("run", "flow")]
    summary = stored["run", "summary"]
    assert list(summary) == ["epoch", "avg", "correct", "note", "low", "split"]
    assert summary["epoch"].tolist() == [0, 1]
    assert summary["epoch"].dtype == np.int64
    assert summary["avg"].tolist() == [0.1, 0.333333]  # six digits
    assert summary["correct"].tolist() == [True, False]
    assert summary["note"].isna().tolist() == [True, False]
    assert summary["note"][1] == "a, b"
    assert summary["low"].isna().all()
    assert summary["low"].dtype == np.float64
    assert stored["other", "summary"]["split"].tolist() == ["test"]
    assert list(stored["run", "flow"]) == ["epoch", "incorrect_before"]
    assert np.array_equal(stored["run", "flow"]["incorrect_before"], [np.nan, 3.0], equal_nan=True)
    write_tables(tmp_path / "again.parquet", stored)
    for key, table in read_tables(tmp_path / "again.parquet").items():
        pd.testing.assert_frame_equal(table, stored[key])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and no more", b"group,claim\n"])
def test_a_damaged_file_of_tables_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / FILE
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"expected a study's tables at .*; restore it, or collect again"):
        read_tables(path)


# claims

CURVES: dict[str, Callable[[int], float]] = {
    "falling": lambda epoch: 0.2 if epoch == 0 else 1 - 0.01 * epoch,
    "rising": lambda epoch: 0.2 if epoch == 0 else 1 + 0.01 * epoch,
}


def summaries(folder: Path, standard: str, pgd: str, changed: dict[Key, pd.DataFrame] | None = None) -> Stored:
    """Stored tables of the pair, every curve of a run the same.

    Args:
        changed: tables that replace the defaults.
    """
    epochs = range(41)
    tables: dict[Key, pd.DataFrame] = {("pair", "observations"): pd.DataFrame({"claim": ["none"]})}
    for training, shape in (("standard", standard), ("pgd", pgd)):
        rows = [
            {
                "epoch": epoch,
                "split": split,
                "subset": subset,
                "estimator": estimator,
                "norm": norm,
                "count": 80,
                "found": 80,
                "avg": CURVES[shape](epoch) * (0.5 if subset == "incorrect" else 1),
                "se": 0.01,
            }
            for epoch in epochs
            for split in ("train", "test")
            for subset in ("all", "correct", "incorrect")
            for estimator in ("deepfool", "fmn")
            for norm in ("l2", "linf")
        ]
        errors = [{"epoch": e, "split": s, "error": 0.5 - 0.01 * e} for e in epochs for s in ("train", "test")]
        run = f"digits-dense-{training}"
        tables |= {(run, "summary"): pd.DataFrame(rows), (run, "epochs"): pd.DataFrame(errors)}
    out = folder / "out"
    write_tables(out / FILE, tables | (changed or {}))
    return Stored(read_study(written(folder)), out)


@pytest.mark.parametrize(
    ("value", "holds", "training", "falling", "rising"),
    [
        (numbers.later_peak, lambda x: x < 1, "standard", 0.98 / 0.99, 1.4 / 1.01),
        (numbers.change, lambda x: x < 1, "standard", 0.6 / 0.99, 1.4 / 1.01),
        (numbers.change_of("incorrect"), lambda x: x < 1, "standard", 0.6 / 0.99, 1.4 / 1.01),
        (numbers.while_error_falls, lambda x: x < 1, "standard", 0.6 / 0.99, 1.4 / 1.01),
        (numbers.with_accuracy, lambda x: x < -0.5, "standard", -1, 1),
        (numbers.tau, lambda x: x < -0.5, "standard", -1, 1),
        (numbers.largest_error, lambda x: x > 0.01, "standard", 0.01 / 0.6, 0.01 / 1.01),
    ],
)
def test_a_number_decides_a_claim_and_the_opposite_curve_reverses_it(
    value: numbers.Number,
    holds: Callable[[float], bool],
    training: str,
    falling: float,
    rising: float,
    tmp_path: Path,
) -> None:
    for shape, expected, verdict in (("falling", falling, "supported"), ("rising", rising, "not supported")):
        folder = tmp_path / shape
        folder.mkdir()
        stored = summaries(folder, shape, "rising")
        rows = read_off(value, holds, training)(stored)
        assert [(row.group, row.estimator, row.seeds) for row in rows] == [("pair", "deepfool", 1), ("pair", "fmn", 1)]
        assert {row.verdict for row in rows} == {verdict}
        assert value(stored, "digits-dense-standard", "fmn", "linf", "test") == pytest.approx(expected, rel=1e-4)
        assert rows[0].measured == f"L2 {number(expected)}; L∞ {number(expected)}"


def test_too_few_incorrect_images_leave_claims_undecided(tmp_path: Path) -> None:
    stored = summaries(tmp_path, "falling", "rising")
    value = numbers.change_of("incorrect")
    assert len(read_off(value, lambda x: x < 1, "standard")(stored)) == 2
    table = stored.run("digits-dense-standard", "summary").copy()
    table.loc[(table["subset"] == "incorrect") & (table["epoch"] == 40), "found"] = 9
    (tmp_path / "few").mkdir()
    few = summaries(tmp_path / "few", "falling", "rising", {("digits-dense-standard", "summary"): table})
    assert read_off(value, lambda x: x < 1, "standard")(few) == []
    assert len(read_off(numbers.change_of("correct"), lambda x: x < 1, "standard")(few)) == 2


def test_an_adversarial_run_is_compared_with_the_standard_one(tmp_path: Path) -> None:
    stored = summaries(tmp_path, "falling", "rising")
    ratio = numbers.against_standard(numbers.last_average)
    assert ratio(stored, "digits-dense-pgd", "deepfool", "l2", "test") == pytest.approx(1.4 / 0.6, rel=1e-4)
    later = read_off(numbers.against_standard(numbers.peak_epoch), lambda x: x > 1, "pgd")(stored)
    assert {row.verdict for row in later} == {"supported"}
    earlier = read_off(numbers.against_standard(numbers.peak_epoch), lambda x: x < 1, "pgd")(stored)
    assert {row.verdict for row in earlier} == {"not supported"}


def test_verdicts_of_tests_are_joined_per_estimator(tmp_path: Path) -> None:
    run = "digits-dense-standard"
    rows = [
        ("decline", run, "deepfool", "l2", "test", -0.25, "supported"),
        ("decline", run, "deepfool", "linf", "test", -0.125, "supported"),
        ("decline", run, "envelope", "l2", "train", -0.5, "supported"),
        ("decline", run, "envelope", "l2", "test", 0.5, "not supported"),
        ("decline", run, "fmn", "l2", "test", 0.5, "not supported"),
        ("closer", "digits-dense-pgd", "deepfool", "l2", "test", 0.5, "supported"),
    ]
    columns = ["claim", "run", "estimator", "norm", "split", "value", "verdict"]
    table = pd.DataFrame(rows, columns=columns).assign(effect="median change", low=-1.0, high=1.0, images=8)
    stored = summaries(tmp_path, "falling", "rising", {("pair", "observations"): table})
    result = by_test("decline")(stored)
    assert [(row.estimator, row.verdict) for row in result] == [
        ("deepfool", "supported"),
        ("envelope", "mixed: 1 supported, 1 not supported"),
    ]
    assert result[0].measured == "median change: L2 −0.250 (−1.00 to 1.00); L∞ −0.125 (−1.00 to 1.00)"
    assert [row.estimator for row in by_test("closer", "pgd")(stored)] == ["deepfool"]
    assert by_test("closer", "standard")(stored) == []


def test_numbers_have_a_fixed_number_of_digits() -> None:
    assert [number(x) for x in (0.0, 1234.5, 0.01234, -2.0, math.nan)] == ["0", "1234", "0.0123", "−2.00", "–"]
    assert span([1.0, math.nan, 2.0]) == "1.00 to 2.00"
    assert span([1.0, 1.0001]) == "1.00"
    assert span([]) == "–"


# the page


@pytest.mark.slow
def test_the_committed_page_is_generated_from_the_committed_tables(tmp_path: Path) -> None:
    committed = ROOT / "docs/reproduction"
    out = tmp_path / "reproduction"
    out.mkdir()
    for name in (FILE, NOTES):
        shutil.copy(committed / name, out)
    assert main(["--page", "--out", str(out)]) == 0
    page = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    assert (tmp_path / "reproduction.md").read_text(encoding="utf-8") == page
    made = sorted(path.name for path in out.glob("*.csv"))
    assert made == sorted(path.name for path in committed.glob("*.csv"))
    for name in made:
        assert (out / name).read_bytes() == (committed / name).read_bytes()
    pictures = {path.relative_to(committed).as_posix() for path in committed.rglob("*.png")}
    assert pictures == set(re.findall(r"\(reproduction/(\S+\.png)\)", page))
    assert len(pictures) <= 12


def test_a_page_without_one_of_its_tables_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_tables(ROOT / "docs/reproduction" / FILE)
    pair = ("fashion-mnist-cnn", "fashion-mnist-cnn-standard", "fashion-mnist-cnn-pgd")
    tables = {key: table for key, table in whole.items() if key[0] in pair}
    del tables["fashion-mnist-cnn-pgd", "summary"]
    write_tables(tmp_path / "reproduction" / FILE, tables)
    assert main(["--page", "--out", str(tmp_path / "reproduction")]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("reproduce: error: expected a table summary of fashion-mnist-cnn-pgd in ")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "reproduction.md").exists()


@pytest.mark.slow
def test_a_short_study_runs_to_its_page_and_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SMALL.split('\n[[group]]\nname = "seeds"')[0].replace("epochs = 40", "epochs = 2")
    arguments = [
        "--study",
        str(written(tmp_path, text)),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("python -m") == 6
    page = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "### A picture\n\n![A pair](out/pair/digits-dense-pgd-margins.png)" in page
    assert (tmp_path / "out/pair/digits-dense-pgd-margins.png").stat().st_size > 10_000
    assert '\ndigits-dense-pgd,"pgd, 10 PGD steps' in (tmp_path / "out/runs.csv").read_text(encoding="utf-8")
    claims = pd.read_csv(tmp_path / "out/claims.csv")
    assert {"jump", "pgd-level", "closer", "directions"} <= set(claims["claim"])
    assert main([*arguments, "--stage", "1"]) == 0
    assert "python -m" not in capsys.readouterr().out
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == page
