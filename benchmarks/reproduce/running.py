"""Run the steps of a study as commands, each once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.reproduce.study import Planned, Study
from harness.store.files import write_atomically
from harness.sweep import as_arguments

Say = Callable[[str], None]


class StepError(ValueError):
    """A step that failed; the message is one line."""


def run_study(study: Study, folder: Path, data_root: str, jobs: int, say: Say) -> None:
    """Run the steps of every run, ``jobs`` runs at a time.

    Raises:
        StepError: a step failed; running steps are finished first. The same call continues from there.
    """
    failed = threading.Event()

    def work(planned: Planned) -> None:
        for arguments in steps_of(planned, folder, data_root):
            if failed.is_set():
                return
            try:
                run_step(planned.name, arguments, folder, say)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work, planned) for planned in study.runs.values()]:
            future.result()


def steps_of(planned: Planned, folder: Path, data_root: str) -> Iterator[list[str]]:
    """The command-line arguments of Python for every step."""
    run = str(folder / planned.name)
    place = ["--resume", "--out", run, "--data-root", data_root]
    yield ["-m", "harness.track", *place, *as_arguments(planned.options)]
    for text, epochs in planned.added.items():
        at = [word for epoch in epochs for word in ("--epoch", str(epoch))]
        yield ["-m", "harness.compare", run, "--estimator", text, "--threads", "1", *at]
    for text, epochs in planned.certified.items():
        at = [word for epoch in epochs for word in ("--epoch", str(epoch))]
        yield ["-m", "harness.compare", run, "--certify", text, "--threads", "1", *at]
    if planned.checkpoints:
        yield ["-m", "benchmarks.reproduce.around", run, "--epoch", *map(str, planned.checkpoints)]


def run_step(name: str, arguments: Sequence[str], folder: Path, say: Say) -> None:
    """Run a step unless it is complete; its output goes to ``NAME.log``.

    Raises:
        StepError: it failed.
    """
    finished = folder / f"{name}.steps.json"
    done: list[list[str]] = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else []
    if list(arguments) in done:
        return
    say(f"{name}: python {' '.join(arguments)}")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run(
            [sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise StepError(f"expected {name} to go through, got exit code {code} ({''.join(last)}); see {log}")
    text = json.dumps([*done, list(arguments)], indent=1) + "\n"
    write_atomically(finished, lambda path: path.write_text(text, encoding="utf-8"))
