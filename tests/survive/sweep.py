"""A sweep killed again and again, and resumed: ``python -m tests.survive.sweep benchmarks/losses.toml --kills 5``.

The sweep and its runs are killed together at random times, as when a machine goes down. Every run folder is then
compared with that of an undisturbed sweep.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.command import run_command
from harness.config.options import OneLineParser
from harness.sweep import read_sweep
from tests.survive.comparing import compare


@dataclass
class Killed:
    """How much of a killed sweep was compared, and the differences."""

    runs: int = 0
    files: int = 0
    rows: int = 0
    begun: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, which is 1 if anything differs from the undisturbed sweep."""
    parser = OneLineParser(prog="python -m tests.survive.sweep", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="of harness.sweep")
    parser.add_argument("--kills", type=int, default=5, help="default: 5")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default: 0)")
    options = parser.parse_args(argv)
    if min(options.kills, options.jobs) < 1:
        parser.error("expected --kills and --jobs of at least 1, got less; give larger numbers")
    with tempfile.TemporaryDirectory(prefix="killed-sweep-") as folder:
        killed = kill_sweep(options.file, Path(folder), options.kills, options.jobs, options.seed)
    print(
        f"{killed.runs} runs, {options.kills} kills with {killed.begun} runs begun: {killed.files:,} files and "
        f"{killed.rows:,} rows compared, {len(killed.wrong)} differences"
    )
    for line in killed.wrong:
        print(f"survive.sweep: {line}", file=sys.stderr)
    return 1 if killed.wrong else 0


def kill_sweep(file: Path, work: Path, kills: int, jobs: int = 1, seed: int = 0) -> Killed:
    """Run the sweep undisturbed, then kill, resume and compare another one."""
    draw = random.Random(seed)
    alone, folder = work / "alone", work / "killed"
    seconds = _sweep(file, alone, jobs)
    moments = sorted(draw.uniform(0.05, 0.95) * seconds for _ in range(kills))
    # each start continues where the last one was killed, so the lengths add up to the moments
    lengths = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
    killed = Killed(begun=[_kill(file, folder, jobs, length) for length in lengths])
    _sweep(file, folder, jobs)
    for entry in read_sweep(file):
        compared = compare(folder / entry.name, alone / entry.name)
        killed.runs += 1
        killed.files += compared.files
        killed.rows += compared.rows
        killed.wrong += [f"{entry.name}: {line}" for line in compared.differences]
    if not (folder / "report.html").exists():
        killed.wrong.append("no report")
    return killed


def _command(file: Path, out: Path, jobs: int) -> list[str]:
    return [sys.executable, "-m", "harness.sweep", str(file), "--out", str(out), "--jobs", str(jobs)]


def _sweep(file: Path, out: Path, jobs: int) -> float:
    """Run the sweep to its end and return the seconds."""
    began = time.perf_counter()
    done = subprocess.run(_command(file, out, jobs), stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"survive.sweep: error: the sweep ended with exit code {done.returncode}; see above")
    return time.perf_counter() - began


def _kill(file: Path, out: Path, jobs: int, seconds: float) -> int:
    """Kill the sweep and its processes after some seconds; return how many runs had begun."""
    process = subprocess.Popen(_command(file, out, jobs), stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = len(list(out.glob("*/summary.csv")))
    print(f"survive.sweep: killed after {seconds:.0f} s more, {begun} runs begun", file=sys.stderr, flush=True)
    return begun


if __name__ == "__main__":
    sys.exit(run_command(main))
