"""The command: the files that a run writes, and one-line errors for everything that it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from attacks import registry
from attacks.checks import NO_GRADIENT
from attacks.types import EstimatorError
from harness.compare import main as compare_again
from harness.config.run_config import digest
from harness.data.builtin import load
from harness.runs import read_run
from harness.statistics import SUMMARY_COLUMNS
from harness.store import MARGIN_COLUMNS, RunFolder
from harness.store.tables import read_part
from harness.track import main
from harness.tracking.finished_run import remeasure
from harness.tracking.terminal import Terminal
from tests.pages import STATIC_FIGURES
from tests.runs import ONE_LINE, state

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
IMAGES = ["--train-images", "96", "--test-images", "40", "--device", "cpu"]
TINY = ["--model", "tests.runs:net", *IMAGES, "--probe", "4", "--epochs", "0", "--norm", "l2", "--noise-retries", "0"]


@pytest.fixture(scope="module")
def happy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A complete small run in a separate process, with warnings as errors, in the default folder."""
    cwd = tmp_path_factory.mktemp("happy")
    options = [*IMAGES, "--model", "dense", "--probe", "20", "--epochs", "1", "--estimator", "deepfool"]
    command = [sys.executable, "-W", "error", "-m", "harness.track", *options, "--estimator", "ddn:steps=20"]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (folder,) = (cwd / "runs").iterdir()
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    return folder, done


UNITS = ["ddn%3Asteps=20.l2", "deepfool.l2", "deepfool.linf"]


def test_a_run_writes_the_documented_files(happy: tuple[Path, Any]) -> None:
    folder, _ = happy
    assert re.fullmatch(r"digits-dense-standard-\d{8}-\d{6}", folder.name)
    names = {name for name, (_, digest) in state(folder).items() if digest}
    epochs = ("epoch-000", "epoch-001")
    assert names == {
        "manifest.json",
        "epochs.csv",
        "summary.csv",
        "report.html",
        "report-observations.csv",
        *(f"figures/{name}.{kind}" for name in STATIC_FIGURES for kind in ("png", "svg")),
        *(f"probes/{split}.safetensors" for split in ("train", "test")),
        *(f"checkpoints/{epoch}.{kind}" for epoch in epochs for kind in ("safetensors", "trainer.pt")),
        *(f"predictions/{epoch}.parquet" for epoch in epochs),
        *(f"margins/{epoch}/{unit}.parquet" for epoch in epochs for unit in UNITS),
        *(f"witnesses/{epoch}/{unit}.safetensors" for epoch in epochs for unit in UNITS),
    }


def test_the_manifest_records_the_run(happy: tuple[Path, Any]) -> None:
    folder, _ = happy
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    config, fingerprint = manifest["config"], manifest["fingerprint"]
    assert manifest["schema"] == 2
    assert (config["dataset"], config["model"], config["epochs"], config["batch_size"]) == ("digits", "dense", 1, 32)
    assert config["estimator"] == ["deepfool", "ddn:steps=20"]
    assert fingerprint["data"] == manifest["data"] == load("digits").checksums
    assert fingerprint["probe"] == 20
    assert not {"epochs", "estimator", "norm", "threads", "device"} & fingerprint.keys()
    assert manifest["digest"] == digest(fingerprint)
    assert manifest["seeds"] == {"seed": 0, "probe_seed": 0}
    deepfool, ddn = manifest["estimators"]
    assert deepfool["estimator"] == deepfool["name"] == "deepfool"
    assert (ddn["estimator"], ddn["name"], ddn["parameters"]["steps"]) == ("ddn:steps=20", "ddn", 20)
    assert {"python", "torch", "foolbox", "torchattacks", "numpy", "pandas"} <= manifest["versions"].keys()
    assert manifest["machine"]["threads"] == 1
    assert manifest["command"][:4] == ["-W", "error", "-m", "harness.track"]
    assert manifest["device"] == "cpu"


def test_the_tables_and_parts_are_complete(happy: tuple[Path, Any]) -> None:
    folder, _ = happy
    paths = RunFolder(folder)
    rows = pd.concat([read_part(path)[0] for path in paths.margin_parts()])
    assert tuple(rows.columns) == MARGIN_COLUMNS
    assert len(rows) == 2 * 3 * (20 + 20)
    assert not rows.duplicated(["epoch", "split", "image", "estimator", "norm"]).any()
    assert rows["status"].isin(["found", "found_after_noise"]).mean() > 0.9
    for split in ("train", "test"):
        ids = load_file(paths.probes(split))["ids"].tolist()
        assert len(set(ids)) == 20
        for _, unit in rows[rows["split"] == split].groupby(["epoch", "estimator", "norm"]):
            assert unit["image"].tolist() == ids
    for epoch, path in enumerate(paths.prediction_parts()):
        part, facts = read_part(path)
        assert list(part.columns) == ["split", "image", "label", "prediction", "confidence", "loss"]
        assert part["split"].tolist() == ["train"] * 96 + ["test"] * 40
        assert facts["epoch"] == str(epoch)
        # the probes are among them, with the same prediction
        joined = rows[rows["epoch"] == epoch].merge(part, on=["split", "image"], suffixes=("", "_said"))
        assert len(joined) == 3 * 40
        assert joined["prediction"].tolist() == joined["prediction_said"].tolist()
        assert joined["label"].tolist() == joined["label_said"].tolist()
    table, summary = pd.read_csv(folder / "epochs.csv"), pd.read_csv(folder / "summary.csv")
    assert list(table.columns) == ["epoch", "split", "loss", "error", "seconds"]
    assert list(zip(table["epoch"], table["split"], strict=True)) == [(e, s) for e in (0, 1) for s in ("train", "test")]
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    assert len(summary) == 2 * 3 * 2 * 3
    whole = summary[summary["subset"] == "all"]
    assert whole["count"].eq(20).all()
    assert (whole["found"] + whole["tied"] + whole["not_found"] + whole["failed"]).eq(20).all()


def test_printed_output_is_plain_text_and_matches_the_tables(happy: tuple[Path, Any]) -> None:
    folder, done = happy
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "ddn:steps=20 has no linf: skipped in that norm"
    assert re.fullmatch(r"digits, dense, standard training, on cpu, into runs/digits-dense-standard-[\d-]+", lines[1])
    summary, errors = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "epochs.csv")
    for epoch, line in enumerate(lines[2:4]):
        assert line.startswith(f"epoch   {epoch}/1 | error train ")
        for error in errors[errors["epoch"] == epoch]["error"]:
            assert f" {100 * error:.2f}%" in line
        for average in summary[(summary["epoch"] == epoch) & (summary["subset"] == "all")]["avg"]:
            assert f" {average:.4f}" in line
        assert re.search(r"\d+ images/s, \d+:\d\d:\d\d left$", line)
    tail = "\n".join(lines[4:])
    for _, row in summary[summary["subset"] == "all"].iterrows():
        assert f"{row['avg']:.4f} ± {row['se']:.4f}" in tail
    last = errors[errors["epoch"] == 1]["error"].tolist()
    assert f"error at epoch 1: train {100 * last[0]:.2f}%, test {100 * last[1]:.2f}%" in tail
    assert f"run folder: runs/{folder.name}" in lines
    assert lines[-1] == f"report: runs/{folder.name}/report.html"


# refusals


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """The exit code and the only line, on standard error."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as leaving:  # argparse exits by itself
        code = int(str(leaving.code))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("track: error: ")
    assert printed.err.endswith("\n")
    line = printed.err[:-1]
    assert ONE_LINE.fullmatch(line), line
    return code, line


BAD_USAGE = [
    ("--estimator depfool", "expected an estimator of deepfool, fmn, ", "got 'depfool'; did you mean 'deepfool'?"),
    ("--estimator foolbox", "expected foolbox:<ClassName>", "got 'foolbox'"),
    ("--estimator foolbox:L2DeepFol", "expected ", "L2DeepFoolAttack"),
    ("--estimator fmn:stepz=3", "expected a parameter of fmn (steps: int", "got 'stepz'"),
    ("--estimator fmn:steps=many", "expected fmn's steps to be of type int", "got 'many'"),
    ("--estimator fmn:steps=2.5", "expected fmn's steps to be of type int", "got '2.5'"),
    ("--estimator fmn:steps=0", "expected steps to be an integer of at least 1", "got 0"),
    ("--estimator fmn:steps", "expected parameters as key=value", "got 'steps'"),
    ("--estimator fmn:steps=3,steps=4", "expected parameters as key=value", "write each once"),
    ("--dataset svhn", "expected --dataset to be one of digits, mnist", "got 'svhn'"),
    ("--probe 0", "expected --probe of at least 1", "got 0"),
    ("--epochs -1", "expected --epochs of at least 0", "got -1"),
    ("--threads 0", "expected --threads of at least 1", "got 0"),
    ("--norm l1", "expected --norm to be one of l2, linf", "got 'l1'"),
    ("--estimator ddn --norm linf", "expected a norm that ddn has (l2)", "got linf"),
    (
        "--estimator deepfool --estimator cw --domain free",
        "expected estimators that can do --domain free",
        "got cw (box",
    ),
    ("--device tpu", "expected --device auto, cpu or cuda[:i]", "got 'tpu'"),
    ("--device meta", "expected --device auto, cpu or cuda[:i]", "got 'meta'"),
    ("--device cuda:99", "expected a CUDA device for --device cuda:99", "use --device cpu"),
    (
        "--model vgg",
        "expected --model dense, cnn, resnet18, torchvision:NAME, timm:NAME, robustbench:NAME or pkg.module:factory",
        "got 'vgg'",
    ),
    ("--frobnicate", "unknown option --frobnicate", "did you mean --probe?"),
    ("--epoch 3", "unknown option --epoch 3", "did you mean --epochs?"),
    ("digits", "unexpected argument digits", "see --help"),
    ("--probe", "expected a value for --probe", "got none"),
    ("--resume", "expected --out with --resume", "got none"),
    ("--config none.toml", "expected a TOML file at none.toml", "got [Errno 2]"),
]
BAD_RUNS = [
    ("--dataset mnist --data-root nowhere", "expected train-images-idx3-ubyte or its .gz", "--download"),
    ("--dataset fashion-mnist", "in data/FashionMNIST/raw, ", "use --dataset digits"),
    ("--dataset cifar10 --data-root nowhere", "in nowhere/cifar-10-batches-py, ", "use --dataset digits"),
    ("--model tests.runs:two_classes", "expected logits of shape (2, 10)", "got (2, 2)"),
    ("--model tests.runs:no_logits", "expected logits of shape (2, 10)", "got (2, 10, 6, 6)"),
    ("--model tests.runs:not_a_number", "expected finite floating logits", "NaN or infinite"),
    ("--model tests.runs:raising", "expected 'tests.runs:raising' to return a model", "got RuntimeError: no model"),
    ("--model tests.runs:no_model", "to return a torch.nn.Module", "got int"),
    ("--model tests.runs:nothing", "expected an importable factory 'tests.runs:nothing'", "got AttributeError"),
    ("--model no.such:model", "expected an importable factory 'no.such:model'", "got ModuleNotFoundError"),
    ("--model :", "expected an importable factory ':'", "got ValueError"),
]


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize(
    ("argv", "expected", "got", "exit_code"),
    [(*case, 2) for case in BAD_USAGE] + [(*case, 1) for case in BAD_RUNS],
    ids=[case[0] for case in BAD_USAGE + BAD_RUNS],
)
def test_bad_input_gives_a_one_line_error_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: str,
    expected: str,
    got: str,
    exit_code: int,
    out: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    # with --out, --resume alone is valid usage
    folder = ["--out", "deep/run"] if out and argv != "--resume" else []
    code, line = refusal(capsys, *folder, *argv.split())
    assert code == exit_code
    assert expected in line
    assert got in line[line.index(expected) :]
    assert state(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, "--device", "cuda", "--out", str(tmp_path / "run"))
    assert (code, line) == (
        2,
        "track: error: expected a CUDA device for --device cuda, got 0 of them; use --device cpu",
    )
    assert state(tmp_path) == {}


def test_a_bad_option_in_a_separate_process(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "harness.track", "--estimator", "depfool", "--out", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert ONE_LINE.fullmatch(done.stderr[:-1])
    assert state(tmp_path) == {}


def test_a_name_with_a_line_break_is_printed_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, "--config", str(tmp_path / "a\nb.toml"))
    assert code == 2
    assert f"expected a TOML file at {tmp_path}/a b.toml, got " in line


def test_an_estimator_with_a_missing_package_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = registry.Entry("tests.runs:Broken", ("l2", "linf"), ("box",), "0", "raises", "no_such_package")
    monkeypatch.setitem(registry.ESTIMATORS, "broken", entry)
    code, line = refusal(capsys, *TINY, "--estimator", "broken", "--out", str(tmp_path / "run"))
    assert code == 2
    assert "expected the package no_such_package for the estimator broken, got none; " in line
    assert state(tmp_path) == {}


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EstimatorError, match="got 'stepz'"):
        main(["--estimator", "fmn:stepz=3", "--debug"])
    with pytest.raises(ValueError, match="got RuntimeError: no model") as caught:
        main(["--model", "tests.runs:raising", "--debug"])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert state(tmp_path) == {}


# folders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_a_folder_with_a_run_needs_resume_and_the_same_options(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(tiny)
    code, line = refusal(capsys, *TINY, "--out", str(tiny))
    assert code == 1
    assert line.endswith(f"expected a new folder, got {tiny} with a run in it; add --resume or choose another")
    for change, field in [
        (["--seed", "3"], "seed 3 (the run has 0)"),
        (["--training", "pgd"], "training 'pgd' (the run has 'standard')"),
        (["--probe", "5"], "probe 5 (the run has 4)"),
        (["--domain", "free"], "domain 'free' (the run has 'box')"),
        (["--noise-retries", "2"], "noise_retries 2 (the run has 0)"),
        (["--test-images", "39"], "test_images 39 (the run has 40)"),
    ]:
        code, line = refusal(capsys, *TINY, "--out", str(tiny), "--resume", *change)
        assert code == 1
        assert line.endswith(f"options of the run in {tiny}, got {field}; use them or another folder")
    assert state(tiny) == before


def test_more_epochs_and_estimators_extend_the_same_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # control for the refusals
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("manifest.json",):
        (folder / name).write_bytes((tiny / name).read_bytes())
    grown = ["--epochs", "1", "--norm", "linf", "--estimator", "fmn:steps=3", "--threads", "1", "--every", "2"]
    assert main([*TINY, "--out", str(folder), "--resume", *grown]) == 0
    summary = pd.read_csv(folder / "summary.csv")
    assert summary["estimator"].unique().tolist() == ["fmn:steps=3"]
    assert summary["epoch"].unique().tolist() == [0, 1]


def test_resume_needs_no_options(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((tiny / "manifest.json").read_bytes())
    assert main(["--resume", "--out", str(folder)]) == 0
    theirs, ours = pd.read_csv(tiny / "summary.csv"), pd.read_csv(folder / "summary.csv")
    pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"))
    assert "not continued" not in capsys.readouterr().out
    # control: other options are other estimators, which the message names
    assert main(["--resume", "--out", str(folder), "--estimator", "fmn:steps=3"]) == 0
    left_out = json.loads((tiny / "manifest.json").read_text())["config"]["estimator"]
    stdout = capsys.readouterr().out
    assert all(f"{text} is not named and not continued" in stdout for text in left_out)


def test_folders_without_a_run_are_left_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"schema": 1,')
    before = state(tmp_path)
    for name, words in [
        ("thesis", "expected a new or empty folder"),
        ("file", "expected a new or empty folder"),
        ("file/below", "expected a folder that can be written"),
        ("damaged", "expected a run's manifest"),
    ]:
        code, line = refusal(capsys, *TINY, "--out", str(tmp_path / name), "--resume")
        assert code == 1
        assert words in line
        assert str(tmp_path / name) in line
    assert state(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    code, line = refusal(capsys, *TINY, "--out", str(tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert code == 1
    assert "expected a folder that can be written at " in line
    assert state(tmp_path) == {}


# runs that fail


@pytest.mark.slow
def test_an_estimator_that_writes_the_weights_exits_with_1_and_the_network_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = registry.Entry("tests.runs:Writing", ("l2", "linf"), ("box", "free"), "0", "writes")
    monkeypatch.setitem(registry.ESTIMATORS, "writing", entry)
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    writing = ["--estimator", "writing", "--estimator", "linear"]
    assert main([*TINY, *writing, "--out", str(tmp_path / "run")]) == 1
    stderr = capsys.readouterr().err
    assert stderr == (
        "track: error: expected margins from writing l2, got a change of the network's weights (undone); fix it\n"
    )
    assert main([*TINY, "--estimator", "linear", "--out", str(tmp_path / "alone")]) == 0
    # weights, predictions and the other estimator's margins equal those of a run without it
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "alone")
    assert [path.name for path in one.margin_parts()] == ["linear.l2.parquet"]
    weights = [load_file(str(folder.checkpoint(0))) for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for mine, its in zip(
        (*one.margin_parts(), one.predictions(0)), (*other.margin_parts(), other.predictions(0)), strict=True
    ):
        pd.testing.assert_frame_equal(
            *(read_part(path)[0].drop(columns="seconds", errors="ignore") for path in (mine, its)), check_exact=True
        )


def test_an_estimator_that_fails_on_every_image_exits_with_1_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = registry.Entry("tests.runs:Broken", ("l2", "linf"), ("box", "free"), "0", "raises")
    monkeypatch.setitem(registry.ESTIMATORS, "broken", entry)
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    folder = tmp_path / "run"
    both = ["--estimator", "broken", "--estimator", "deepfool:steps=3"]
    assert main([*TINY, *both, "--out", str(folder)]) == 1
    printed = capsys.readouterr()
    line = "track: error: expected margins from broken l2, got RuntimeError: no luck on every image; fix it\n"
    assert printed.err == line
    assert "deepfool:steps=3" in printed.out
    parts = [path.name for path in RunFolder(folder).margin_parts()]
    assert parts == ["deepfool%3Asteps=3.l2.parquet"]
    before = {name: one for name, one in state(folder).items() if name.startswith("margins/")}
    # it is retried until it is removed from the options
    assert main([*TINY, *both, "--out", str(folder), "--resume"]) == 1
    assert main([*TINY, *both[2:], "--out", str(folder), "--resume"]) == 0
    assert {name: one for name, one in state(folder).items() if name.startswith("margins/")} == before
    alone = tmp_path / "alone"
    assert main([*TINY, *both[:2], "--out", str(alone)]) == 1
    assert len(pd.read_csv(alone / "summary.csv")) == 0
    assert len(pd.read_csv(alone / "epochs.csv")) == 2


def test_diverging_training_gives_a_one_line_error_and_keeps_earlier_margins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = [*TINY, "--epochs", "2", "--learning-rate", "1e18", "--optimizer", "sgd", "--model", "dense"]
    assert main([*options, "--estimator", "deepfool:steps=3", "--out", str(folder)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("track: error: expected ")
    assert stderr.endswith("; lower the learning rate\n")
    assert stderr.count("\n") == 1
    assert [path.parent.name for path in RunFolder(folder).margin_parts()] == ["epoch-000"]
    assert not RunFolder(folder).checkpoint(1).exists()


# models that are not a deterministic function of the image, or have another form


def test_a_stochastic_model_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--model", "tests.runs:Dropping", "--out", str(tmp_path / "run")]
    assert main(options) == 1
    stderr = capsys.readouterr().err
    assert ONE_LINE.fullmatch(stderr.strip())
    assert "track: error: expected the same logits of the same images, got others in a second pass" in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_averaged_over_draws_is_tracked_and_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--model", "tests.runs:Dropping", "--expect-over", "3", "--no-report"]
    folders = {name: RunFolder(tmp_path / name) for name in ("both", "later")}
    both = ["--estimator", "deepfool:steps=5", "--estimator", "linear"]
    assert main([*options, *both, "--out", str(folders["both"].path)]) == 0
    assert main([*options, "--estimator", "linear", "--out", str(folders["later"].path)]) == 0
    remeasure(read_run(folders["later"].path), ["deepfool:steps=5"], None, None, CPU, Terminal(Console(), 0))
    rows = [[read_part(path)[0] for path in folder.margin_parts(0)] for folder in folders.values()]
    assert len(rows[0]) == 2
    for one, other in zip(*rows, strict=True):
        pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))
    before = state(tmp_path)
    capsys.readouterr()
    assert compare_again(["--certify", "crown", str(folders["later"].path)]) == 2
    assert "compare: error: expected no certifiers with --expect-over 3, got 1" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_model_warnings_are_printed_once_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--model", "tests.runs:Rounding", "--epochs", "1", "--no-report", "--out", str(tmp_path / "run")]
    assert main([*options, "--estimator", "linear"]) == 0
    out, err = capsys.readouterr()
    assert (out.count(NO_GRADIENT), err) == (1, "")
    assert RunFolder(tmp_path / "run").read_manifest()["notes"] == [f"epoch 0: {NO_GRADIENT}"]
    assert main([*options, "--estimator", "linear", "--resume"]) == 0
    assert RunFolder(tmp_path / "run").read_manifest()["notes"] == [f"epoch 0: {NO_GRADIENT}"]


@pytest.mark.slow
def test_a_binary_classifier_is_tracked_and_measured_again(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(0)
    splits = {"train": 24, "test": 12}
    arrays = {f"x_{name}": draw.random((count, 1, 4, 4), dtype=np.float32) for name, count in splits.items()}
    labels = {f"y_{name}": np.arange(count) % 2 for name, count in splits.items()}
    np.savez(tmp_path / "mine.npz", **arrays, **labels)  # type: ignore[arg-type]
    folder = RunFolder(tmp_path / "run")
    options = ["--dataset", f"npz:{tmp_path / 'mine.npz'}", "--model", "dense", "--probe", "4", "--epochs", "1"]
    options += ["--norm", "l2", "--device", "cpu", "--threads", "1", "--no-report", "--certify", "crown"]
    assert main([*options, "--binary", "--estimator", "linear", "--out", str(folder.path)]) == 0
    weights = load_file(folder.checkpoint(1))
    assert weights["5.weight"].shape == (1, 64)
    assert folder.read_manifest()["fingerprint"]["binary"] is True
    remeasure(read_run(folder.path), ["deepfool"], None, None, CPU, Terminal(Console(), 1))
    lower = pd.concat([read_part(path)[0] for path in folder.bound_parts()])
    assert (lower["lower"] > 0).all()
    assert (lower["lower"] <= lower["upper"]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_a_network_that_returns_a_named_tuple_while_training_is_tracked(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    splits = {"train": 8, "test": 4}
    arrays = {f"x_{name}": draw.random((count, 3, 32, 32), dtype=np.float32) for name, count in splits.items()}
    labels = {f"y_{name}": np.arange(count) % 2 for name, count in splits.items()}
    np.savez(tmp_path / "mine.npz", **arrays, **labels)  # type: ignore[arg-type]
    options = ["--dataset", f"npz:{tmp_path / 'mine.npz'}", "--model", "torchvision:googlenet", "--batch-size", "4"]
    options += ["--probe", "2", "--epochs", "1", "--norm", "l2", "--device", "cpu", "--threads", "1", "--no-report"]
    assert main([*options, "--estimator", "linear", "--out", str(tmp_path / "run")]) == 0
    assert len(RunFolder(tmp_path / "run").margin_parts()) == 2
