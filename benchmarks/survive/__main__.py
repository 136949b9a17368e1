"""The command: kill a run at least so many times, damage it, take its disk away; count what is not as it was."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.survive.comparing import compare_apart
from benchmarks.survive.damage import (
    Case,
    damaged_manifest,
    damaged_parts,
    full_disk,
    read_only,
    told_to_stop,
    two_writers,
)
from benchmarks.survive.lives import PHASES, Moments, at_random, live, warm_up
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment, now
from harness.store.files import write_atomically

# deaths that a run dies one after the other, before it is left to end
DEATHS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where anything was not as in the undisturbed run."""
    parser = OneLineParser(prog="python -m benchmarks.survive", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default: 200)")
    parser.add_argument("--only", choices=("kills", "cases"), help="leave the other part out")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON, and the tables as FILE.md")
    given = parser.parse_args(argv)
    if given.kills < 1:
        parser.error(f"expected --kills of at least 1, got {given.kills}; give a larger number")
    warm_up()
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        facts = _survive(Path(folder), given.kills, given.only, random.Random(given.seed))
    text = "\n".join(_tables(facts))
    print(text)
    if given.out:
        whole = json.dumps({"created": now(), **facts, **environment(1)}, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(whole, encoding="utf-8"))
        write_atomically(given.out.with_suffix(".md"), lambda path: path.write_text(text + "\n", encoding="utf-8"))
    wrong = [*facts["kills"]["wrong"], *(line for case in facts["cases"] for line in case["wrong"])]
    for line in wrong:
        print(f"survive: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _survive(work: Path, kills: int, only: str | None, draw: random.Random) -> dict:
    whole, moments, began = work / "whole", Moments(), time.perf_counter()
    end = live(whole, moments=moments)
    seconds = time.perf_counter() - began
    if end.code != 0:
        raise SystemExit(f"survive: error: expected the undisturbed run to end, got {end.code}: {end.said}")
    told = {"moments": moments.counts(), "seconds": seconds}
    killed = _kill(work, whole, kills, moments.counts(), seconds, draw) if only != "cases" else _nothing()
    cases: list[Case] = []
    for case in _cases(work, whole, draw) if only != "kills" else ():
        cases.append(case)
        print(f"survive: {case.name}: {case.tried} tried, {len(case.wrong)} wrong", file=sys.stderr, flush=True)
    return {"undisturbed": told, "kills": killed, "cases": [asdict(case) for case in cases]}


def _nothing() -> dict:
    return {"kills": 0, "runs": 0, "resumes": 0, "phases": {}, "random": 0, "files": 0, "rows": 0, "wrong": []}


def _kill(work: Path, whole: Path, kills: int, counts: dict[str, int], seconds: float, draw: random.Random) -> dict:
    """Kill runs, at moments of every phase in turn and at random times, until there are enough; end and compare all."""
    said, phases, turn = _nothing(), Counter[str](), 0
    while said["kills"] < kills:
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(DEATHS):
            turn += 1
            if turn % 4 == 0:
                end = live(folder, stop=at_random(draw, seconds))
            else:
                # later lives have less to do, so that a moment may not come
                phase = PHASES[(turn - turn // 4) % len(PHASES)]
                end = live(folder, moments=Moments((phase, draw.randint(1, max(1, counts[phase] // 2)))))
            if end.code == -9:
                said["kills"] += 1
                said["random"] += turn % 4 == 0
                phases[end.phase] += 1
            elif end.code != 0:
                said["wrong"].append(f"run {said['runs']}: exit {end.code}: {end.said.strip()[-300:]}")
            if end.code == 0:
                break
        last = live(folder, report=False)
        said["runs"] += 1
        said["resumes"] += DEATHS
        found = compare_apart(folder, whole)
        said["files"] += found.files
        said["rows"] += found.rows
        if last.code != 0:
            found.differences.append(f"exit {last.code}: {last.said.strip()[-300:]}")
        said["wrong"] += [f"run {said['runs']}: {line}" for line in found.differences]
        if said["runs"] % 5 == 0:
            print(f"survive: {said['kills']} kills, {len(said['wrong'])} wrong", file=sys.stderr, flush=True)
    return {**said, "phases": {phase: phases[phase] for phase in PHASES}}


def _cases(work: Path, whole: Path, draw: random.Random) -> Iterator[Case]:
    yield from told_to_stop(whole, work, draw)
    yield from damaged_parts(whole, work, draw)
    yield damaged_manifest(whole, work, draw)
    for name, case in (("the disk full", full_disk(whole, work)), ("the folder read-only", read_only(whole, work))):
        # said, not passed over: it takes the right to mount
        yield case or Case(f"{name} (not tried: mounting a tmpfs is not allowed here)")
    yield two_writers(whole, work)


def _tables(facts: dict) -> Iterator[str]:
    kills = facts["kills"]
    if kills["kills"]:
        yield "| killed in | times |"
        yield "|---|---|"
        for phase, times in kills["phases"].items():
            yield f"| {phase} | {times} |"
        yield f"| all ({kills['random']} of them at random times) | {kills['kills']} |"
        yield ""
        yield (
            f"{kills['runs']} runs, each killed up to {DEATHS} times, then left to end: {kills['files']:,} files and "
            f"{kills['rows']:,} rows compared, {len(kills['wrong'])} differences."
        )
        yield ""
    if facts["cases"]:
        yield "| what happened | tried | went on | said in one line what to do, then went on | rows compared | wrong |"
        yield "|---|---|---|---|---|---|"
        for case in facts["cases"]:
            yield (
                f"| {case['name']} | {case['tried']} | {case['healed']} | {case['told']} | {case['rows']:,} "
                f"| {len(case['wrong'])} |"
            )


if __name__ == "__main__":
    sys.exit(run_command(main))
