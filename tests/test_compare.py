"""`python -m harness.compare`: the same margins as while training, and which estimators to trust."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.compare import main
from harness.report.prose.sentences import trust_sentences
from harness.statistics.trust import BIAS_COLUMNS, bias_trend, contradictions, verdicts_by_estimator
from harness.store import RunFolder, Unit
from harness.store.tables import read_part
from harness.track import main as track
from tests.runs import ONE_LINE, state

RUN = [
    *("--model", "dense", "--train-images", "96", "--test-images", "40", "--device", "cpu", "--threads", "1"),
    *("--probe", "12", "--epochs", "2", "--estimator", "deepfool:steps=10"),
]
LATER = "ddn:steps=10"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with one estimator, and the same with two from the start."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert track([*RUN, "--out", str(folder / "one")]) == 0
        assert track([*RUN, "--estimator", LATER, "--out", str(folder / "both")]) == 0
    return folder / "one", folder / "both"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])


def test_margins_match_those_of_tracking(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, both = runs
    before = state(one)
    assert main([str(one), "--estimator", LATER, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{LATER} has no linf: skipped in that norm" in printed
    assert "average distance / average of the envelope" in printed
    for epoch in range(3):
        ours, theirs = (read_part(RunFolder(run).margins(epoch, Unit(LATER, "l2")))[0] for run in (one, both))
        pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"), check_exact=True)
    tables = [pd.read_csv(run / "summary.csv").drop(columns="seconds") for run in (one, both)]
    keys = ["epoch", "split", "subset", "estimator", "norm"]
    first, second = (table.sort_values(keys).reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    named = [entry["estimator"] for entry in RunFolder(one).read_manifest()["estimators"]]
    assert named == ["deepfool:steps=10", LATER]
    # existing files are unchanged except the tables that grow
    changed = {name for name, value in state(one).items() if name in before and value[1] != before[name][1]}
    assert changed == {"manifest.json", "summary.csv"}
    # a second call computes nothing
    after = state(one)
    assert main([str(one), "--estimator", LATER, "--threads", "1"]) == 0
    parts = {name for name in after if name.startswith("margins/")}
    assert {name: value for name, value in state(one).items() if name in parts} == {name: after[name] for name in parts}


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert main(list(argv)) == code
    printed = capsys.readouterr()
    assert ONE_LINE.fullmatch(printed.err.rstrip("\n")), printed.err
    return printed.err


def test_bad_input_gives_a_one_line_error_and_changes_nothing(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, both = runs
    before = state(both)
    assert "did you mean 'fmn'" in refused(capsys, 2, str(both), "--estimator", "fnm")
    assert "--threads of at least 1, got 0" in refused(capsys, 2, str(both), "--threads", "0")
    assert "expected a run folder" in refused(capsys, 1, str(both / "none"), "--estimator", "fmn")
    assert "expected epochs that both measured (0, 1, 2), got [7]" in refused(
        capsys, 1, str(both), "--estimator", "fmn", "--epoch", "7"
    )
    assert "expected a norm that" in refused(capsys, 2, str(both), "--estimator", "ddn", "--norm", "linf")
    assert state(both) == before


def test_a_missing_checkpoint_is_named_before_anything_changes(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    RunFolder(run).checkpoint(0).unlink()
    before = state(run)
    assert "epoch-000.safetensors" in refused(capsys, 1, str(run), "--estimator", "fmn:steps=2")
    assert state(run) == before


# statistics


def finding(estimator: str, verdict: str, norm: str = "l2", effect: str = "median change") -> dict[str, object]:
    key = {"observation": 1, "claim": "decline", "run": "run", "estimator": estimator, "norm": norm, "split": "test"}
    return key | {"measure": "distance", "epochs": "1 → 9", "effect": effect, "verdict": verdict}


def test_verdicts_are_compared_only_for_the_same_test() -> None:
    rows = [finding("a", "supported"), finding("b", "supported"), finding("a", "not supported", norm="linf")]
    table = verdicts_by_estimator(pd.DataFrame(rows))
    assert table["verdict"].tolist() == ["supported", "supported"]
    assert contradictions(pd.DataFrame(rows)) == []
    # control: for the same test they differ
    rows.append(finding("b", "supported", norm="linf"))
    table = verdicts_by_estimator(pd.DataFrame(rows))
    assert table["verdict"].tolist() == ["mixed", "supported"]
    assert contradictions(pd.DataFrame(rows)) == [
        "supported by b; not supported by a (linf test, epochs 1 → 9)",
    ]


def test_an_undecided_test_contradicts_no_estimator() -> None:
    assert contradictions(pd.DataFrame([finding("a", "supported"), finding("b", "undecided")])) == []


def test_untestable_claims_do_not_count_against_an_estimator() -> None:
    rows = [finding("a", "supported"), finding("a", "undecided", norm="linf", effect="")]
    table = verdicts_by_estimator(pd.DataFrame(rows))
    assert table[["supported", "undecided", "untested", "verdict"]].values.tolist() == [[1, 0, 1, "supported"]]


def ratios(first: float, last: float, half: float) -> pd.DataFrame:
    rows = [
        {"epoch": epoch, "split": "test", "estimator": "a", "norm": "l2", "ratio": value, "images": 9}
        for epoch, value in ((0, 3.0), (1, first), (5, 1.5), (9, last))
    ]
    table = pd.DataFrame(rows)
    return table.assign(low=table["ratio"] - half, high=table["ratio"] + half)


def test_a_bias_that_changes_over_epochs_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    moved, still = bias_trend(ratios(1.1, 1.4, 0.1)), bias_trend(ratios(1.1, 1.4, 0.2))
    assert moved[["first_epoch", "first", "last_epoch", "last"]].values.tolist() == [[1, 1.1, 9, 1.4]]
    assert (moved["apart"].tolist(), still["apart"].tolist()) == ([True], [False])
    none = pd.DataFrame([finding("a", "supported")])
    lines = trust_sentences(moved.assign(run="run"), none)
    assert lines[0] == (
        "a (run): L₂ 1.100 times the envelope at epoch 1, 1.400 times at epoch 9 (part of its curve is its own bias)."
    )
    assert lines[1] == "No verdict is supported by one estimator and contradicted by another."
    assert "harness.compare" in trust_sentences(pd.DataFrame(columns=list(BIAS_COLUMNS)), none)[0]
    assert np.isfinite(moved["first"]).all()
