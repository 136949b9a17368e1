"""Runs with two writers, signals, full disks, damaged files and thinned checkpoints; killed and long runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from harness.compare import main as compare_again
from harness.store import RunFolder, Unit, tables, tensors
from harness.store.identity import StoreError
from harness.store.tables import read_part
from harness.track import main
from harness.tracking.tracker import MarginTracker
from harness.training.trainer import Trainer
from tests.runs import ONE_LINE
from tests.survive.comparing import compare
from tests.survive.lives import OPTIONS
from tests.survive.sweep import kill_sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert track(folder, "--epochs", "6", "--keep-checkpoints", "1") == 0
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one epoch."""
    folder = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert track(folder, "--epochs", "1") == 0
    return folder


def track(folder: Path, *more: str) -> int:
    return main(["--out", str(folder), "--resume", *OPTIONS, *more])


def command(folder: Path, *more: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "harness.track", "--out", str(folder), "--resume", *OPTIONS, *more]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # background jobs of a shell ignore Ctrl-C, which their children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[6:9]) for path in (folder / "checkpoints").glob("epoch-*.safetensors"))


# two writers


@contextmanager
def other_process_holding(folder: Path) -> Iterator[None]:
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.store.folder import RunFolder\n"
        f"with RunFolder(Path({str(folder)!r})).locked():\n    print('has it', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "has it\n"
    try:
        yield
    finally:
        holder.communicate("", timeout=60)


def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    probes = {"test": (torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))}
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    tracker = MarginTracker(folder, probes, ["linear"], ["l2"])
    with other_process_holding(folder):
        another = MarginTracker(folder, probes, ["linear"], ["l2"])  # before it writes anything
        for one in (tracker, another):
            with pytest.raises(StoreError, match=r" is in use by another process; wait"):
                one.update(0, model)
        assert track(folder) == 1
        assert ONE_LINE.fullmatch(capsys.readouterr().err.strip())
    assert not tracker.folder.margin_parts()
    tracker.update(0, model)
    assert len(tracker.folder.margin_parts()) == 1


def test_the_same_process_may_take_the_lock_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), folder.locked(), RunFolder(tmp_path / "run").locked():
        pass
    with other_process_holding(tmp_path / "run"):
        pass


def test_a_folder_with_something_else_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="expected a new or empty folder"), RunFolder(tmp_path).locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "margins" / "epoch-001").mkdir(parents=True)
    left = [folder.path / ".manifest.json.77.tmp", folder.path / "margins" / "epoch-001" / ".fmn.l2.parquet.8.tmp"]
    mine = folder.path / "margins" / "notes.tmp"
    for path in left:
        path.write_bytes(b"half")
    folder.write_manifest({"schema": 1})
    mine.write_text("not ours")
    with folder.locked():
        pass
    assert not any(path.exists() for path in left)
    assert mine.exists()


# signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_command_with_whole_files(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = command(folder, "--epochs", "5000")
    try:
        # the time limits only end a hanging test
        until = time.monotonic() + 600
        while not (folder / "checkpoints" / "epoch-002.safetensors").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=600)[1]
    finally:
        process.kill()
    assert error.strip().endswith("run the same command with --resume and its --out")
    assert process.returncode == 130
    assert not list(folder.rglob(".*.tmp"))


# disks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [("torch", "save"), ("harness.store.tables.pq", "write_table"), ("safetensors.torch", "save_file")],
)
def test_a_full_disk_gives_a_one_line_error_and_the_run_can_be_resumed(
    tmp_path: Path,
    short: Path,
    owner: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, kinds = tmp_path / "run", {"save": RuntimeError("unexpected pos 576 vs 534\nat inline_container.cc")}

    def full(*given: object, **named: object) -> None:
        raise kinds.get(name, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", full)
        assert track(folder, "--epochs", "1") == 1
    error = capsys.readouterr().err.strip()
    assert ONE_LINE.fullmatch(error), error
    assert "make room or give permission" in error
    assert not list(folder.rglob(".*.tmp"))
    assert track(folder, "--epochs", "1") == 0
    assert compare(folder, short).differences == []


# checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(("every", "kept"), [("3", [0, 1, 3, 5, 6]), ("0", [0, 1, 5, 6]), ("1", [0, 1, 2, 3, 4, 5, 6])])
def test_thinned_checkpoints_change_no_row(tmp_path: Path, whole: Path, every: str, kept: list[int]) -> None:
    folder = tmp_path / "run"
    assert track(folder, "--epochs", "6", "--keep-checkpoints", every) == 0
    assert checkpoints(folder) == kept
    assert_same_but_thinned(folder, whole, kept)
    # missing parts of an epoch without a checkpoint are trained again, to the same weights
    RunFolder(folder).margins(4, Unit("deepfool:steps=5", "l2")).unlink()
    assert track(folder, "--epochs", "6", "--keep-checkpoints", every) == 0
    assert checkpoints(folder) == kept
    assert_same_but_thinned(folder, whole, kept)


@pytest.mark.slow
def test_a_thinned_run_resumes_from_its_last_epoch(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, epochs = tmp_path / "run", list[int]()
    assert track(folder, "--epochs", "4", "--keep-checkpoints", "0", "--certify-every", "1") == 0
    from harness.training.trainer import Trainer

    real = Trainer.run_epoch

    def counted(self: Trainer, on_batch: object = None) -> None:
        epochs.append(self.epoch + 1)
        real(self, on_batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "run_epoch", counted)
    assert track(folder, "--epochs", "6", "--keep-checkpoints", "0") == 0
    assert epochs == [5, 6]
    rows = [read_part(RunFolder(path).predictions(6))[0] for path in (folder, whole)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)


def assert_same_but_thinned(folder: Path, whole: Path, kept: list[int]) -> None:
    gone = [f"checkpoints/epoch-{epoch:03d}.safetensors is missing" for epoch in range(7) if epoch not in kept]
    comparison = compare(folder, whole)
    assert [line for line in comparison.differences if "config" not in line] == gone
    assert comparison.rows > 1000


# damage


def test_every_bit_of_a_parts_footer_is_checked(tmp_path: Path) -> None:
    """Pages have their own checksums; the footer holds the layout and meaning of the pages."""
    path = tmp_path / "part.parquet"
    table = pd.DataFrame({"image": [1, 2, 3], "label": [3, 2, 1], "distance": [0.5, 1.0, 2.0], "split": list("aba")})
    tables.write_part(path, table, weights="ab" * 32)
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused = 0
    for place in range(start, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            rows, facts = tables.read_part(path)
        except StoreError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(rows, table, check_exact=True)
            assert facts == {"weights": "ab" * 32}
    assert refused > 20


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_manifest({"schema": 1, "config": {"seed": 0}})
    content = json.loads(folder.manifest.read_text())
    content["config"]["seed"] = 1
    folder.manifest.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"checksum mismatch in .*: the manifest is damaged or was edited"):
        folder.read_manifest()
    # deliberately
    del content["sha256"]
    folder.manifest.write_text(json.dumps(content | {"schema": 1}))
    assert folder.read_manifest()["config"]["seed"] == 1


def test_damaged_witnesses_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors.save_tensors(path, {"test.witness": torch.rand(3, 2), "test.image": torch.arange(3)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"checksum mismatch in .*: the tensors are damaged; restore"):
        tensors.load_tensors(path)


# controls


@pytest.mark.slow
def test_a_difference_between_runs_is_found(tmp_path: Path, whole: Path) -> None:
    import shutil

    assert compare(whole, whole).differences == []
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    paths = RunFolder(folder)
    part = paths.margins(2, Unit("deepfool:steps=5", "l2"))
    rows, facts = read_part(part)
    rows.loc[3, "distance"] = float(
        torch.nextafter(torch.tensor(rows.loc[3, "distance"]).double(), torch.tensor(9.0).double())
    )
    tables.write_part(part, rows, **facts)
    paths.predictions(1).unlink()
    (folder / "margins" / "extra.parquet").write_bytes(part.read_bytes())
    os.replace(paths.checkpoint(3), paths.checkpoint(2))
    assert compare(folder, whole).differences == [
        "checkpoints/epoch-003.safetensors is missing",
        "predictions/epoch-001.parquet is missing",
        "margins/extra.parquet is too many",
        "checkpoints/epoch-002.safetensors has other values",
        "margins/epoch-002/deepfool%3Asteps=5.l2.parquet has other values of distance in 1 rows",
    ]


# witnesses


def lost_witnesses(folder: Path, epoch: int) -> None:
    parts = list((folder / "witnesses" / f"epoch-{epoch:03d}").iterdir())
    assert len(parts) == 4
    for path in parts:
        path.unlink()


@pytest.mark.slow
def test_lost_witnesses_are_found_again_from_the_checkpoint(tmp_path: Path, short: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    lost_witnesses(folder, 0)
    lost_witnesses(folder, 1)
    assert track(folder, "--epochs", "1") == 0
    assert compare(folder, short).differences == []


@pytest.mark.slow
def test_lost_witnesses_alone_cause_no_retraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    assert track(folder, "--epochs", "5", "--keep-checkpoints", "0") == 0
    assert checkpoints(folder) == [0, 1, 4, 5]
    lost_witnesses(folder, 3)
    before = {path: path.read_bytes() for path in (folder / "margins").rglob("*.parquet")}
    monkeypatch.setattr(Trainer, "run_epoch", None)
    assert track(folder, "--epochs", "5", "--keep-checkpoints", "0") == 0
    assert {path: path.read_bytes() for path in (folder / "margins").rglob("*.parquet")} == before


@pytest.mark.slow
def test_a_damaged_trainers_state_is_an_error_for_tracking_but_not_for_comparing(
    tmp_path: Path, short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    state = folder / "checkpoints" / "epoch-001.trainer.pt"
    state.write_bytes(state.read_bytes()[:100])
    (folder / "checkpoints" / "epoch-best.trainer.pt").touch()
    assert compare_again([str(folder), "--estimator", "linear", "--threads", "1"]) == 0
    assert track(folder, "--epochs", "1") == 1
    assert f"expected a trainer's state at {state}, got a damaged" in capsys.readouterr().err
    state.unlink()
    assert track(folder, "--epochs", "2") == 0


# many kills, many epochs


@pytest.mark.slow
def test_a_run_survives_kills() -> None:
    # the runs are forked, and a process with threads of other tests must not fork
    line = [sys.executable, "-m", "tests.survive", "--only", "kills", "--kills", "6"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d files and [\d,]+ rows compared, 0 differences\.", done.stdout)


@pytest.mark.slow
def test_a_sweep_survives_kills(tmp_path: Path) -> None:
    text = (
        '[options]\nmodel = "dense"\nepochs = 1\ntrain_images = 64\ntest_images = 20\nprobe = 8\n'
        'estimator = ["linear"]\ndevice = "cpu"\n[grid]\nloss = ["hinge", "cross-entropy"]\n'
    )
    (tmp_path / "grid.toml").write_text(text)
    killed = kill_sweep(tmp_path / "grid.toml", tmp_path, kills=2)
    assert (killed.runs, len(killed.begun), killed.wrong) == (2, 2, [])
    assert killed.rows > 0


@pytest.mark.slow
def test_memory_checkpoints_and_files_of_a_long_run_do_not_accumulate(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = [sys.executable, "-m", "harness.track", "--out", str(folder), "--epochs", "200", "--model", "dense"]
    line += ["--estimator", "deepfool", "--probe", "200", "--keep-checkpoints", "50", "--no-report"]
    line += ["--device", "cpu", "--threads", "1"]
    memory, files = list[float](), list[int]()
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for output in process.stdout:
            if re.match(r"epoch +\d+/200 ", output):
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
                files.append(sum(path.is_file() for path in folder.rglob("*")))
    assert process.returncode == 0
    assert len(memory) == 201
    assert np.polyfit(np.arange(100), memory[101:], 1)[0] < 0.05  # MB per epoch
    assert np.polyfit(np.arange(100), files[101:], 1)[0] < 6  # per epoch
    assert sum(path.stat().st_size for path in (folder / "checkpoints").iterdir()) < 2**20
