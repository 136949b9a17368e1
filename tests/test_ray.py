"""Ray gives the same rows as one process, restarts lost tasks and reports missing resources (`tox -e libraries`)."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from attacks.types import EstimatorError
from harness.config.options import ConfigError
from harness.store import RunFolder
from harness.store.tables import read_part
from harness.tasks import EngineError
from harness.track import main
from tests.runs import ONE_LINE, Deadly, Endless
from tests.test_engines import OPTIONS, ROOT, Shapeless, differences, linear, rows_of, task_of, tracker

ray = pytest.importorskip("ray")

from harness.on_ray import RETRIES, OnRay  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local cluster that declares two cores and one GPU; no task of these tests requests the GPU."""
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_gives_the_same_rows_as_one_process(tmp_path: Path) -> None:
    for name, more in (("whole", ()), ("run", ("--engine", "ray"))):
        assert main(["--out", str(tmp_path / name), "--no-report", *OPTIONS, *more]) == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    # the cluster existed before, and is kept
    assert ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_a_model_class_of_the_main_script_is_sent(tmp_path: Path) -> None:
    class Here(nn.Linear):
        pass

    torch.manual_seed(0)
    engine = OnRay()
    for folder, last in (("here", Here(9, 3)), ("plain", None)):
        torch.manual_seed(0)
        model = linear()
        if last is not None:
            last.load_state_dict(model[1].state_dict())
            model[1] = last
        tracker(tmp_path / folder, engine, "linear").update(0, model)
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "plain")


@pytest.mark.usefixtures("cluster")
def test_an_estimator_class_of_the_main_script_is_sent() -> None:
    class Here(Deadly):
        name = "here"

    ((_, outcome),) = OnRay().run(linear(), [task_of(torch.rand(4, 1, 3, 3), Here())], lambda _: None)
    assert len(outcome.margins.distance) == 4


def test_a_closed_engine_can_be_started_again(cluster: None) -> None:
    ray.shutdown()
    engine = OnRay(1)
    engine.close()
    engine.close()
    assert not ray.is_initialized()
    list(engine.run(linear(), [task_of(torch.rand(4, 1, 3, 3), Deadly())], lambda _: None))
    assert ray.cluster_resources()["CPU"] == 1
    engine.close()
    # a cluster that the user starts afterwards is not shut down
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    engine.close()
    assert ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_loses_no_rows(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(2):
        (lives / str(number)).touch()
    estimators = "fmn:steps=5", Deadly(folder=str(lives))
    for folder, engine in (("beside", OnRay()), ("alone", None)):
        tracker(tmp_path / folder, engine, *estimators).update(0, linear())
    assert list(lives.iterdir()) == []
    assert rows_of(tmp_path / "beside") == rows_of(tmp_path / "alone")


@pytest.mark.usefixtures("cluster")
def test_a_task_that_kills_every_worker_is_abandoned(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(100):
        (lives / str(number)).touch()
    with pytest.raises(EngineError, match=f"Ray failed at deadly.* with .*Crash.* after {RETRIES} retries: "):
        tracker(tmp_path / "run", OnRay(1), Deadly(folder=str(lives)), images=4).update(0, linear())


@pytest.mark.usefixtures("cluster")
def test_errors_match_those_of_one_process() -> None:
    with pytest.raises(
        EstimatorError, match=r"^expected witnesses of shape .* got \(4,\); return one point per image$"
    ):
        next(OnRay().run(linear(), [task_of(torch.rand(4, 1, 3, 3), Shapeless())], lambda _: None))


def test_ray_keeps_our_sigterm_handler(cluster: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    engine = OnRay(2)
    assert signal.getsignal(signal.SIGTERM) is before
    engine.close()
    assert not ray.is_initialized()
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.mark.usefixtures("cluster")
def test_the_number_of_workers_fits_the_cluster() -> None:
    assert OnRay().count == 2
    assert OnRay(1).count == 1
    assert OnRay(threads=2).count == 1
    assert OnRay(gpus=1).count == 1
    # four tasks could share a GPU, but there are cores for two
    assert OnRay(gpus=0.25).count == 2
    with pytest.raises(
        ConfigError, match=r"machine of the Ray cluster with 3 CPU for a task, got 2; give --threads less"
    ):
        OnRay(threads=3)
    with pytest.raises(
        ConfigError, match=r"machine of the Ray cluster with 2 GPU for a task, got 1; give --gpus-per-worker"
    ):
        OnRay(gpus=2)


DEAD = "Ray's process on this machine (raylet) was killed or died; continue with --resume"


@pytest.mark.usefixtures("cluster")
def test_a_dead_raylet_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "endless"
    file.touch()
    engine = OnRay(1)
    assert not engine._is_dead()
    monkeypatch.setattr(engine, "_is_dead", lambda: True)
    with pytest.raises(EngineError) as caught:
        list(engine.run(linear(), [task_of(torch.rand(4, 1, 3, 3), Endless(file=str(file)))], lambda _: None))
    assert str(caught.value) == DEAD
    file.unlink()


@pytest.mark.slow
def test_a_raylet_killed_in_a_run_gives_a_one_line_error_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "harness.track", "--out", str(folder), "--no-report", "--resume", *OPTIONS]
    command += ["--engine", "ray", "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(folder.glob("shards/*/[!.]*")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    (raylet,) = (one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "raylet")
    raylet.kill()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, f"track: error: {DEAD}\n")
    assert main(["--out", str(folder), "--no-report", "--resume", *OPTIONS]) == 0


# without a cluster


def test_a_cluster_without_gpus_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if ray.is_initialized():
        ray.shutdown()
    options: list[Any] = ["--engine", "ray", "--workers", "1", "--gpus-per-worker", "0.5"]
    assert main(["--out", str(tmp_path / "run"), "--epochs", "0", "--probe", "2", *options]) == 2
    stderr = capsys.readouterr().err
    assert stderr == (
        "track: error: expected a machine of the Ray cluster with 0.5 GPU for a task, got 0; give --gpus-per-worker "
        "less, or take a larger cluster\n"
    )
    assert not (tmp_path / "run").exists()
    # a cluster started by the engine is shut down
    assert not ray.is_initialized()


def test_a_missing_cluster_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, got ") as error:
        OnRay()
    assert ONE_LINE.fullmatch(str(error.value))


def test_rows_of_a_part_exist(tmp_path: Path) -> None:
    """The comparisons above rely on it."""
    tracker(tmp_path, None, "linear").update(0, linear())
    (part,) = RunFolder(tmp_path).margin_parts()
    assert len(read_part(part)[0]) == len(rows_of(tmp_path)[part.name]["distance"]) == 24
