"""`python -m harness.report` from folders to files: its files, its output and its errors."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.report.__main__ import main
from harness.report.assemble import assemble
from harness.report.cards import SHOWN, image_cards
from harness.report.prose.sentences import CLAIMS, NOT_TESTED, headlines
from harness.runs import EPOCH_COLUMNS, read_run, read_runs
from harness.statistics.observations.evidence import gather
from harness.statistics.observations.verdicts import FINDING_COLUMNS
from harness.store import RunFolder, Unit
from harness.store.folder import SCHEMA
from harness.store.tables import write_csv
from tests.pages import STATIC_FIGURES
from tests.runs import ONE_LINE, state
from tests.simulate import margin_rows, predictions_of

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
IMAGES = 40
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(
    folder: Path,
    *,
    epochs: int = 4,
    shrink: float = 0.8,
    wrong: int = 12,
    found: bool = True,
    predictions: bool = True,
    splits: tuple[str, ...] = ("train", "test"),
    estimators: tuple[str, ...] = ("deepfool", "fmn"),
    classes: int = 3,
    **config: Any,
) -> Path:
    """A run folder whose margins shrink by a constant factor at every epoch after the first.

    The first ``wrong`` images are misclassified, and three times closer.
    """
    out = RunFolder(folder)
    draw = np.random.default_rng(0)
    facts = {"dataset": "digits", "training": "standard", "seed": 0} | config
    described = [{"estimator": name, "name": name, "parameters": {}} for name in estimators]
    folder.mkdir(parents=True)
    out.write_manifest({"schema": SCHEMA, "config": facts, "fingerprint": facts, "estimators": described})
    correct = np.ones((IMAGES, 1), dtype=bool)
    correct[:wrong] = False
    base = {split: draw.lognormal(-1, 0.4, (IMAGES, 1)) / np.where(correct, 1, 3) for split in splits}
    errors = []
    for epoch in range(epochs):
        factor = 0.4 if epoch == 0 else shrink ** (epoch - 1)
        for (place, estimator), norm in itertools.product(enumerate(estimators), ("l2", "linf")):
            rows = [
                margin_rows(
                    values * factor * (1 + 0.02 * place) * (1 if norm == "l2" else 0.1) if found else values * np.nan,
                    epochs=np.array([epoch]), correct=correct, split=split, estimator=estimator, norm=norm,
                    label=np.broadcast_to(np.arange(IMAGES)[:, None] % classes, correct.shape),
                )
                for split, values in base.items()
            ]  # fmt: skip
            unit = Unit(estimator, norm)
            out.write_part(out.margins(epoch, unit), pd.concat(rows, ignore_index=True), weights="w")
            tensors = {}
            for split, table in zip(splits, rows, strict=True):
                tensors[f"{split}.image"] = torch.arange(IMAGES)
                tensors[f"{split}.witness"] = torch.full((IMAGES, 1, 8, 8), 0.75)
                tensors[f"{split}.distance"] = torch.tensor(table["distance"].to_numpy())
            out.save_tensors(out.witnesses(epoch, unit), tensors)
        for split in splits:
            errors.append(
                {"epoch": epoch, "split": split, "loss": 1.0, "error": float(1 - correct.mean()), "seconds": 1}
            )
        if predictions:
            parts = [predictions_of(correct, split=split).drop(columns="epoch") for split in splits]
            whole = pd.concat(parts, ignore_index=True).astype({"split": str}).assign(loss=0.1)
            out.write_part(out.predictions(epoch), whole, seconds="1.0")
    for split in splits:
        tensors = {"images": torch.full((IMAGES, 1, 8, 8), 0.25), "labels": torch.zeros(IMAGES, dtype=torch.int64)}
        out.save_tensors(out.probes(split), tensors | {"ids": torch.arange(IMAGES)})
    if predictions:
        write_csv(out.epochs_csv, pd.DataFrame(errors, columns=list(EPOCH_COLUMNS)))
    return folder


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not written, as writing takes most of the time; test_figures.py writes them."""
    monkeypatch.setattr("harness.figures.save", lambda *_: [])


def run_report(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.usefixtures("no_files")
def test_one_run_gets_a_page_and_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one")
    assert run_report(capsys, run) == (0, f"report: {run / 'report.html'}\n", "")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Observation 1" in page
    assert "&lt;" not in page.split("<title>")[1].split("</title>")[0]
    table = pd.read_csv(run / "report-observations.csv", keep_default_na=False)
    assert tuple(table.columns) == FINDING_COLUMNS
    assert set(table["verdict"]) <= {"supported", "not supported", "undecided"}


@pytest.mark.slow
def test_one_run_gets_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one")
    before = set(state(run))
    assert run_report(capsys, run) == (0, f"report: {run / 'report.html'}\n", "")
    new = set(state(run)) - before - {"figures", "report.html", "report-observations.csv"}
    assert {name.removeprefix("figures/").rpartition(".")[0] for name in new} == set(STATIC_FIGURES)
    assert (run / "figures" / "margins.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.slow
def test_the_verdicts_follow_the_margins(tmp_path: Path) -> None:
    shrinking, growing = write_run(tmp_path / "shrinks"), write_run(tmp_path / "grows", shrink=1.25)
    for run, verdict in ((shrinking, "supported"), (growing, "not supported")):
        evidence = gather([read_run(run)])
        verdict_of = {
            line.sentence.split(" (")[0]: line.verdict
            for lines in headlines(evidence.findings).values()
            for line in lines
        }
        assert verdict_of["Margins shrink from epoch 1 to the last"] == verdict
        assert verdict_of["Margins jump up in the first epoch"] == "supported"
        assert verdict_of["Misclassified images lie closer to the boundary"] == "supported"


@pytest.mark.slow
def test_a_pair_is_compared_and_the_sentence_has_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "robust", shrink=1.0, training="pgd", pgd_epsilon=0.1)]
    out = tmp_path / "pair.html"
    code, printed, _ = run_report(capsys, *runs, "--out", out)
    assert (code, printed) == (0, f"report: {out}\n")
    table = pd.read_csv(tmp_path / "pair-observations.csv")
    ratio = table[(table["claim"] == "larger margins") & (table["estimator"] == "envelope")]
    assert np.allclose(ratio["value"], 1 / 0.8**2)
    lines = headlines(gather(read_runs(runs)).findings)[2]
    assert any(f"L∞ {1 / 0.8**2:.3g} (" in line.sentence for line in lines)
    figures = {path.stem for path in (tmp_path / "pair-figures").iterdir()}
    assert figures == {"distributions-l2", "distributions-linf", "plain", "robust"}
    # figures of a run depend on the other runs of the report, so the run's folder is unchanged
    assert not (runs[0] / "figures").exists()
    # control: without the pair there is no sentence on observation 2
    alone = headlines(gather([read_run(runs[0])]).findings)[2]
    assert [line.verdict for line in alone] == ["not tested"]
    assert alone[0].sentence.lower().startswith(NOT_TESTED[2][:20].lower())


def test_cards_hold_the_smallest_and_largest_with_their_witnesses(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    cards = image_cards(run)
    assert {(card.norm, card.kind) for card in cards} == set(itertools.product(("l2", "linf"), ("smallest", "largest")))
    assert len(cards) == 4 * SHOWN
    rows = run.margins[(run.margins["epoch"] == 3) & (run.margins["split"] == "test") & (run.margins["norm"] == "l2")]
    smallest = [card.distance for card in cards if (card.norm, card.kind) == ("l2", "smallest")]
    assert smallest == sorted(rows.groupby("image")["distance"].min())[:SHOWN]
    assert {card.estimator for card in cards} == {"deepfool"}
    assert all(np.allclose(card.perturbation, 0.5) and card.original.shape == (8, 8) for card in cards)


DEGENERATE: dict[str, dict[str, Any]] = {
    "nothing measured": {"epochs": 0},
    "one epoch": {"epochs": 1},
    "two epochs": {"epochs": 2},
    "all correct": {"wrong": 0},
    "all incorrect": {"wrong": IMAGES},
    "one class only": {"classes": 1},
    "nothing found": {"found": False},
    "one split of another name": {"splits": ("val/../<u>",)},
    "one estimator": {"estimators": ("deepfool",)},
    "no predictions": {"predictions": False},
}
# seconds each: the other cases are slow
ORDINARY = ("one split of another name",)


@pytest.mark.slow
@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize(
    "case", [case if case in ORDINARY else pytest.param(case, marks=pytest.mark.slow) for case in DEGENERATE]
)
def test_missing_results_are_explained(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", **DEGENERATE[case])
    code, printed, error = run_report(capsys, run)
    assert (code, error) == (0, "")
    assert printed == f"report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    content = assemble(gather([read_run(run)]))
    for number in CLAIMS:
        assert content.headlines[number], number
    assert (
        "nan" not in " ".join(line.sentence for lines in content.headlines.values() for line in lines).lower().split()
    )
    assert "<u>" not in page
    if case in ("nothing measured", "one epoch", "nothing found"):
        assert not any(line.verdict == "supported" for line in content.headlines[1])


@pytest.mark.slow
@pytest.mark.usefixtures("no_files")
def test_a_user_without_a_config_gets_a_report(tmp_path: Path) -> None:
    from harness import MarginTracker

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, labels = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    tracker = MarginTracker(tmp_path / "mine", {"mine": (images, labels)}, ["deepfool:steps=5"], ["l2"])
    for epoch in range(2):
        tracker.update(epoch, model)
        with torch.no_grad():
            model[1].weight += 0.01
    assert main([str(tmp_path / "mine")]) == 0
    assert "no predictions of whole sets" in " ".join(assemble(gather([read_run(tmp_path / "mine")])).runs[0].warnings)


# refusals


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code, printed, error = run_report(capsys, *argv)
    assert (code, printed) == (1, "")
    assert ONE_LINE.fullmatch(error.rstrip("\n")), error
    return error


def test_bad_folders_give_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    before = state(run)
    assert "expected a run folder, got " in refused(capsys, tmp_path / "none")
    assert "twice; name it once" in refused(capsys, run, tmp_path / "x" / ".." / "run")
    for out in (tmp_path, run / "manifest.json", run / "margins" / "page.html"):
        assert f"got {out}; " in refused(capsys, run, "--out", out)
    part = RunFolder(run).margin_parts()[0]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert str(part) in refused(capsys, run)
    part.write_bytes(whole)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    assert "expected schema 2" in refused(capsys, run)
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert {name: value[1] for name, value in state(run).items() if name != "manifest.json"} == {
        name: value[1] for name, value in before.items() if name != "manifest.json"
    }


@pytest.mark.slow
@pytest.mark.usefixtures("no_files")
def test_a_failure_keeps_the_earlier_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", epochs=2)
    out = tmp_path / "out" / "report.html"
    assert run_report(capsys, run, "--out", out)[0] == 0
    first = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.store.files.os.replace", full)
    assert "No space left on device; make room" in refused(capsys, run, "--out", out)
    assert out.read_bytes() == first
    assert sorted(path.name for path in out.parent.iterdir()) == ["report-observations.csv", "report.html"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_files")
def test_limits_of_a_verdict_are_stated(tmp_path: Path) -> None:
    plain, robust = write_run(tmp_path / "plain"), write_run(tmp_path / "robust", training="pgd", seed=3)
    copy, odd = write_run(tmp_path / "copy"), write_run(tmp_path / "odd", training="pgd", epochs=3)
    evidence = gather(read_runs([plain, robust, copy]))
    assert "plain and robust are compared although their seeds differ" in evidence.warnings
    assert any(line.startswith("copy is left out of the tests") for line in evidence.warnings)
    assert set(evidence.findings["run"]) == {"plain", "robust", "robust / plain"}
    # estimators with equal names and different parameters are not compared
    manifest = json.loads((odd / "manifest.json").read_text())
    manifest["estimators"][0]["parameters"] = {"steps": 999}
    del manifest["sha256"]
    manifest["schema"] = 1
    (odd / "manifest.json").write_text(json.dumps(manifest))
    findings = gather(read_runs([plain, odd])).findings
    second = findings[findings["observation"] == 2]
    refused_rows = second[second["estimator"] == "deepfool"]
    assert refused_rows["reason"].eq("the runs measured it with other parameters").all()
    assert refused_rows["verdict"].eq("undecided").all()
    assert "the runs measured it with other parameters" not in set(second.loc[second["estimator"] == "fmn", "reason"])
    # and a run that stopped early is marked as such
    short = write_run(tmp_path / "short", epochs=3)
    manifest = json.loads((short / "manifest.json").read_text())
    manifest["config"]["epochs"] = 40
    del manifest["sha256"]
    manifest["schema"] = 1
    (short / "manifest.json").write_text(json.dumps(manifest))
    warnings = assemble(gather([read_run(short)])).runs[0].warnings
    assert "unfinished: measured up to epoch 2 of 40, which counts as the last epoch here" in warnings


def test_runs_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "run", epochs=1) for parent in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs(runs[:1])] == ["run"]


def test_help_and_usage_errors_load_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom harness.report.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    for argv, status in ((["--help"], 0), ([], 2)):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *argv],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
