"""``python -m harness.sweep grid.toml``: track a grid of runs, resumable, with one report of all runs.

The file has ``[options]`` for all runs, a ``[grid]`` of lists, and ``[[run]]`` tables. Each combination of the grid's
values is one run; each ``[[run]]`` table is one more. All keys are options of `harness.track`::

    [options]
    dataset = "fashion-mnist"
    epochs = 20

    [grid]
    loss = ["cross-entropy", "hinge", "squared-error"]
    seed = [0, 1]

    [[run]]
    training = "pgd"
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.command import DONE, FAILED, child_environment, exit_code, print_error, run_command
from harness.config.options import ConfigError, OneLineParser, undashed
from harness.config.run_config import from_dict, resolve

KEYS = ("options", "grid", "run")


@dataclass(frozen=True)
class Entry:
    """One run: the name of its folder, made of the options that differ between runs, and all its options."""

    name: str
    options: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The options as words of `harness.track`'s command line."""
        return as_arguments(self.options)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options by their names in `harness.config.run_config.RunConfig` as words of `harness.track`'s command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [flag, str(item)]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = _parser().parse_args(argv)

    def work() -> int:
        if given.jobs < 1:
            raise ConfigError(f"expected --jobs of at least 1, got {given.jobs}; give a larger number")
        entries = read_sweep(given.file)
        if given.list:
            for entry in entries:
                print(f"{entry.name}: {' '.join(entry.arguments)}")
            return DONE
        return _sweep(entries, given.out or Path("runs") / given.file.stem, given.jobs)

    return exit_code("sweep", work, resume="to resume, run the same command again")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.sweep",
        description="Track a grid of data sets, models, trainings, losses and seeds, and report all runs together. "
        "Finished runs are not run again.",
        epilog="Exit codes: 0 done, 1 a run failed, 2 bad usage, 130 interrupted (the same command resumes).",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="[options], [grid] of lists, [[run]] tables")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folders and report.html (default: runs/FILE)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="list the runs and end")
    return parser


def read_sweep(path: Path) -> list[Entry]:
    """The runs of a sweep file.

    Raises:
        ConfigError: not a sweep file, an unknown or unusable option, or the same run twice.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected a TOML file at {path}, got {error}; fix the file or its path") from None
    unknown = sorted(set(content) - set(KEYS))
    common, grid, single = content.get("options", {}), content.get("grid", {}), content.get("run", [])
    lists = isinstance(grid, dict) and all(isinstance(value, list) and value for value in grid.values())
    tables = isinstance(single, list) and all(isinstance(table, dict) for table in [common, *single])
    if unknown or not lists or not tables or not (grid or single):
        got = ", ".join(unknown) or "other or no tables"
        raise ConfigError(f"expected [options], [grid] of lists and [[run]] tables in {path}, got {got}; write them so")
    common, grid = undashed(common, path), undashed(grid, path)
    combinations = (
        [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    )
    entries: dict[str, Entry] = {}
    for changes in [*combinations, *(undashed(table, path) for table in single)]:
        options = common | changes
        # errors are found before the first run starts
        resolve(from_dict(options))
        entry = Entry(_name(changes), options)
        if entry.name in entries:
            raise ConfigError(f"expected every run once in {path}, got {entry.name} twice; remove one")
        entries[entry.name] = entry
    return list(entries.values())


def _name(changes: Mapping[str, Any]) -> str:
    parts = []
    for key, value in changes.items():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{key.replace('_', '-')}={''.join(c if c.isalnum() or c in '.+-' else '.' for c in text)}")
    return ",".join(parts) or "run"


def _sweep(entries: Sequence[Entry], out: Path, jobs: int) -> int:
    stop, finished = threading.Event(), set[str]()

    def work(entry: Entry) -> None:
        if stop.is_set():
            return
        if error := run_entry(entry, out, stop):
            print_error("sweep", f"{entry.name}: {error}")
            return
        finished.add(entry.name)
        print(f"sweep: {len(finished)} of {len(entries)} runs", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, entry) for entry in entries]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
    runs = [out / entry.name for entry in entries if entry.name in finished]
    if runs:
        _report(runs, out / "report.html")
    unfinished = [entry.name for entry in entries if entry.name not in finished]
    if unfinished:
        print_error("sweep", f"not finished, and not in the report: {', '.join(unfinished)}")
    return FAILED if unfinished else DONE


def run_entry(entry: Entry, out: Path, stop: threading.Event) -> str:
    """Run `harness.track` for one entry, resuming an existing run; its output goes to ``NAME.log``.

    Args:
        stop: when it is set, the run gets SIGTERM and stops as after Ctrl-C.

    Returns:
        The last line of the output if the run failed, else an empty string.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{entry.name}.log"
    place = ["--resume", "--no-report", "--out", str(out / entry.name)]
    command = [sys.executable, "-m", "harness.track", *place, *entry.arguments]
    with log.open("w", encoding="utf-8") as written:
        # if this process is killed, the pipe to the run's standard input closes and the run ends
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=written, stderr=subprocess.STDOUT, env=child_environment()
        )
        while process.poll() is None:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    process.terminate()
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode == DONE:
        return ""
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"{''.join(last) or f'exit code {process.returncode}'} (all of it in {log})"


def _report(runs: Sequence[Path], page: Path) -> None:
    # here, so that --help needs no pandas
    from harness.report.build import evaluate, write_report
    from harness.runs import read_runs

    read = read_runs(runs)
    for remark in (line for run in read for line in run.remarks):
        print(f"sweep: {remark}")
    for line in write_report(read, evaluate(read), page):
        print(f"sweep: {line}")
    print(f"sweep: report: {page}")


if __name__ == "__main__":
    sys.exit(run_command(main))
