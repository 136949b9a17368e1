"""Figure 1 against the plain script: equal margins, the arithmetic of the totals, and detection of a wrong script."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.figure1 import script
from benchmarks.figure1.__main__ import main
from benchmarks.figure1.measuring import Totals, pass_share, rows_of, totals
from harness.data.builtin import load
from harness.runs import Run, read_run
from harness.track import main as track

OPTIONS = ("--dataset", "digits", "--epochs", "2", "--probe", "12", "--estimator", "deepfool", "--threads", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("figure1") / "run"
    assert track([*OPTIONS, "--device", "cpu", "--every", "2", "--out", str(folder)]) == 0
    return read_run(folder)


@pytest.mark.slow
def test_the_script_and_the_harness_give_the_same_margins(run: Run) -> None:
    rows = list(rows_of(run, [0, 2], ["l2", "linf"], "deepfool"))
    assert [(row.epoch, row.split, row.norm) for row in rows][:3] == [
        (0, "train", "l2"),
        (0, "train", "linf"),
        (0, "test", "l2"),
    ]
    assert len(rows) == 8
    for row in rows:
        assert row.same == row.both == row.found == row.their_found == row.images == 12
        assert row.average == pytest.approx(row.their_average, rel=1e-4)
        mine = run.margins.query("epoch == @row.epoch and split == @row.split and norm == @row.norm")
        assert row.average == pytest.approx(mine["attack_distance"].mean(), rel=1e-4)
        assert min(row.ours, row.theirs) > 0


@pytest.mark.slow
def test_a_wrong_script_is_detected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = script.margins

    def wrong(model: nn.Module, images: Tensor, norm: str) -> Tensor:
        found = 1.001 * honest(model, images, norm)
        found[0] = torch.inf
        return found

    monkeypatch.setattr(script, "margins", wrong)
    (row, *_) = rows_of(run, [2], ["l2"], "deepfool")
    assert (row.same, row.both, row.their_found) == (0, 11, 11)


@pytest.mark.slow
def test_totals_add_up(run: Run) -> None:
    rows = list(rows_of(run, [0, 2], ["l2"], "deepfool"))
    whole = totals(run, load("digits"), rows, ours=10.0)
    each = {epoch: sum(row.theirs for row in rows if row.epoch == epoch) for epoch in (0, 2)}
    # the epoch between them by interpolation
    assert whole.margins == pytest.approx(1.5 * (each[0] + each[2]))
    assert whole.theirs == pytest.approx(whole.training + whole.errors + whole.margins)
    assert min(whole.training, whole.errors) > 0
    assert Totals(ours=1.0, training=2.0, errors=3.0, margins=4.0).theirs == 9.0


@pytest.mark.slow
def test_the_share_of_passes_grows_with_their_cost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    share = pass_share(run, ["l2"], "deepfool")
    assert 0.2 < share < 0.95
    forward = nn.ReLU.forward

    def slowly(self: nn.ReLU, images: Tensor) -> Tensor:
        time.sleep(0.003)
        return forward(self, images)

    monkeypatch.setattr(nn.ReLU, "forward", slowly)
    assert pass_share(run, ["l2"], "deepfool") > share + 0.1
    assert torch.autograd.grad.__module__ == "torch.autograd"


@pytest.mark.slow
def test_the_script_and_the_run_have_the_same_error(run: Run) -> None:
    from benchmarks.problems import run_problems

    test = load("digits").test
    problem = next(iter(run_problems(run, [2], ["test"], 1)))
    error = script.error(problem.model, test.pixels(torch.arange(len(test))), test.labels)
    assert error == pytest.approx(run.epochs.query("epoch == 2 and split == 'test'")["error"].item())


@pytest.mark.slow
def test_the_command_writes_a_page_and_refuses_an_existing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figure1"
    options = ["--dataset", "digits", "--epochs", "1", "--probe", "6", "--out", str(out)]
    assert main(options) == 0
    stdout = capsys.readouterr().out
    assert "margins: 48 of 48 the same within 0.0001" in stdout
    content = json.loads((out / "figure1.json").read_text())
    assert [row["same"] for row in content["rows"]] == [6] * 8
    assert content["totals"]["ours"] > 5
    assert all(line in (out / "figure1.md").read_text() for line in content["said"])
    assert (out / "figure1.png").stat().st_size > 10_000
    assert main(options) == 2
    assert "expected a new folder for --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--epochs", "0"], "expected --epochs of at least 1, got 0"),
        (["--at", "3", "--epochs", "2"], "expected --at of 0 to 2, got 3"),
        (["--nonsense"], "unknown option --nonsense"),
    ],
)
def test_bad_usage_gives_a_one_line_error(
    options: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*options, "--out", str(tmp_path / "new")])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
