"""Every `harness` command of the documentation runs, on small data; `tests.test_docs` parses all of them by default."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from harness.sweep import Entry, as_arguments
from harness.track import main as track
from tests.test_docs import ROOT, commands

pytestmark = pytest.mark.slow

# smaller than on the pages; the last value on the command line counts
SMALL = {
    "harness.track": (
        *("--epochs", "1", "--train-images", "24", "--test-images", "12", "--probe", "2"),
        *("--noise-retries", "1", "--device", "cpu", "--threads", "1", "--no-report"),
    ),
    "harness.compare": ("--device", "cpu"),
}
# they are downloaded or read from a disk
ELSEWHERE = {"fashion-mnist": "digits", "mnist": "digits"}
PLACEHOLDERS = {"RUN": "runs/mine", "[RUN": "runs/other", "...]": None}
LINES = list(dict.fromkeys((m, tuple(words)) for _, m, words in commands() if m.startswith("harness.")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    arrays = {f"x_{s}": draw.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8) for s in ("train", "test")}
    labels = {f"y_{s}": np.arange(24) % 10 for s in ("train", "test")}
    np.savez(folder / "mine.npz", **arrays, **labels)  # type: ignore[arg-type]
    for split in ("train", "test"):
        for number, label in enumerate(labels[f"y_{split}"]):
            (folder / "pictures" / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(arrays[f"x_{split}"][number]).save(folder / f"pictures/{split}/{label}/{number}.png")
    if importlib.util.find_spec("timm") is not None:
        import timm

        save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), folder / "mine.safetensors")
    (folder / "ckpt").mkdir()
    for epoch in range(2):
        torch.manual_seed(epoch)
        save_file(resnet18(num_classes=10).state_dict(), folder / f"ckpt/epoch-{epoch}.safetensors")
    (folder / "grid.toml").write_text('[options]\nmodel = "dense"\n[grid]\nloss = ["hinge", "cross-entropy"]\n')
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    run = [*SMALL["harness.track"], "--model", "dense", "--every", "40"]
    for name, epochs in (("mine", 40), ("other", 20), ("certified", 1)):
        assert track([*run, "--epochs", str(epochs), "--out", str(folder / "runs" / name)]) == 0
    for training in ("standard", "pgd"):
        out = ["--training", training, "--every", "20", "--out", str(folder / f"runs/fashion-mnist-{training}")]
        assert track([*run, *out, "--epochs", "20"]) == 0
    return folder


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join([line[0], *line[1]])[:80])
def test_a_documented_command_runs(
    line: tuple[str, tuple[str, ...]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments = line
    for name in ("timm", "ray"):
        if any(word.split(":")[0] == name for word in arguments):
            pytest.importorskip(name)
    if "--gpus-per-worker" in arguments and not torch.cuda.is_available():
        pytest.skip("there is no GPU, which tests/test_ray.py holds to be said")
    monkeypatch.chdir(place)
    monkeypatch.setattr("harness.figures.save", lambda *_: [])
    monkeypatch.setattr("harness.sweep.run_entry", _run_entry)
    command = importlib.import_module(f"{module}.__main__" if module == "harness.report" else module)
    assert command.main(_words(module, arguments, LINES.index(line))) == 0


def _words(module: str, arguments: tuple[str, ...], number: int) -> list[str]:
    """The command with its files in place and smaller options."""
    replaced = [PLACEHOLDERS.get(word, ELSEWHERE.get(word, word)) for word in arguments if word != "--download"]
    words = [word.rstrip("]") for word in replaced if word]
    if module != "harness.track" or "--list-estimators" in words:
        return words + list(SMALL.get(module, ()) if module != "harness.track" else ())
    if "--resume" in words:
        # is resumed with the options it started with
        return [*words, "--out", "runs/mine", "--no-report"]
    return [*words, "--out", f"runs/{number}", *SMALL[module]]


def _run_entry(entry: Entry, out: Path, stop: object) -> str:
    """A run of a sweep in this process."""
    options = {**entry.options, "estimator": ["linear"]}
    words = [*as_arguments(options), *SMALL["harness.track"], "--resume", "--out", str(out / entry.name)]
    return "" if track(words) == 0 else "failed"


def test_most_documented_commands_are_run() -> None:
    assert len(LINES) >= 18
