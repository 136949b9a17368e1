"""Averages reach the real loggers once per epoch; each test needs its library (`tox -e libraries`)."""

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from attacks.types import EstimatorError
from harness import MarginTracker
from harness.loggers import averages, check_logger, create_logger
from harness.store import Unit
from harness.track import main
from tests.runs import ONE_LINE

NAMES = {f"margin/{split}/linear/{norm}" for split in ("train", "test") for norm in ("l2", "linf")}


class Notes:
    """A logger that stores its calls."""

    def __init__(self) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self.got.append((epoch, dict(values)))

    def close(self) -> None:
        self.closed += 1


def tracked(folder: Path, *loggers: object) -> MarginTracker:
    torch.manual_seed(0)
    images = torch.rand(4, 1, 3, 3)
    probes = {name: (images, torch.tensor([0, 1, 2, 0])) for name in ("train", "test")}
    tracker = MarginTracker(folder, probes, ["linear"], loggers=loggers)  # type: ignore[arg-type]
    for epoch in (0, 1):
        torch.manual_seed(epoch)
        tracker.update(epoch, nn.Sequential(nn.Flatten(), nn.Linear(9, 3)))
    return tracker


def test_averages_of_every_measured_epoch_are_logged_once(tmp_path: Path) -> None:
    notes = Notes()
    tracker = tracked(tmp_path, notes)
    assert [epoch for epoch, _ in notes.got] == [0, 1]
    summary = tracker.summary()
    for epoch, values in notes.got:
        assert values.keys() == NAMES
        rows = summary[(summary["epoch"] == epoch) & (summary["subset"] == "all")]
        wanted = {f"margin/{r.split}/{r.estimator}/{r.norm}": r.avg for r in rows.itertuples()}
        assert values == pytest.approx(wanted)
    # on resuming, nothing is measured and nothing logged
    again = Notes()
    tracked(tmp_path, again).close()
    assert again.got == []
    assert again.closed == 1


def test_only_newly_measured_epochs_are_logged(tmp_path: Path) -> None:
    tracked(tmp_path)
    notes = Notes()
    torch.manual_seed(0)
    images = torch.rand(4, 1, 3, 3)
    probes = {name: (images, torch.tensor([0, 1, 2, 0])) for name in ("train", "test")}
    more = MarginTracker(tmp_path, probes, ["linear", "fmn:steps=2"], ["l2"], loggers=[notes])
    torch.manual_seed(1)
    summary = more.update(1, nn.Sequential(nn.Flatten(), nn.Linear(9, 3)))
    ((epoch, values),) = notes.got
    assert epoch == 1
    assert values.keys() == {"margin/train/fmn:steps=2/l2", "margin/test/fmn:steps=2/l2"}
    assert values == more.measured_averages
    assert set(summary["estimator"]) == {"linear", "fmn:steps=2"}


def test_an_epoch_without_any_margin_logs_no_averages() -> None:
    row = {"subset": "all", "split": "test", "estimator": "fmn", "norm": "l2"}
    rows = pd.DataFrame([{**row, "avg": float("nan")}, {**row, "norm": "linf", "avg": 0.5}])
    assert averages(rows, [Unit("fmn", "l2"), Unit("fmn", "linf")]) == {"margin/test/fmn/linf": 0.5}
    assert averages(rows, [Unit("fmn", "l2")]) == {}


def test_unknown_loggers_give_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EstimatorError, match="expected a logger of tensorboard, wandb, mlflow, got 'board'"):
        check_logger("board:here")
    assert main(["--log", "board", "--out", str(tmp_path / "run")]) == 2
    assert ONE_LINE.fullmatch(capsys.readouterr().err.strip())
    assert not (tmp_path / "run").exists()


def test_a_missing_package_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(EstimatorError, match=r"expected the package of the logger wandb, .*install margin-harness"):
        create_logger("wandb:mine")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tracked(tmp_path / "run", f"tensorboard:{tmp_path / 'events'}")
    tracker.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    scalars = events.Scalars("margin/test/linear/l2")
    assert [one.step for one in scalars] == [0, 1]
    summary = tracker.summary().query("subset == 'all' and split == 'test' and norm == 'l2'")
    assert [one.value for one in scalars] == pytest.approx(summary["avg"].tolist(), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracker = tracked(tmp_path / "run", "wandb:margins")
    assert wandb.run is not None
    logged = dict(wandb.run.summary)
    assert logged["margin_epoch"] == 1
    summary = tracker.summary().query("subset == 'all' and epoch == 1")
    for row in summary.itertuples():
        assert logged[f"margin/{row.split}/{row.estimator}/{row.norm}"] == pytest.approx(row.avg)
    tracker.close()
    assert wandb.run is None
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_local_store(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    tracker = tracked(tmp_path / "run", f"mlflow:{(tmp_path / 'store').as_uri()}")
    run = mlflow.active_run()
    tracker.close()
    assert mlflow.active_run() is None
    client = mlflow.tracking.MlflowClient((tmp_path / "store").as_uri())
    history = client.get_metric_history(run.info.run_id, "margin/test/linear/linf")
    assert [one.step for one in history] == [0, 1]
    summary = tracker.summary().query("subset == 'all' and split == 'test' and norm == 'linf'")
    assert [one.value for one in history] == pytest.approx(summary["avg"].tolist())
