"""Checkpoints that another training left are tracked without training again."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from harness.compare import main as compare
from harness.existing import existing_checkpoints
from harness.files import read_part
from harness.models import build
from harness.options import ConfigError
from harness.store import RunFolder, Unit
from harness.track import main
from tests.runs import ONE_LINE

OPTIONS = ["--model", "dense", "--estimator", "linear", "--probe", "12", "--train-images", "60", "--test-images", "20"]
OPTIONS += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])


def checkpoints(folder: Path, epochs: tuple[int, ...] = (0, 5, 10)) -> str:
    folder.mkdir()
    for epoch in epochs:
        state = build("dense", (1, 8, 8), 10, seed=epoch).state_dict()
        if epoch % 2:
            torch.save(
                {"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / f"m_{epoch}.pt"
            )
        else:
            save_file(state, folder / f"m_{epoch:03d}.safetensors")
    return str(folder / "m_*")


def test_files_are_found_by_epoch(tmp_path: Path) -> None:
    pattern = checkpoints(tmp_path / "ckpt", (10, 0, 5))
    assert {epoch: path.name for epoch, path in existing_checkpoints(pattern).items()} == {
        0: "m_000.safetensors",
        5: "m_5.pt",
        10: "m_010.safetensors",
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "quote the pattern"),
        (["best.pt"], "rename it"),
        (["a1.pt", "b1.pt"], "narrow"),
        (["20261126.pt"], "rename"),
    ],
)
def test_what_says_no_epoch_is_one_line(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=words) as caught:
        existing_checkpoints(str(tmp_path / "*.pt"))
    assert ONE_LINE.fullmatch(str(caught.value))


def test_they_are_tracked_compared_and_gone_on_with(tmp_path: Path) -> None:
    pattern, out = checkpoints(tmp_path / "ckpt"), tmp_path / "run"
    assert main([*OPTIONS, "--checkpoints", pattern, "--out", str(out)]) == 0
    folder = RunFolder(out)
    assert folder.measured_epochs(Unit("linear", "l2")) == [0, 5, 10]
    assert folder.checkpoint_epochs() == [0, 5, 10]
    assert not folder.trainer_epochs()
    assert "checkpoints that were there already" in " ".join(folder.read_manifest()["notes"])
    # the rows are of these weights
    model = build("dense", (1, 8, 8), 10, seed=5)
    rows, facts = read_part(folder.margins(5, Unit("linear", "l2")))
    from harness.files import weights_checksum

    assert facts["weights"] == weights_checksum(model)
    # one more appears, and the run goes on with it alone
    state = build("dense", (1, 8, 8), 10, seed=15).state_dict()
    save_file(state, tmp_path / "ckpt" / "m_015.safetensors")
    assert main(["--resume", "--out", str(out)]) == 0
    assert folder.measured_epochs(Unit("linear", "l2")) == [0, 5, 10, 15]
    pd.testing.assert_frame_equal(read_part(folder.margins(5, Unit("linear", "l2")))[0], rows)
    assert compare([str(out), "--estimator", "sdf", "--norm", "l2", "--epoch", "5"]) == 0
    assert folder.measured_epochs(Unit("sdf", "l2")) == [5]


def test_a_checkpoint_that_has_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, out = checkpoints(tmp_path / "ckpt", (0, 2)), tmp_path / "run"
    assert main([*OPTIONS, "--checkpoints", pattern, "--out", str(out)]) == 0
    RunFolder(out).checkpoint(2).unlink()
    RunFolder(out).predictions(2).unlink()
    save_file(build("dense", (1, 8, 8), 10, seed=99).state_dict(), tmp_path / "ckpt" / "m_002.safetensors")
    capsys.readouterr()
    assert main(["--resume", "--out", str(out)]) == 1
    assert "use another folder for another network" in capsys.readouterr().err


def test_one_of_another_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = checkpoints(tmp_path / "ckpt", (0,))
    options = ["cnn" if word == "dense" else word for word in OPTIONS]
    assert main([*options, "--checkpoints", pattern, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip()
    assert ONE_LINE.fullmatch(error)
    assert "expected weights of this model" in error
