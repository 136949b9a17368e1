"""Images a second with more workers: ``python -m benchmarks.scaling --workers 1 2``.

Every engine measures the same images of the same network in turns, round by round; the first round, in which workers
start, is not counted. All rows are held to those of one process.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.speed.report import made_with
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.engines import create_engine
from harness.models.build import build
from harness.store import RunFolder
from harness.store.files import write_atomically
from harness.tasks import Engine
from harness.tracking.tracker import MarginTracker

SHAPE, CLASSES = (1, 28, 28), 10


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where rows differ."""
    parser = OneLineParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="of each engine (default: 1 2)")
    parser.add_argument("--engine", nargs="+", default=["local"], choices=("local", "ray"), help="default: local")
    parser.add_argument("--model", default="cnn", help="of 28x28 images, untrained (default: cnn)")
    parser.add_argument("--estimator", nargs="+", default=["fmn:steps=20"], help="default: fmn:steps=20")
    parser.add_argument("--images", type=int, default=512, help="default: 512")
    parser.add_argument("--batch", type=int, default=64, help="images a pass (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON, and the table as FILE.md")
    given = parser.parse_args(argv)
    if min(*given.workers, given.images, given.batch, given.repeats) < 1:
        parser.error("expected numbers of at least 1, got less; give larger ones")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if "ray" in given.engine:
        # here, as it is an extra; one cluster with room for all
        import ray

        ray.init(num_cpus=max(given.workers), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    engines = {"one process": create_engine("local", 0, device)}
    engines |= {
        f"{name}, {count} worker{'s'[: count > 1]}": create_engine(name, count, device, threads=1)
        for name in given.engine
        for count in given.workers
    }
    rounds, same = _run(engines, given.model, given.estimator, given.images, given.batch, given.repeats)
    for engine in engines.values():
        engine.close()
    table = list(_table(rounds, 2 * given.images * len(given.estimator)))
    print("\n".join(table))
    if given.out:
        facts = {"options": vars(given) | {"out": None}, "seconds": rounds, "rows equal": same}
        text = json.dumps({**made_with(device), **facts}, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(given.out.with_suffix(".md"), lambda path: path.write_text("\n".join(table) + "\n"))
    if not same:
        print("scaling: rows differ from those of one process", file=sys.stderr)
    return 0 if same else 1


def _run(
    engines: dict[str, Engine], model: str, estimators: Sequence[str], count: int, batch: int, repeats: int
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each engine's rounds, and whether all rows were the same."""
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    probes = {"test": (images, torch.arange(count) % CLASSES)}
    network = build(model, SHAPE, CLASSES, seed=0)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    same = True
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        trackers = {
            name: MarginTracker(Path(folder) / str(place), probes, estimators, batch_size=batch, engine=engine)
            for place, (name, engine) in enumerate(engines.items())
        }
        for epoch in range(repeats + 1):
            for name, tracker in trackers.items():
                began = time.perf_counter()
                tracker.update(epoch, network)
                spent[name].append(time.perf_counter() - began)
                print(f"{name}, round {epoch}: {spent[name][-1]:.2f} s", file=sys.stderr, flush=True)
            first, *others = (_rows(tracker.folder, epoch) for tracker in trackers.values())
            same &= all(first.equals(other) for other in others)
    # the first round starts the workers
    return {name: seconds[1:] for name, seconds in spent.items()}, same


def _rows(folder: RunFolder, epoch: int) -> pd.DataFrame:
    tables = [folder.read_part(path)[0] for path in folder.margin_parts(epoch)]
    return pd.concat(tables, ignore_index=True).drop(columns="seconds")


def _table(rounds: dict[str, list[float]], images: int) -> list[str]:
    """Margins a second, and how many times those of one process, round by round."""
    lines = ["| engine | margins a second | times one process |", "|---|---:|---:|"]
    alone = rounds["one process"]
    for name, seconds in rounds.items():
        ratio = statistics.median(one / other for one, other in zip(alone, seconds, strict=True))
        lines.append(f"| {name} | {images / statistics.median(seconds):.0f} | {ratio:.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
