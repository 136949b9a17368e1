"""A sweep killed again and again, and resumed: ``python -m benchmarks.sweeping benchmarks/losses.toml --kills 4``.

The sweep and its runs are killed together at random times, as by a machine that goes down; every run folder is then
held to that of a sweep that was left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.survive.comparing import compare
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment, now
from harness.store.files import write_atomically
from harness.sweep import read_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where anything was not as in the sweep that was left alone."""
    parser = OneLineParser(prog="python -m benchmarks.sweeping", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="of harness.sweep")
    parser.add_argument("--kills", type=int, default=4, help="default: 4")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the killed sweep's folder here")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON")
    given = parser.parse_args(argv)
    if min(given.kills, given.jobs) < 1:
        parser.error("expected --kills and --jobs of at least 1, got less; give larger numbers")
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="sweeping-") as folder:
        alone, killed = Path(folder) / "alone", given.keep or Path(folder) / "killed"
        seconds = _sweep(given.file, alone, given.jobs)
        moments = sorted(draw.uniform(0.05, 0.95) * seconds for _ in range(given.kills))
        # each life goes on where the last one ended, so that their lengths add up to the moments
        lengths = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
        done = [_killed(given.file, killed, given.jobs, length) for length in lengths]
        _sweep(given.file, killed, given.jobs)
        found = {entry.name: compare(killed / entry.name, alone / entry.name) for entry in read_sweep(given.file)}
        wrong = [f"{name}: {line}" for name, one in found.items() for line in one.differences]
        wrong += [] if (killed / "report.html").exists() else ["no report"]
    facts = {
        "runs": len(found),
        "kills": given.kills,
        "runs begun at each kill": done,
        "files": sum(one.files for one in found.values()),
        "rows": sum(one.rows for one in found.values()),
        "wrong": wrong,
    }
    print(json.dumps(facts, indent=2))
    if given.out:
        text = json.dumps({"created": now(), **facts, **environment(1)}, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(text, encoding="utf-8"))
    return 1 if wrong else 0


def _command(file: Path, out: Path, jobs: int) -> list[str]:
    return [sys.executable, "-m", "harness.sweep", str(file), "--out", str(out), "--jobs", str(jobs)]


def _sweep(file: Path, out: Path, jobs: int) -> float:
    """The whole sweep; how many seconds it took."""
    began = time.perf_counter()
    done = subprocess.run(_command(file, out, jobs), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"sweeping: error: expected the sweep to end, got exit code {done.returncode}; see above")
    print(f"sweeping: {file} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return time.perf_counter() - began


def _killed(file: Path, out: Path, jobs: int, seconds: float) -> int:
    """The sweep and all its processes killed after so many seconds; how many runs were begun by then."""
    process = subprocess.Popen(_command(file, out, jobs), stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = len(list(out.glob("*/summary.csv")))
    print(f"sweeping: killed after {seconds:.0f} s more, {begun} runs begun", file=sys.stderr, flush=True)
    return begun


if __name__ == "__main__":
    sys.exit(run_command(main))
