"""The command: kill a run, damage its files, make its disk unavailable, resume it and count the differences."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.command import run_command
from harness.config.options import OneLineParser
from tests.survive.comparing import compare_apart
from tests.survive.damage import (
    Case,
    damaged_manifest,
    damaged_parts,
    full_disk,
    read_only,
    told_to_stop,
    two_writers,
)
from tests.survive.lives import PHASES, Moments, at_random, live, warm_up

# the largest number of kills per run
DEATHS = 5


@dataclass
class Kills:
    """Runs that were killed, resumed until they ended, and compared with the undisturbed run."""

    kills: int = 0
    at_random: int = 0
    runs: int = 0
    files: int = 0
    rows: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, which is 1 if anything differs from the undisturbed run."""
    parser = OneLineParser(prog="python -m tests.survive", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at least this many (default: 200)")
    parser.add_argument("--only", choices=("kills", "cases"), help="leave the other part out")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the damage (default: 0)")
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error(f"expected --kills of at least 1, got {options.kills}; give a larger number")
    warm_up()
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        wrong = _survive(Path(folder), options.kills, options.only, random.Random(options.seed))
    for line in wrong:
        print(f"survive: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _survive(work: Path, kills: int, only: str | None, draw: random.Random) -> list[str]:
    """Print the tables and return the differences."""
    whole, moments, began = work / "whole", Moments(), time.perf_counter()
    end = live(whole, moments=moments)
    seconds = time.perf_counter() - began
    if end.code != 0:
        raise SystemExit(f"survive: error: the undisturbed run ended with {end.code}: {end.said}")
    wrong: list[str] = []
    if only != "cases":
        killed = _kill(work, whole, kills, moments.counts(), seconds, draw)
        print("\n".join(_kill_table(killed)), flush=True)
        wrong += killed.wrong
    if only != "kills":
        print("| case | tried | resumed at once | resumed after doing what the message says | rows compared | wrong |")
        print("|---|---|---|---|---|---|")
        for case in _cases(work, whole, draw):
            cells = (case.name, case.tried, case.healed, case.told, f"{case.rows:,}", len(case.wrong))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            wrong += case.wrong
    return wrong


def _kill(work: Path, whole: Path, kills: int, counts: dict[str, int], seconds: float, draw: random.Random) -> Kills:
    """Kill runs in every phase in turn and at random times, resume each to its end and compare it."""
    killed, turn = Kills(), 0
    while killed.kills < kills:
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        killed.runs += 1
        for _ in range(DEATHS):
            turn += 1
            if turn % 4 == 0:
                end = live(folder, stop=at_random(draw, seconds))
            else:
                # a resumed run has less to do, so it may end before the chosen moment
                phase = PHASES[(turn - turn // 4) % len(PHASES)]
                end = live(folder, moments=Moments((phase, draw.randint(1, max(1, counts[phase] // 2)))))
            if end.code == 0:
                break
            if end.code == -9:
                killed.kills += 1
                killed.at_random += turn % 4 == 0
                killed.phases[end.phase] += 1
            else:
                killed.wrong.append(f"run {killed.runs}: exit {end.code}: {end.said.strip()[-300:]}")
        last = live(folder, report=False)
        compared = compare_apart(folder, whole)
        killed.files += compared.files
        killed.rows += compared.rows
        if last.code != 0:
            compared.differences.append(f"exit {last.code}: {last.said.strip()[-300:]}")
        killed.wrong += [f"run {killed.runs}: {line}" for line in compared.differences]
        if killed.runs % 5 == 0:
            print(f"survive: {killed.kills} kills, {len(killed.wrong)} wrong", file=sys.stderr, flush=True)
    return killed


def _cases(work: Path, whole: Path, draw: random.Random) -> Iterator[Case]:
    yield from told_to_stop(whole, work, draw)
    yield from damaged_parts(whole, work, draw)
    yield damaged_manifest(whole, work, draw)
    for name, case in (("disk full", full_disk(whole, work)), ("folder read-only", read_only(whole, work))):
        yield case or Case(f"{name} (not tried: mounting a tmpfs is not allowed here)")
    yield two_writers(whole, work)


def _kill_table(killed: Kills) -> Iterator[str]:
    yield "| killed while | times |"
    yield "|---|---|"
    for phase in PHASES:
        yield f"| {phase} | {killed.phases[phase]} |"
    yield f"| all ({killed.at_random} of them at random times) | {killed.kills} |"
    yield ""
    yield (
        f"{killed.runs} runs, each killed up to {DEATHS} times, then left to end: {killed.files:,} files and "
        f"{killed.rows:,} rows compared, {len(killed.wrong)} differences."
    )
    yield ""


if __name__ == "__main__":
    sys.exit(run_command(main))
