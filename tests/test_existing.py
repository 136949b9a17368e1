"""Checkpoints of another training run are tracked without training again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import Normalize

from harness.compare import main as compare
from harness.config.options import ConfigError
from harness.measuring.rows import measure_margins
from harness.models.build import build
from harness.models.checkpoints import existing_checkpoints, mapping_line
from harness.runs import read_run
from harness.store import RunFolder, Unit
from harness.store.tables import read_part
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
    ("names", "epochs"),
    [
        (["epoch=0-val_loss=0.90.ckpt", "epoch=1-val_loss=0.80.ckpt", "epoch=10-val_loss=0.70.ckpt"], [0, 1, 10]),
        (["epoch_10_step_500.pt", "epoch_20_step_1000.pt"], [10, 20]),
        (["net50_ep12_7.pt", "net50_ep13_7.pt"], [12, 13]),
        (["step12_ep3.pt"], [3]),
        (["resnet18_0.pt", "resnet18_1.pt"], [0, 1]),
        (["resnet18_0_v2.pt", "resnet18_1_v2.pt"], [0, 1]),
        (["resnet18_7.pt"], [7]),
        (["m_5.pt", "m_010.safetensors"], [5, 10]),
    ],
)
def test_the_epoch_is_read_from_a_name(tmp_path: Path, names: list[str], epochs: list[int]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    result = existing_checkpoints(str(tmp_path / "*"))
    assert {path.name: epoch for epoch, path in result.items()} == dict(zip(names, epochs, strict=True))
    assert list(result) == epochs


@pytest.mark.parametrize("pattern", ["run[v1]/m_*.pt", "run[v1]/m_3[[]x].pt", "run[v1]/m_3[x].pt", "run[[]v1]/m_3*"])
def test_brackets_in_a_path_are_literal(tmp_path: Path, pattern: str) -> None:
    for folder in ("run[v1]", "runv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m_3[x].pt").write_bytes(b"")
    assert existing_checkpoints(str(tmp_path / pattern)) == {3: tmp_path / "run[v1]" / "m_3[x].pt"}


def test_brackets_in_a_pattern_are_a_set_of_characters(tmp_path: Path) -> None:
    for name in ("m_3.pt", "m_4.pt", "m_5.pt"):
        (tmp_path / name).write_bytes(b"")
    assert list(existing_checkpoints(str(tmp_path / "m_[34].pt"))) == [3, 4]


def test_the_mapping_is_printed_in_one_line() -> None:
    files = {epoch: Path(f"ckpt/m_{epoch}.pt") for epoch in range(12)}
    assert (
        mapping_line({3: Path("ckpt/a3.pt"), 4: Path("ckpt/a4.pt")}) == "checkpoints by epoch: a3.pt -> 3, a4.pt -> 4"
    )
    assert (
        mapping_line(files)
        == "checkpoints by epoch: m_0.pt -> 0, m_1.pt -> 1, m_2.pt -> 2, ... and 8 more, m_11.pt -> 11"
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "quote the pattern"),
        (["best.pt"], "got best.pt; rename it to say epoch-N"),
        (["a1.pt", "b1.pt"], "narrow"),
        (["20261126.pt"], "rename"),
        (["resnet18_best.pt"], "got resnet18_best.pt; rename it to say epoch-N"),
        (["resnet18_0.pt", "resnet18_1.pt", "resnet18_best.pt"], "got resnet18_best.pt next to resnet18_0.pt; narrow"),
        (["epoch=0.pt", "epoch=1.pt", "last.pt"], "got last.pt; rename it"),
        (["m_0_9.pt", "m_1_8.pt"], "differ in one number, got m_0_9.pt and m_1_8.pt; rename them to say epoch-N"),
        (["epoch1.pt", "epoch01.pt"], "expected one checkpoint per epoch, got epoch01.pt and epoch1.pt; narrow"),
        (["epoch1_epoch2.pt"], "got epoch1_epoch2.pt; rename it"),
    ],
)
def test_names_without_an_epoch_give_a_one_line_error(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=words) as caught:
        existing_checkpoints(str(tmp_path / "*.pt"))
    assert ONE_LINE.fullmatch(str(caught.value))


@pytest.mark.slow
def test_checkpoints_are_tracked_compared_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, out = checkpoints(tmp_path / "ckpt"), tmp_path / "run"
    assert main([*OPTIONS, "--checkpoints", pattern, "--out", str(out)]) == 0
    folder = RunFolder(out)
    assert folder.measured_epochs(Unit("linear", "l2")) == [0, 5, 10]
    assert folder.checkpoint_epochs() == [0, 5, 10]
    assert not folder.trainer_epochs()
    assert "checkpoints that were there already" in " ".join(folder.read_manifest()["notes"])
    stdout = capsys.readouterr().out.splitlines()
    mapping = "checkpoints by epoch: m_000.safetensors -> 0, m_5.pt -> 5, m_010.safetensors -> 10"
    assert stdout.index(mapping) < next(row for row, line in enumerate(stdout) if line.startswith("epoch   0"))
    # the rows belong to these weights
    model = build("dense", (1, 8, 8), 10, seed=5)
    rows, facts = read_part(folder.margins(5, Unit("linear", "l2")))
    from harness.store.tensors import weights_checksum

    assert facts["weights"] == weights_checksum(model)
    # another checkpoint appears, and the run measures only that one
    state = build("dense", (1, 8, 8), 10, seed=15).state_dict()
    save_file(state, tmp_path / "ckpt" / "m_015.safetensors")
    assert main(["--resume", "--out", str(out)]) == 0
    assert folder.measured_epochs(Unit("linear", "l2")) == [0, 5, 10, 15]
    pd.testing.assert_frame_equal(read_part(folder.margins(5, Unit("linear", "l2")))[0], rows)
    assert compare([str(out), "--estimator", "sdf", "--norm", "l2", "--epoch", "5"]) == 0
    assert folder.measured_epochs(Unit("sdf", "l2")) == [5]


@pytest.mark.slow
def test_a_checkpoint_that_has_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, out = checkpoints(tmp_path / "ckpt", (0, 2)), tmp_path / "run"
    assert main([*OPTIONS, "--checkpoints", pattern, "--out", str(out)]) == 0
    RunFolder(out).checkpoint(2).unlink()
    RunFolder(out).predictions(2).unlink()
    save_file(build("dense", (1, 8, 8), 10, seed=99).state_dict(), tmp_path / "ckpt" / "m_002.safetensors")
    capsys.readouterr()
    assert main(["--resume", "--out", str(out)]) == 1
    assert "use another folder for another network" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_gives_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = checkpoints(tmp_path / "ckpt", (0,))
    options = ["cnn" if word == "dense" else word for word in OPTIONS]
    assert main([*options, "--checkpoints", pattern, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip()
    assert ONE_LINE.fullmatch(error)
    assert "expected weights of this model" in error


@pytest.mark.slow
def test_margins_of_checkpoints_match_the_saved_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's ResNet-18, trained outside the harness with torchvision's normalisation on an npz file."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    arrays = {f"x_{split}": draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
    np.savez("mine.npz", **arrays, y_train=np.arange(40) % 10, y_test=np.arange(40) % 10)  # type: ignore[arg-type]
    images = {name: torch.from_numpy(value).permute(0, 3, 1, 2) / 255 for name, value in arrays.items()}
    labels = torch.arange(40) % 10
    torch.manual_seed(0)
    network, models = resnet18(num_classes=10), list[nn.Module]()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for epoch in range(2):
        if epoch:
            model = nn.Sequential(Normalize([0.3] * 3, [0.37] * 3), network).train()
            nn.functional.cross_entropy(model(images["x_train"]), labels).backward()
            optimizer.step()
        torch.save({"state_dict": network.state_dict(), "epoch": epoch}, f"resnet-{epoch}.pt")
        kept = resnet18(num_classes=10)
        kept.load_state_dict(network.state_dict())
        models.append(nn.Sequential(Normalize([0.3] * 3, [0.37] * 3), kept).eval())
    options = ["--checkpoints", "resnet-*.pt", "--model", "torchvision:resnet18", "--normalize", "0.3:0.37"]
    options += ["--dataset", "npz:mine.npz", "--estimator", "deepfool", "--estimator", "fmn:steps=10", "--probe", "4"]
    assert main([*options, "--noise-retries", "0", "--device", "cpu", "--out", "run"]) == 0
    margins = read_run(Path("run")).margins
    for epoch, model in enumerate(models):
        rows = margins[(margins["epoch"] == epoch) & (margins["split"] == "test")]
        ids = np.sort(rows["image"].unique())
        probe = images["x_test"][ids], labels[ids], torch.from_numpy(ids)
        again = measure_margins(model, probe, ["deepfool", "fmn:steps=10"], noise_retries=0)
        both = rows.merge(again, on=["image", "estimator", "norm"], suffixes=("", "_again"))
        assert len(both) == len(rows) == 4 * 2 * 2
        assert (both["status"] == both["status_again"]).all()
        found = both[np.isfinite(both["distance"])]
        assert len(found) > 12
        assert (found["distance_again"] / found["distance"] - 1).abs().max() < 1e-4
