"""A grid of runs: named, checked before the first starts, killed and resumed, reported together."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.command import CHILD
from harness.config.options import ConfigError
from harness.store import RunFolder
from harness.sweep import Entry, main, read_sweep, run_entry
from tests.runs import ONE_LINE, contents

ROOT = Path(__file__).parents[1]
GRID = """
[options]
model = "dense"
epochs = 2
train_images = 64
test-images = 20
probe = 8
estimator = ["linear"]
device = "cpu"

[grid]
loss = ["cross-entropy", "hinge"]
seed = [0, 1]

[[run]]
training = "pgd"
pgd_steps = 2
"""


def written(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_combination_and_every_single_run_is_named(tmp_path: Path) -> None:
    entries = read_sweep(written(tmp_path))
    assert [entry.name for entry in entries] == [
        "loss=cross-entropy,seed=0",
        "loss=cross-entropy,seed=1",
        "loss=hinge,seed=0",
        "loss=hinge,seed=1",
        "training=pgd,pgd-steps=2",
    ]
    assert entries[3].options["loss"] == "hinge"
    assert entries[3].options["test_images"] == 20
    words = " ".join(entries[3].arguments)
    assert "--estimator linear" in words
    assert "--seed 1" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "other or no tables"),
        ("[grid]\nloss = 'hinge'", r"\[grid\] of lists"),
        ("[grid]\nloss = ['hing']", "--loss"),
        ("[grid]\nlos = ['hinge']", "los; remove"),
        ("[[run]]\nseed = 1\n[[run]]\nseed = 1", "every run once"),
        ("[sweep]\na = 1", "got sweep"),
        ("[[run", "fix the file"),
        ("run = [5]", r"\[\[run\]\] tables"),
        ("run = [[5]]", r"\[\[run\]\] tables"),
        ("options = 5\n[grid]\nseed = [0]", r"expected \[options\]"),
        (
            "[options]\ndata-root = 'a'\ndata_root = 'b'\n[grid]\nseed = [0]",
            "each option once in .*, got data-root with",
        ),
        ("[grid]\ndata-root = ['a']\ndata_root = ['b']", "each option once in .*, got data-root with"),
        ("[[run]]\ndata-root = 'a'\ndata_root = 'b'", "each option once in .*, got data-root with"),
    ],
)
def test_an_invalid_sweep_gives_a_one_line_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_sweep(written(tmp_path, text))
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


@pytest.mark.slow
def test_a_sweep_killed_and_resumed_ends_with_every_run_and_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # three runs: their figures take most of the time
    path, out = written(tmp_path, GRID.replace("seed = [0, 1]", "seed = [1]")), tmp_path / "out"
    command = [sys.executable, "-m", "harness.sweep", str(path), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 180
    while not list(out.glob("*/checkpoints/epoch-001.safetensors")):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].strip().endswith("to resume, run the same command again")
    assert process.returncode == 130
    assert not (out / "report.html").exists()
    assert main([str(path), "--out", str(out), "--jobs", "2"]) == 0
    for entry in read_sweep(path):
        assert len(RunFolder(out / entry.name).margin_parts()) == 3 * 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "loss=hinge,seed=1" in page
    # another start changes nothing in the runs
    before = {name: value for name, value in contents(out).items() if "margins/" in name or "checkpoints/" in name}
    monkeypatch.setattr("harness.sweep._report", lambda *_: None)
    assert main([str(path), "--out", str(out)]) == 0
    after = {name: value for name, value in contents(out).items() if "margins/" in name or "checkpoints/" in name}
    assert after == before


@pytest.mark.slow
def test_a_failing_run_is_named_and_the_others_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported: list[list[str]] = []
    monkeypatch.setattr("harness.sweep._report", lambda runs, page: reported.append([run.name for run in runs]))
    text = GRID.replace("seed = [0, 1]", "seed = [0]").replace('training = "pgd"', 'model = "nowhere:net"')
    out = tmp_path / "out"
    assert main([str(written(tmp_path, text)), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "model=nowhere.net,pgd-steps=2: track: error: expected an importable factory" in error
    assert reported == [["loss=cross-entropy,seed=0", "loss=hinge,seed=0"]]


def test_unfinished_runs_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported: list[list[str]] = []
    monkeypatch.setattr("harness.sweep._report", lambda runs, page: reported.append([run.name for run in runs]))
    monkeypatch.setattr("harness.sweep.run_entry", lambda entry, *_: "in use" if "hinge" in entry.name else "")
    text = GRID.replace("seed = [0, 1]", "seed = [0]")
    assert main([str(written(tmp_path, text)), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "sweep: 1 of 3 runs\nsweep: 2 of 3 runs\n"
    assert printed.err == (
        "sweep: error: loss=hinge,seed=0: in use\n"
        "sweep: error: not finished, and not in the report: loss=hinge,seed=0\n"
    )
    assert reported == [["loss=cross-entropy,seed=0", "training=pgd,pgd-steps=2"]]


PARENT = """
import subprocess, sys
from harness.command import child_environment
child = "import time; from harness.command import run_command; run_command(lambda: print(flush=True) or time.sleep(60))"
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
process = subprocess.Popen([sys.executable, "-c", child], env=child_environment(), **pipes)
process.stdout.readline()
print(process.pid, flush=True)
process.wait()
"""


def test_a_child_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=20)
    assert alive == []


def test_a_run_is_started_as_a_child_that_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def start(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        started.append(more)
        return begin([sys.executable, "-c", "pass"], **more)

    begin = subprocess.Popen
    monkeypatch.setattr("harness.sweep.subprocess.Popen", start)
    assert run_entry(Entry("one", {}), tmp_path, threading.Event()) == ""
    assert started[0]["stdin"] == subprocess.PIPE
    assert CHILD in started[0]["env"]


@pytest.mark.slow
def test_a_sweep_killed_alone_leaves_no_run_behind(tmp_path: Path) -> None:
    text = GRID.replace("seed = [0, 1]", "seed = [1]").replace("epochs = 2", "epochs = 2000\nworkers = 1")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "harness.sweep", str(written(tmp_path, text)), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    until = time.monotonic() + 180
    while not list(out.glob("*/margins/epoch-001/*")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_the_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written(tmp_path)), "--list"]) == 0
    assert capsys.readouterr().out.count("\n") == 5
