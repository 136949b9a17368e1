"""Parallel workers give the same rows as one process, and lose no rows when they die."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from torch import nn

from attacks.measure import MeasureOptions
from attacks.memory import REFILLED, chunk_length
from attacks.registry import create
from attacks.types import EstimatorError, InputError
from harness import MarginTracker
from harness.compare import main as compare_again
from harness.config.options import ConfigError
from harness.engines import create_engine
from harness.measuring.clocks import UnitClocks
from harness.measuring.listener import Listener
from harness.measuring.shards import _short, find_shard, keep_shard
from harness.store import RunFolder, Unit
from harness.store.tables import read_part
from harness.tasks import Engine, EngineError, InProcess, Overdue, ProcessSettings, Task, run_task
from harness.track import main
from harness.workers import DEATHS, Workers, _device
from tests.runs import ONE_LINE, Deadly, Dropping, Endless, contents
from tests.survive.comparing import compare

ROOT = Path(__file__).parents[1]
OPTIONS = (
    *("--model", "tests.runs:net", "--epochs", "1", "--train-images", "96", "--test-images", "60", "--probe", "32"),
    # an attack that draws noise per chunk, one that refills batches, one that starts from the previous epoch
    *("--estimator", "torchattacks:PGD:steps=5", "--estimator", "deepfool:steps=5", "--estimator", "fmn:steps=10"),
    *("--warm-start", "--measure-batch", "4", "--noise-retries", "1", "--device", "cpu", "--threads", "1"),
)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes shared by all tests that do not kill them: each takes seconds to start."""
    engine = Workers(2, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["--out", str(folder), "--no-report", *OPTIONS]) == 0
    return folder


def differences(folder: Path, whole: Path) -> list[str]:
    """Differences except the engine, which the manifest records."""
    comparison = compare(folder, whole)
    assert comparison.rows > 300
    return [line for line in comparison.differences if line != "manifest.json has another config"]


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


def tracker(folder: Path, engine: Engine | None, *estimators: Any, images: int = 24, **more: Any) -> MarginTracker:
    torch.manual_seed(1)
    probes = {"train": (torch.rand(images, 1, 3, 3), torch.arange(images) % 3)}
    return MarginTracker(folder, probes, estimators or ["deepfool"], ["l2"], batch_size=4, engine=engine, **more)


def rows_of(folder: Path) -> dict[str, dict[str, list[Any]]]:
    parts = RunFolder(folder).margin_parts()
    return {path.name: read_part(path)[0].drop(columns="seconds").fillna(-1.0).to_dict("list") for path in parts}


# the same rows


@pytest.mark.slow
def test_workers_give_the_same_rows_as_one_process(tmp_path: Path, whole: Path) -> None:
    assert main(["--out", str(tmp_path / "run"), "--no-report", *OPTIONS, "--workers", "2"]) == 0
    assert differences(tmp_path / "run", whole) == []
    assert contents(tmp_path / "run").keys() == contents(whole).keys()


@pytest.mark.slow
def test_a_worker_averages_over_draws_as_this_process_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, names = Dropping(9, 3), ("fmn:steps=3", "linear")
    with contextlib.closing(Workers(1, threads=1)) as worker:
        for name, engine in (("here", None), ("worker", worker)):
            tracker(tmp_path / name, engine, *names, images=6, expect_over=2, noise_retries=1).update(0, model)
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "worker")
    assert len(rows_of(tmp_path / "here")) == 2


@pytest.mark.slow
def test_control_another_seed_is_noticed(tmp_path: Path, whole: Path) -> None:
    options = [*OPTIONS, "--workers", "2", "--seed", "1"]
    assert main(["--out", str(tmp_path / "run"), "--no-report", *options]) == 0
    assert any("has other values of distance" in line for line in differences(tmp_path / "run", whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchattacks:PGD:steps=5", "deepfool:steps=5"])
def test_tasks_of_whole_chunks_give_the_margins_of_one_task(name: str) -> None:
    model, images, estimator = linear(), torch.rand(40, 1, 3, 3), create(name)
    length = chunk_length(model, images, estimator, domain="box", bounds=(0.0, 1.0), batch_size=4)
    assert length == (4 * REFILLED if name.startswith("deepfool") else 4)

    def in_parts(size: int) -> list[float]:
        task = task_of(images, estimator)
        parts = [slice(first, first + size) for first in range(0, 40, size)]
        tasks = [replace(task, images=images[part], seeds=task.seeds[part], first=part.start) for part in parts]
        return [d for one in tasks for d in run_task(model, one).margins.distance.tolist()]

    together = in_parts(40)
    assert in_parts(length) == together
    if name.startswith("torchattacks"):
        assert in_parts(length + 1) != together


def task_of(images: torch.Tensor, estimator: Any, unit: Unit | None = None) -> Task:
    seeds = tuple(range(len(images)))
    unit = unit or Unit("some", "linf")
    return Task(unit, "train", 0, estimator, images, seeds, None, MeasureOptions(noise_retries=1, batch_size=4))


class CountingListener(Listener):
    def __init__(self) -> None:
        self.started: list[tuple[Sequence[Unit], int]] = []
        self.images = 0

    def units_started(self, epoch: int, units: Sequence[Unit], images: int) -> None:
        self.started.append((list(units), images))

    def images_done(self, count: int) -> None:
        self.images += count


def test_all_units_of_an_epoch_run_in_parallel(tmp_path: Path, workers: Workers) -> None:
    ears = CountingListener()
    parallel = tracker(tmp_path / "beside", workers, "linear", "fmn:steps=5", listener=ears)
    parallel.update(0, linear())
    assert ears.started == [(parallel.units, 48)]
    assert ears.images == 48
    alone = tracker(tmp_path / "alone", InProcess(), "linear", "fmn:steps=5")
    alone.update(0, linear())
    assert rows_of(tmp_path / "beside") == rows_of(tmp_path / "alone")


@pytest.mark.slow
def test_errors_match_those_of_one_process(tmp_path: Path, workers: Workers) -> None:
    measuring = workers.run(linear(), [task_of(torch.rand(4, 1, 3, 3), Shapeless())], lambda _: None)
    with pytest.raises(EstimatorError, match=r"expected witnesses of shape .* got \(4,\); return one point per image"):
        next(measuring)


class Shapeless(Deadly):
    name = "shapeless"

    def perturb(self, *given: Any, **named: Any) -> torch.Tensor:
        return torch.zeros(4)


# refusals


def test_a_model_that_cannot_be_sent(tmp_path: Path, workers: Workers) -> None:
    class Here(nn.Linear):
        pass

    model = nn.Sequential(nn.Flatten(), Here(9, 3))
    with pytest.raises(EngineError, match=ONE_LINE):
        tracker(tmp_path, workers).update(0, model)


@pytest.mark.slow
def test_an_estimator_that_cannot_be_sent(tmp_path: Path, workers: Workers) -> None:
    class Here(Deadly):
        pass

    with pytest.raises(EngineError, match="expected an estimator that can be sent to another process, got some"):
        next(workers.run(linear(), [task_of(torch.rand(4, 1, 3, 3), Here())], lambda _: None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "-1"), "expected --workers of at least 0, got -1; "),
        (("--engine", "rey"), "expected --engine to be one of local, ray, got 'rey'; "),
        (("--gpus-per-worker", "0.5"), "expected --gpus-per-worker with --engine ray, got 0.5 with local; "),
    ],
)
def test_unknown_engines_are_refused(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "run"), "--epochs", "0", "--probe", "2", *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_zero_workers_mean_this_process() -> None:
    with pytest.raises(EngineError, match="expected at least 1 worker, got 0"):
        Workers(0)
    device = torch.device("cpu")
    assert isinstance(create_engine("local", 0, device), InProcess)
    with pytest.raises(ConfigError):
        create_engine("local", 2, device, gpus=1.0)


def test_ray_does_not_measure_a_cuda_model_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"expected --gpus-per-worker for Ray's tasks .*, got 0; give it"):
        create_engine("ray", 2, torch.device("cuda"))


# workers that die


@pytest.mark.slow
def test_a_killed_worker_loses_no_rows(tmp_path: Path) -> None:
    engine = Workers(2, threads=1)
    # both kinds of unit have their own shards; two of these tasks kill their process
    estimators = "fmn:steps=5", Deadly(folder=str(tmp_path / "lives"))
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(2):
        (lives / str(number)).touch()
    ears = CountingListener()
    parallel = tracker(tmp_path / "beside", engine, *estimators, listener=ears)
    parallel.update(0, linear())
    parallel.close()
    assert list(lives.iterdir()) == []
    assert engine.deaths == 2
    assert ears.images == 48
    alone = tracker(tmp_path / "alone", None, *estimators)
    alone.update(0, linear())
    assert rows_of(tmp_path / "beside") == rows_of(tmp_path / "alone")
    assert not (tmp_path / "beside" / "shards").exists()


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_abandoned(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(10 * DEATHS):
        (lives / str(number)).touch()
    engine = Workers(1, threads=1)
    parallel = tracker(tmp_path / "run", engine, "linear", Deadly(folder=str(lives)))
    with pytest.raises(EngineError, match=f"{DEATHS} workers died at deadly.* images 0 to 7; if memory ran out"):
        parallel.update(0, linear())
    parallel.close()
    # the other unit is complete
    assert list(rows_of(tmp_path / "run")) == ["linear.l2.parquet"]


@pytest.mark.slow
def test_a_worker_that_dies_between_epochs_is_replaced(tmp_path: Path) -> None:
    engine = Workers(1, threads=1)
    parallel = tracker(tmp_path / "run", engine, "linear")
    parallel.update(0, linear())
    for child in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    parallel.update(1, linear(1))
    parallel.close()
    assert len(rows_of(tmp_path / "run")) == 1
    assert RunFolder(tmp_path / "run").measured_epochs(Unit("linear", "l2")) == [0, 1]


def _dying(self: Any, content: Any, *given: Any) -> None:
    os.write(self.fileno(), bytes(content[:500]))
    os.kill(os.getpid(), signal.SIGKILL)


class Halfway(Deadly):
    """Dies once while it sends its result."""

    name = "halfway"

    def perturb(self, model: Any, images: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        for path in Path(self.folder).glob("*"):
            path.unlink()
            Connection._send = _dying  # type: ignore[attr-defined]
        return 1 - images


@pytest.mark.slow
def test_a_worker_killed_while_sending_its_result_loses_no_rows(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "0").touch()
    engine = Workers(2, threads=1)
    parallel = tracker(tmp_path / "beside", engine, Halfway(folder=str(lives)))
    parallel.update(0, linear())
    parallel.close()
    assert engine.deaths == 1
    alone = tracker(tmp_path / "alone", None, Halfway(folder=str(lives)))
    alone.update(0, linear())
    assert rows_of(tmp_path / "beside") == rows_of(tmp_path / "alone")


class Odd(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one}\n{other}")


class RaisesOdd(nn.Linear):
    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise Odd(1, 2)


@pytest.mark.slow
def test_an_exception_that_cannot_be_pickled_is_reported(workers: Workers) -> None:
    model = nn.Sequential(nn.Flatten(), RaisesOdd(9, 3))
    measuring = workers.run(model, [task_of(torch.rand(4, 1, 3, 3), create("linear"))], lambda _: None)
    with pytest.raises(ValueError, match="Odd: 1 2") as caught:
        next(measuring)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


@pytest.mark.slow
def test_classes_that_workers_cannot_import(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom torch import nn\nfrom harness import MarginTracker\nfrom harness.workers import Workers\n"
        "torch.manual_seed(0)\n"
        "class Net(nn.Linear): ...\n"
        "probes = {'test': (torch.rand(4, 1, 3, 3), torch.arange(4) % 3)}\n"
        "engine = Workers(1)\n"
        f"tracker = MarginTracker({str(tmp_path / 'run')!r}, probes, ['linear'], ['l2'], engine=engine)\n"
        "tracker.update(0, nn.Sequential(nn.Flatten(), Net(9, 3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "expected workers that can import the model and the estimator, got AttributeError: " in message
    # a script without the main guard: each worker would run it again
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "mine.py").write_text(script)
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'put a script\'s own work under if __name__ == "__main__"' in done.stderr.strip().splitlines()[-1]


def test_settings_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ProcessSettings.here()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
        there = ProcessSettings.here(3)
        before.apply()
        assert not torch.are_deterministic_algorithms_enabled()
        there.apply()
        assert ProcessSettings.here() == there
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_num_threads() == 3
    finally:
        before.apply()


def test_gpus_are_assigned_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(_device(torch.device("cuda:3"), number)) for number in range(3)] == ["cuda:3", "cuda:0", "cuda:1"]
    assert str(_device(torch.device("cpu"), 1)) == "cpu"


@pytest.mark.slow
def test_a_logger_that_fails_to_close_leaves_no_worker(tmp_path: Path) -> None:
    class Stuck:
        def log(self, epoch: int, values: Any) -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    before = set(psutil.Process().children(recursive=True))
    parallel = tracker(tmp_path / "run", Workers(1, threads=1), "linear", loggers=[Stuck()])
    parallel.update(0, linear())
    started = [
        child
        for child in set(psutil.Process().children(recursive=True)) - before
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(started) == 1
    with pytest.raises(OSError, match="disk full"):
        parallel.close()
    assert not any(child.is_running() for child in started)


# units that never end


@pytest.mark.slow
def test_a_unit_that_never_ends_is_stopped_and_retried(tmp_path: Path) -> None:
    file = tmp_path / "endless"
    file.touch()
    estimators = Endless(file=str(file)), "linear"
    unit = Unit(f"endless:file={file}", "l2")
    with contextlib.closing(tracker(tmp_path / "run", None, *estimators, unit_timeout=0.5)) as limited:
        with pytest.warns(UserWarning, match=r"^endless.* l2 was stopped after 0\.5\d* s at epoch 0$"):
            summary = limited.update(0, linear())
        assert set(summary["estimator"]) == {"linear"}
        assert limited.failures == [
            f"stopped after the unit timeout, and without margins: {unit} at epoch 0; measure again to try again"
        ]
        assert not limited.has(0)
        assert not limited.folder.margins(0, unit).exists()
        file.unlink()
        limited.update(0, linear())
        assert limited.has(0)
        assert limited.failures == []
    tracker(tmp_path / "whole", None, *estimators).update(0, linear())
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


def test_the_time_of_a_unit_runs_from_its_first_task_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("harness.measuring.clocks.time.monotonic", lambda: now)
    first, second = Unit("a", "l2"), Unit("a", "linf")
    clocks = UnitClocks(5)
    assert clocks.patience() is None
    clocks.begin(first)
    now = 12.0
    clocks.begin(first)
    clocks.begin(second)
    assert clocks.patience() == 3.0
    assert clocks.late({first, second}) == {}
    now = 15.5
    assert clocks.patience() == 0.0
    assert clocks.late({first, second}) == {first: 5.5}
    assert clocks.patience() == 1.5
    now = 20.0
    assert clocks.late(set()) == {}
    assert clocks.patience() is None


def test_invalid_unit_timeouts_give_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "run"), "--unit-timeout"]
    for argv, words in (
        ([*options, "5", "--engine", "ray"], "expected --unit-timeout with --engine local, got 5 with ray; leave it"),
        ([*options, "0"], "expected --unit-timeout above 0, got 0.0; give a larger number"),
    ):
        assert main(argv) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert ONE_LINE.fullmatch(stderr.rstrip("\n"))
        assert not (tmp_path / "run").exists()
    assert compare_again([str(tmp_path), "--estimator", "fmn", "--unit-timeout", "-1"]) == 2
    assert "expected --unit-timeout above 0, got -1; give another number" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected unit_timeout without engine, got both"):
        tracker(tmp_path / "run", InProcess(), "linear", unit_timeout=1.0)
    with pytest.raises(EngineError, match="expected a unit timeout above 0 seconds, got inf"):
        Workers(1, unit_timeout=float("inf"))


class Stopping(InProcess):
    """Stops the units of one estimator."""

    def run(self, model: nn.Module, tasks: Sequence[Task], on_progress: Any) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if task.unit.estimator == "fmn:steps=3":
                yield task, Overdue(0.25)
            else:
                yield task, run_task(model, task, on_progress)


@pytest.mark.slow
def test_stopped_units_end_a_run_and_a_comparison_with_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    monkeypatch.setattr("harness.engines.create_engine", lambda *_, **__: Stopping())
    options = ["--model", "dense", "--train-images", "64", "--test-images", "20", "--probe", "8", "--epochs", "1"]
    estimators = ["--estimator", "linear", "--estimator", "fmn:steps=3", "--norm", "l2", "--unit-timeout", "1"]
    run = tmp_path / "run"
    assert main(["--out", str(run), "--no-report", "--device", "cpu", *options, *estimators]) == 1
    line = "stopped after the unit timeout, and without margins: fmn:steps=3 l2 at epoch 0, 1; measure again to try"
    assert capsys.readouterr().err == f"track: error: {line} again\n"
    assert RunFolder(run).measured_epochs(Unit("linear", "l2")) == [0, 1]
    assert compare_again([str(run), "--estimator", "fmn:steps=3", "--unit-timeout", "1"]) == 1
    assert capsys.readouterr().err == f"compare: error: run: {line} again\n"
    monkeypatch.undo()
    assert main(["--out", str(run), "--no-report", "--resume", *options, *estimators[:-2]]) == 0
    assert RunFolder(run).measured_epochs(Unit("fmn:steps=3", "l2")) == [0, 1]


# shards


def a_shard(folder: RunFolder) -> Task:
    task = task_of(torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(0)), create("linear"))
    keep_shard(folder, 3, task, run_task(linear(), task), "weights")
    return task


def test_a_shard_is_read_back_unchanged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    task = a_shard(folder)
    shard, measured = find_shard(folder, 3, task, "weights"), run_task(linear(), task)
    assert shard is not None
    for name, value in vars(measured.margins).items():
        back = getattr(shard.margins, name)
        same = isinstance(value, torch.Tensor) and torch.allclose(back, value, rtol=0, atol=0, equal_nan=True)
        assert same or back == value


def test_a_shard_of_another_unit_is_ignored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    task = a_shard(folder)
    assert find_shard(folder, 3, task, "other weights") is None
    assert find_shard(folder, 4, task, "weights") is None
    assert find_shard(folder, 3, replace(task, seeds=(0, 1, 2, 3, 5)), "weights") is None
    # started from other witnesses
    assert find_shard(folder, 3, replace(task, start=task.images), "weights") is None
    assert find_shard(folder, 3, task, "weights") is not None


def test_shards_of_a_complete_unit_are_deleted_on_resume(tmp_path: Path) -> None:
    first = tracker(tmp_path, None, "linear")
    first.update(3, linear())
    unit, other = first.units[0], Unit("some", "linf")
    probe = torch.rand(5, 1, 3, 3)
    for one in (unit, other):
        task = task_of(probe, create("linear"), one)
        keep_shard(first.folder, 3, task, run_task(linear(), task), "weights")
    tracker(tmp_path, None, "linear").update(4, linear())
    # the shards of the other unit may be needed
    assert len(list(first.folder.shards(3).iterdir())) == 1
    assert find_shard(first.folder, 3, task_of(probe, create("linear"), other), "weights") is not None


@pytest.mark.slow
def test_a_damaged_shard_is_measured_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    task = a_shard(folder)
    (path,) = folder.shards(3).iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place])
        assert find_shard(folder, 3, task, "weights") is None
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert find_shard(folder, 3, task, "weights") is None
    path.write_bytes(content)
    assert find_shard(folder, 3, task, "weights") is not None


# the whole command


@pytest.mark.slow
def test_a_finished_run_is_measured_again_by_workers(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    for name, more in (("beside", ["--workers", "2"]), ("alone", [])):
        shutil.copytree(whole, tmp_path / name)
        assert compare_again([str(tmp_path / name), "--estimator", "fmn:steps=5", "--threads", "1", *more]) == 0
    assert differences(tmp_path / "beside", tmp_path / "alone") == []
    folder = RunFolder(tmp_path / "beside")
    assert folder.measured_epochs(Unit("fmn:steps=5", "linf")) == [0, 1]
    assert compare_again([str(whole), "--estimator", "fmn", "--workers", "-1"]) == 2
    assert "expected --workers and --gpus-per-worker of at least 0, got -1 and 0; raise" in capsys.readouterr().err


def command(folder: Path) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "harness.track", "--out", str(folder), "--resume", "--no-report", *OPTIONS]
    return subprocess.Popen(
        [*line, "--workers", "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def first_shard(folder: Path) -> None:
    end = time.monotonic() + 90
    while not list(folder.glob("shards/*/[!.]*")):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_the_command_killed_leaves_no_workers_and_loses_no_shard(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = command(tmp_path / "run")
    first_shard(tmp_path / "run")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    kept = len(list(tmp_path.glob("run/shards/*/[!.]*")))
    assert kept > 0
    found: list[Any] = []
    monkeypatch.setattr(
        "harness.measuring.margins.find_shard", lambda *given: found.append(find_shard(*given)) or found[-1]
    )
    assert main(["--out", str(tmp_path / "run"), "--resume", "--no-report", *OPTIONS, "--workers", "2"]) == 0
    assert sum(one is not None for one in found) == kept
    assert differences(tmp_path / "run", whole) == []
    assert not (tmp_path / "run" / "shards").exists()


@pytest.mark.slow
def test_ctrl_c_ends_workers_without_output(tmp_path: Path) -> None:
    process = command(tmp_path / "run")
    first_shard(tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "track: interrupted; to resume, run the same command with --resume and its --out\n"


@pytest.mark.slow
def test_unfinished_work_of_workers_is_completed_by_one_process(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    unit = Unit("deepfool:steps=5", "l2")
    folder = RunFolder(tmp_path / "run")
    folder.margins(1, unit).unlink()
    left = folder.shards(1) / f"{_short(unit.filename)}.train-0-32.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    assert main(["--out", str(tmp_path / "run"), "--resume", "--no-report", *OPTIONS]) == 0
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_the_arguments_of_a_task_name_its_images(tmp_path: Path) -> None:
    parts: Mapping[str, Any] = {"images": torch.rand(7, 1, 3, 3), "estimator": create("linear")}
    assert str(replace(task_of(**parts), first=40)) == "some linf, train images 40 to 46"
