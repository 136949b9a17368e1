"""Networks and pictures that the harness did not make: ``python -m benchmarks.own --out docs/own``.

A plain training loop leaves checkpoints of torchvision's ResNet-18 with its normalisation; pictures lie in an ``.npz``
and in folders. `harness.track` goes through the checkpoints after the fact, and trains a network of timm's on the
folders. The margins of the checkpoints are held to those of the loop's own model objects, whose normalisation is
torchvision's, not ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import Normalize

from harness.command import run_command
from harness.config.options import OneLineParser
from harness.measuring.rows import measure_margins
from harness.runs import read_run
from harness.store import environment, now
from harness.store.files import write_atomically

MEAN, DEVIATION, CLASSES = 0.3, 0.37, 10
ESTIMATORS, NORMS = ("deepfool", "fmn:steps=30"), ("l2", "linf")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where margins differ."""
    parser = OneLineParser(prog="python -m benchmarks.own", description=__doc__)
    parser.add_argument("--images", type=int, default=600, help="to train on (default: 600)")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--probe", type=int, default=40, help="of each split (default: 40)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write own.json and own.md here")
    given = parser.parse_args(argv)
    if min(given.images, given.epochs, given.probe) < 1:
        parser.error("expected numbers of at least 1, got less; give larger ones")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="own-") as folder:
        work = Path(folder)
        arrays = _digits(given.images)
        np.savez(work / "digits.npz", **arrays)
        _save_pictures(work / "pictures", arrays)
        networks = _trained(work / "ckpt", arrays, given.epochs)
        normalize = f"{MEAN}:{DEVIATION}"
        model = ["--model", "torchvision:resnet18", "--normalize", normalize]
        _track(work, "checkpoints", "npz:digits.npz", [*model, "--checkpoints", "ckpt/*.pt"], given.probe)
        _track(work, "folders", "folder:pictures", ["--model", "timm:resnet10t", "--epochs", "1"], given.probe)
        worst = max(_differences(work / "checkpoints", arrays, networks))
        tables = [_averages(work / name).assign(run=name) for name in ("checkpoints", "folders")]
    table = pd.concat(tables, ignore_index=True)
    text = _table(table)
    print(f"{text}\nlargest relative difference to the loop's own models: {worst:.2g}")
    if given.out:
        facts = {"created": now(), "largest relative difference": worst, "averages": table.to_dict("records")}
        whole = json.dumps({**facts, **environment(1)}, indent=2) + "\n"
        write_atomically(given.out / "own.json", lambda path: path.write_text(whole, encoding="utf-8"))
        write_atomically(given.out / "own.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return 0 if worst < 1e-3 else 1


def _digits(count: int) -> dict[str, NDArray[np.generic]]:
    """Digits as colour pictures of 32x32 pixels: ``count`` to train on, 200 to test."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))[: count + 200]
    small = torch.from_numpy(bunch.images[order] / 16).float()[:, None].expand(-1, 3, -1, -1)
    large = nn.functional.interpolate(small, size=32, mode="bilinear")
    pixels = (255 * large).round().byte().permute(0, 2, 3, 1).numpy()
    labels = bunch.target[order]
    return {
        "x_train": pixels[:count],
        "y_train": labels[:count],
        "x_test": pixels[count:],
        "y_test": labels[count:],
    }


def _save_pictures(folder: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    for split in ("train", "test"):
        for number, (pixels, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:04d}.png")


def _pixels(images: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _trained(folder: Path, arrays: dict[str, NDArray[np.generic]], epochs: int) -> list[nn.Module]:
    """What a loop that knows nothing of the harness does; its models of all epochs, and their checkpoints."""
    folder.mkdir()
    torch.manual_seed(0)
    network = resnet18(num_classes=CLASSES)
    model = nn.Sequential(Normalize([MEAN] * 3, [DEVIATION] * 3), network)
    images, labels = _pixels(arrays["x_train"]), torch.from_numpy(arrays["y_train"].astype(np.int64))
    optimizer, kept = torch.optim.Adam(network.parameters(), lr=1e-3), list[nn.Module]()
    for epoch in range(epochs + 1):
        for batch in torch.randperm(len(images)).split(64) if epoch else ():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(images[batch]), labels[batch]).backward()
            optimizer.step()
        torch.save({"state_dict": network.state_dict(), "epoch": epoch}, folder / f"resnet-{epoch}.pt")
        copy = nn.Sequential(Normalize([MEAN] * 3, [DEVIATION] * 3), resnet18(num_classes=CLASSES))
        copy.load_state_dict(model.state_dict())
        kept.append(copy.eval())
    return kept


def _track(work: Path, out: str, dataset: str, options: Sequence[str], probe: int) -> None:
    words = [word for name in ESTIMATORS for word in ("--estimator", name)]
    words += ["--probe", str(probe), "--noise-retries", "0", "--threads", "1", "--device", "cpu", "--no-report"]
    command = [sys.executable, "-m", "harness.track", "--out", out, "--dataset", dataset, *words, *options]
    print(" ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    # the modules of where this runs, the files of the working folder
    path = {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL, env={**os.environ, **path})
    if done.returncode:
        raise SystemExit(f"own: error: expected the run to end, got exit code {done.returncode}; see above")


def _differences(folder: Path, arrays: dict[str, NDArray[np.generic]], networks: list[nn.Module]) -> Iterator[float]:
    """Of each epoch, estimator and norm: the largest relative difference of distances on the test images."""
    margins = read_run(folder).margins
    for epoch, network in enumerate(networks):
        rows = margins[(margins["epoch"] == epoch) & (margins["split"] == "test")]
        ids = np.sort(rows["image"].unique())
        given = _pixels(arrays["x_test"][ids]), torch.from_numpy(arrays["y_test"][ids]), torch.from_numpy(ids)
        again = measure_margins(network, given, ESTIMATORS, NORMS, noise_retries=0)  # type: ignore[arg-type]
        keys = ["image", "estimator", "norm"]
        both = rows.merge(again, on=keys, suffixes=("", "_again"))
        assert len(both) == len(rows)
        found = both[np.isfinite(both["distance"])]
        assert (both["status"] == both["status_again"]).all()
        yield float((found["distance_again"] / found["distance"] - 1).abs().max())


def _averages(folder: Path) -> pd.DataFrame:
    margins = read_run(folder).margins
    found = margins[np.isfinite(margins["distance"])]
    grouped = found.groupby(["epoch", "split", "estimator", "norm"], as_index=False)["distance"]
    return grouped.agg(average="mean", found="count")


def _table(table: pd.DataFrame) -> str:
    lines = ["| run | epoch | split | estimator | norm | average margin | found |", "|---|---:|---|---|---|---:|---:|"]
    for row in table.itertuples():
        where = f"| {row.run} | {row.epoch} | {row.split} | {row.estimator} | {row.norm} "
        lines.append(f"{where}| {row.average:.4f} | {row.found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
