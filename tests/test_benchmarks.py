"""The benchmarks' commands: their numbers, their files and their errors."""

import importlib.util
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from attacks import create
from attacks.measure import measure
from attacks.types import NORMS, Norm
from benchmarks import estimators as benchmark
from benchmarks import own, scaling, sweeping
from benchmarks.problems import slab_problem


def test_ratios_are_to_the_exact_margin() -> None:
    rows = benchmark.compare(benchmark.affine_problem(16, boxed=False), ["deepfool", "fmn"])
    assert [(row.estimator, row.norm) for row in rows] == [
        ("deepfool", "l2"),
        ("fmn", "l2"),
        ("deepfool", "linf"),
        ("fmn", "linf"),
    ]
    exact, runner_up = rows[0], rows[1]
    assert exact.found == 1.0
    assert 1.0 < exact.worst < 1.001
    # the control: fmn follows the runner-up logit, which is not always the nearest class here
    assert runner_up.worst > 1.05
    assert exact.forwards == pytest.approx(20)
    # one for each other class, and one where it turns out to be across
    assert exact.backwards == pytest.approx(9 + 1)


def test_statistics_of_nothing_are_nan() -> None:
    problem = benchmark.affine_problem(4, boxed=False)
    _, bias = problem.model.parameters()
    bias.data[0] += 1e6  # no other class can be reached in the box
    rows = benchmark.compare(problem, ["deepfool:steps=3"])
    assert [row.found for row in rows] == [0.0, 0.0]
    assert all(math.isnan(row.median) and math.isnan(row.within_1_percent) for row in rows)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "digits_problem", lambda images, epochs: benchmark.affine_problem(images, False))
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--images", "8", "--estimator", "deepfool", "--out", str(tmp_path / "table.json")])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| problem | estimator | norm | found |")
    assert len(printed) == 2 + 3 * 2
    written = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert len(written["rows"]) == 6
    assert written["rows"][0]["median"] == pytest.approx(1.0001, abs=1e-4)
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--estimator", "deepfol"], "did you mean 'deepfool'?"), (["--images", "0"], "of at least 1, got less")],
)
def test_bad_options_are_one_line(option: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(option)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said


@pytest.mark.parametrize("norm", NORMS)
def test_margins_of_the_slab_are_those_to_the_nearer_plane(norm: Norm) -> None:
    problem = slab_problem(48)
    assert problem.exact is not None
    truth = problem.exact(norm).margin
    inside = problem.probe.labels == 0
    assert 0.4 < inside.double().mean() < 0.6
    found = measure(problem.model, problem.images, create("cascade:budget=100"), norm).distance / truth
    assert found.min() >= 1 - 1e-5
    assert found.quantile(0.9) <= 1.001
    # the control: other images have other margins
    moved = measure(problem.model, 0.9 * problem.images, create("cascade:budget=100"), norm).distance / truth
    assert (moved - 1).abs().median() > 0.05


def test_scaling_holds_workers_to_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workers", "1", "--images", "12", "--batch", "4", "--repeats", "1", "--model", "dense"]
    assert scaling.main([*options, "--out", str(tmp_path / "scaling.json")]) == 0
    facts = json.loads((tmp_path / "scaling.json").read_text())
    assert facts["rows equal"] is True
    assert list(facts["seconds"]) == ["one process", "local, 1 worker"]
    assert all(len(seconds) == 1 for seconds in facts["seconds"].values())
    assert capsys.readouterr().out.splitlines() == (tmp_path / "scaling.md").read_text().splitlines()


def test_rows_that_differ_fail_the_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draws = iter(range(100))
    monkeypatch.setattr(scaling, "_rows", lambda *_: pd.DataFrame({"distance": [next(draws)]}))
    options = ["--workers", "1", "--images", "4", "--batch", "4", "--repeats", "1", "--model", "dense"]
    assert scaling.main([*options, "--estimator", "linear"]) == 1
    assert "rows differ" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_networks_and_pictures_of_others(tmp_path: Path) -> None:
    assert own.main(["--images", "200", "--epochs", "1", "--probe", "8", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "own.json").read_text())
    assert facts["largest relative difference"] < 1e-4
    assert {row["run"] for row in facts["averages"]} == {"checkpoints", "folders"}


@pytest.mark.slow
def test_a_sweep_survives_kills(tmp_path: Path) -> None:
    text = (
        '[options]\nmodel = "dense"\nepochs = 1\ntrain_images = 64\ntest_images = 20\nprobe = 8\n'
        'estimator = ["linear"]\ndevice = "cpu"\n[grid]\nloss = ["hinge", "cross-entropy"]\n'
    )
    (tmp_path / "grid.toml").write_text(text)
    assert sweeping.main([str(tmp_path / "grid.toml"), "--kills", "2", "--out", str(tmp_path / "killed.json")]) == 0
    facts = json.loads((tmp_path / "killed.json").read_text())
    assert (facts["runs"], facts["kills"], facts["wrong"]) == (2, 2, [])
    assert facts["rows"] > 0
