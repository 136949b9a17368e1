"""Complete Figure 1 of the paper, measured on this machine: ``python -m benchmarks.figure1 --data-root data``.

Trains and tracks a network with ``harness.track`` as a user would. Then runs a plain Foolbox script on the same
networks at some epochs, compares the margins, and extrapolates the script's time to all epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.types import NORMS
from harness.command import DONE, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser

if TYPE_CHECKING:
    from benchmarks.figure1.measuring import Row, Totals
    from harness.runs import Run

MEASURED = (0, 1, 2, 5, 10, 20, 30, 40)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _parser().parse_args(argv)
    resume = "delete the folder --out and run the same command again"
    return exit_code("figure1", lambda: _compare(given), resume=resume, debug=given.debug)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.figure1",
        description="The paper's Figure 1 with harness.track, and what a plain Foolbox script takes for it.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", default="fashion-mnist", help="see harness.track (default: fashion-mnist)")
    add("--data-root", default="data", metavar="DIR", help="see harness.track (default: data)")
    add("--model", default="cnn", help="see harness.track (default: cnn)")
    add("--epochs", type=int, default=40, metavar="N", help="besides epoch 0 (default: 40)")
    add("--probe", type=int, default=1000, metavar="N", help="images of each split (default: 1000)")
    add("--at", nargs="+", type=int, metavar="N", help=f"epochs of the script's turn (default: {MEASURED}, the last)")
    add("--threads", type=int, default=1, help="torch threads, for both (default: 1)")
    add("--out", type=Path, default=Path("figure1"), metavar="DIR", help="a new folder (default: figure1)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _check(given: argparse.Namespace) -> None:
    for name in ("epochs", "probe", "threads"):
        if getattr(given, name) < 1:
            raise ConfigError(f"expected --{name} of at least 1, got {getattr(given, name)}; give a larger number")
    if given.out.exists():
        raise ConfigError(f"expected a new folder for --out, got {given.out}, which is there; choose another")
    last = given.epochs
    given.at = given.at or sorted({*(epoch for epoch in MEASURED if epoch < last), last})
    if not 0 <= min(given.at) <= max(given.at) <= last:
        raise ConfigError(f"expected --at of 0 to {last}, got {', '.join(map(str, given.at))}; choose others")


def _compare(given: argparse.Namespace) -> int:
    # here, so that --help needs no torch
    import torch

    from benchmarks.figure1.measuring import pass_share, rows_of, totals
    from harness.data.builtin import load
    from harness.runs import read_run

    _check(given)
    torch.set_num_threads(given.threads)
    ours = _track(given)
    run = read_run(given.out / "run")
    print(f"harness.track: {ours:.0f} s, all of it; now the script, at epochs {', '.join(map(str, given.at))}")
    rows = []
    for row in rows_of(run, given.at, NORMS, "deepfool"):
        print(_line(row), flush=True)
        rows.append(row)
    whole = totals(run, load(given.dataset, Path(given.data_root)), rows, ours)
    said = list(_sentences(run, rows, whole, pass_share(run, NORMS, "deepfool")))
    print(*said, sep="\n")
    _write(given, run, rows, whole, said)
    print(f"written to {given.out}: figure1.json, figure1.md, figure1.png, figure1.svg, run/")
    return DONE


def _track(given: argparse.Namespace) -> float:
    """Seconds of the user's command from start to end."""
    command = [
        *(sys.executable, "-m", "harness.track", "--dataset", given.dataset, "--data-root", given.data_root),
        *("--model", given.model, "--estimator", "deepfool", "--epochs", str(given.epochs)),
        *("--probe", str(given.probe), "--threads", str(given.threads), "--out", str(given.out / "run")),
        *("--device", "cpu"),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": str(given.threads)})
    if done.returncode:
        raise ValueError(f"expected harness.track to end well, got exit code {done.returncode}; see what it said")
    return time.perf_counter() - began


def _line(row: Row) -> str:
    return (
        f"epoch {row.epoch:3}, {row.norm:4} {row.split:5}: ours {row.ours:6.2f} s, the script {row.theirs:7.2f} s, "
        f"{row.theirs / row.ours:5.2f} times as long; average {row.average:.4f} and {row.their_average:.4f}, "
        f"{row.same} of {row.both} margins the same, found {row.found} and {row.their_found} of {row.images}"
    )


def _sentences(run: Run, rows: Sequence[Row], whole: Totals, share: float) -> Iterator[str]:
    import numpy as np

    from benchmarks.figure1.measuring import TRAINED

    last = int(run.epochs["epoch"].max())
    for norm in dict.fromkeys(row.norm for row in rows):
        ratios = [row.theirs / row.ours for row in rows if row.norm == norm]
        yield (
            f"{norm}: measuring takes the script {np.median(ratios):.1f} times as long (median of {len(ratios)} turns, "
            f"{min(ratios):.1f} to {max(ratios):.1f})"
        )
    same, both = sum(row.same for row in rows), sum(row.both for row in rows)
    yield f"margins: {same} of {both} the same within 0.0001"
    yield (
        f"all of Figure 1, epochs 0 to {last}: harness.track {whole.ours:.0f} s; the script {whole.theirs:.0f} s, "
        f"{whole.theirs / whole.ours:.1f} times as long (training {whole.training:.0f} s, errors {whole.errors:.0f} s, "
        f"margins {whole.margins:.0f} s)"
    )
    yield (
        f"of the script, margins of {len({row.epoch for row in rows})} of {last + 1} epochs and {TRAINED} epochs of "
        "training were run, the others are interpolated; harness.track was run whole, with noisy starts, refinement, "
        "predictions of all images, checkpoints, and its report"
    )
    seconds = run.margins.groupby("epoch")["seconds"].sum()
    training = run.epochs.query("split == 'train' and epoch > 0")["seconds"]
    if len(training):
        measuring = float(seconds[seconds.index > 0].median())
        yield (
            f"of harness.track: an epoch of training {training.median():.2f} s, its margins {measuring:.2f} s "
            f"({measuring / training.median():.2f} times that)"
        )
    yield (
        "neither training, nor measuring, nor predicting all images (which takes as long as the script's errors): "
        f"{_rest(run, whole):.1%} of harness.track; of measuring, {share:.0%} are passes through the network, the rest "
        "DeepFool's own arithmetic and checks"
    )


def _rest(run: Run, whole: Totals) -> float:
    """The share of the run outside training, measuring and predicting: start, data, files, the report."""
    trained = float(run.epochs.query("split == 'train'")["seconds"].sum())
    return 1 - (trained + float(run.margins["seconds"].sum()) + whole.errors) / whole.ours


def _write(given: argparse.Namespace, run: Run, rows: Sequence[Row], whole: Totals, said: Sequence[str]) -> None:
    import pandas as pd
    import torch

    from benchmarks.figure1.drawing import figure1
    from benchmarks.speed.report import made_with
    from harness.figures import save
    from harness.store import now
    from harness.store.files import write_atomically

    facts = made_with(torch.device("cpu"))
    options = {key: _plain(value) for key, value in vars(given).items() if key != "debug"}
    content = {
        "created": now(),
        "options": options,
        **facts,
        "rows": [{key: _plain(value) for key, value in dataclasses.asdict(row).items()} for row in rows],
        "totals": dataclasses.asdict(whole) | {"theirs": whole.theirs},
        "said": list(said),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(given.out / "figure1.json", lambda path: path.write_text(text, encoding="utf-8"))
    head = ["# Figure 1, whole", *said, f"```json\n{json.dumps(facts, indent=2)}\n```"]
    page = "\n\n".join([*head, "\n".join(f"- {_line(row)}" for row in rows)]) + "\n"
    write_atomically(given.out / "figure1.md", lambda path: path.write_text(page, encoding="utf-8"))
    save(figure1(run, rows, pd.read_csv(run.folder.summary_csv)), given.out, "figure1")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(run_command(main))
