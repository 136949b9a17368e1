"""A long run's memory, disk and estimates of time: ``python -m benchmarks.soak --epochs 200``.

Runs `harness.track` in a process of its own and looks at it at every epoch that it reports.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment, now
from harness.store.files import write_atomically, write_csv

LINE = re.compile(r"epoch +(\d+)/\d+ .*?(\d+):(\d\d):(\d\d) left")
COLUMNS = ("epoch", "seconds", "left", "memory", "disk", "checkpoints", "files")
MEGA = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where memory or checkpoints grow."""
    parser = OneLineParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--epochs", type=int, default=200, help="default: 200")
    parser.add_argument("--model", default="dense", help="of digits (default: dense)")
    parser.add_argument("--estimator", default="deepfool", help="default: deepfool")
    parser.add_argument("--probe", type=int, default=200, help="default: 200")
    parser.add_argument("--keep-checkpoints", type=int, default=50, help="of every N epochs (default: 50)")
    parser.add_argument(
        "--out", type=Path, default=Path("soak"), metavar="DIR", help="table and figure (default: soak)"
    )
    given = parser.parse_args(argv)
    if given.epochs < 20:
        parser.error(f"expected --epochs of at least 20, got {given.epochs}; give a larger number")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run = Path(folder) / "run"
        options = ["--epochs", given.epochs, "--model", given.model, "--estimator", given.estimator]
        options += ["--probe", given.probe, "--keep-checkpoints", given.keep_checkpoints, "--threads", 1]
        table = pd.DataFrame(list(_watched(run, list(map(str, options)))), columns=list(COLUMNS))
    facts = summary(table)
    draw(table, given.out / "soak")
    write_csv(given.out / "soak.csv", table)
    text = json.dumps({"created": now(), "options": options, **facts, **environment(1)}, indent=2) + "\n"
    write_atomically(given.out / "soak.json", lambda path: path.write_text(text, encoding="utf-8"))
    for name, value in facts.items():
        print(f"{name}: {value:.4g}")
    return 1 if facts["memory_growth_mb_per_100_epochs"] > 5 or facts["checkpoints_mb_at_the_end"] > 50 else 0


def _watched(run: Path, options: Sequence[str]) -> Iterator[tuple[float, ...]]:
    """A row of `COLUMNS` an epoch."""
    command = [sys.executable, "-m", "harness.track", "--device", "cpu", "--out", str(run), *options]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if (found := LINE.search(line)) is None:
                continue
            epoch, hours, minutes, seconds = map(int, found.groups())
            sizes = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
            checkpoints = sum(size for path, size in sizes.items() if path.parent.name == "checkpoints")
            left = 3600 * hours + 60 * minutes + seconds
            memory = _memory(process.pid)
            yield (
                epoch,
                time.monotonic() - began,
                left,
                memory,
                sum(sizes.values()) / MEGA,
                checkpoints / MEGA,
                len(sizes),
            )
    if process.returncode:
        raise SystemExit(f"soak: error: expected the run to end, got exit code {process.returncode}; see above")


def _memory(process: int) -> float:
    """What a process holds in memory, in MB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Growth over the second half, sizes at the end, and how estimates of the time left held.

    Args:
        table: `COLUMNS`, megabytes and seconds.
    """
    late = table[table["epoch"] >= table["epoch"].max() / 2]
    slopes = {name: np.polyfit(late["epoch"], late[name], 1)[0] * 100 for name in ("memory", "disk", "files")}
    # estimates of the middle of the run: early ones know little, late ones are seconds
    middle = table[table["epoch"].between(0.1 * table["epoch"].max(), 0.9 * table["epoch"].max())]
    truth = table["seconds"].iloc[-1] - middle["seconds"]
    held = (middle["left"] / truth).to_numpy()
    return {
        "memory_growth_mb_per_100_epochs": float(slopes["memory"]),
        "memory_mb_at_the_end": float(table["memory"].iloc[-1]),
        "disk_growth_mb_per_100_epochs": float(slopes["disk"]),
        "disk_mb_at_the_end": float(table["disk"].iloc[-1]),
        "checkpoints_mb_at_the_end": float(table["checkpoints"].iloc[-1]),
        "files_per_epoch": float(slopes["files"] / 100),
        "estimated_over_true_time_left_median": float(np.median(held)),
        "estimated_over_true_time_left_least": float(held.min()),
        "estimated_over_true_time_left_most": float(held.max()),
        "seconds_an_epoch_first_tenth": _pace(table, 0.0, 0.1),
        "seconds_an_epoch_last_tenth": _pace(table, 0.9, 1.0),
    }


def _pace(table: pd.DataFrame, start: float, end: float) -> float:
    part = table[table["epoch"].between(start * table["epoch"].max(), end * table["epoch"].max())]
    return float(part["seconds"].diff().median())


def draw(table: pd.DataFrame, stem: Path) -> None:
    """Memory, disk and checkpoints over epochs, as PNG."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(table["epoch"], table["memory"], color="black")
    left.set(xlabel="epoch", ylabel="memory of the process (MB)", ylim=(0, 1.2 * table["memory"].max()))
    right.plot(table["epoch"], table["disk"], color="black", label="run folder")
    right.plot(table["epoch"], table["checkpoints"], color="tab:blue", label="of it checkpoints and trainer's states")
    right.set(xlabel="epoch", ylabel="disk (MB)", ylim=(0, None))
    right.legend(frameon=False)
    write_atomically(stem.with_suffix(".png"), lambda path: figure.savefig(path, format="png", dpi=140))


if __name__ == "__main__":
    sys.exit(run_command(main))
