"""A tracked run in a forked process that is killed at a chosen or random moment."""

from __future__ import annotations

import contextlib
import importlib
import io
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.forking import fork

PHASES = ("starting", "training", "predicting", "attacking", "certifying", "between units", "writing", "drawing")
OPTIONS = (
    *("--model", "tests.survive.lives:net", "--epochs", "3", "--train-images", "96", "--test-images", "40"),
    *("--probe", "20", "--estimator", "deepfool:steps=5", "--estimator", "fmn:steps=10", "--noise-retries", "1"),
    *("--certify", "ibp", "--certify-probe", "5", "--certify-every", "2", "--keep-checkpoints", "2"),
    *("--device", "cpu", "--threads", "1"),
)


def net() -> nn.Module:
    """Build a small network with batch norm and dropout, whose state a resumed training must restore."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
    )


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code (-9 if it was killed), its stderr, and its last phase."""

    code: int
    said: str
    phase: str


class Moments:
    """Counts a process's moments per phase in memory shared with its parent, and kills it at a chosen one."""

    def __init__(self, target: tuple[str, int] | None = None) -> None:
        self.target = target
        self.memory = mmap.mmap(-1, 8 * (len(PHASES) + 1))

    def pass_by(self, phase: str) -> None:
        """Count a moment of the phase, and kill the process if it is the chosen one."""
        place = PHASES.index(phase)
        count = self.counts()[phase] + 1
        self.memory[8 * place + 8 : 8 * place + 16] = struct.pack("q", count)
        self.memory[:8] = struct.pack("q", place)
        if self.target == (phase, count):
            os.kill(os.getpid(), signal.SIGKILL)

    def counts(self) -> dict[str, int]:
        """Return the moments per phase up to now."""
        numbers = struct.unpack(f"{len(PHASES)}q", self.memory[8:])
        return dict(zip(PHASES, numbers, strict=True))

    @property
    def phase(self) -> str:
        """The phase of the latest moment."""
        return PHASES[struct.unpack("q", self.memory[:8])[0]]


def live(
    folder: Path,
    *,
    moments: Moments | None = None,
    stop: Callable[[int], None] | None = None,
    report: bool = True,
    options: tuple[str, ...] = OPTIONS,
) -> End:
    """Run the command on the folder in a forked process, with ``--resume``.

    Args:
        moments: counts the moments and may kill the process at one.
        stop: called with the process's id after the fork; may wait and send signals.
        report: draw the report at the end.
    """
    counted = moments or Moments()
    errors = folder.with_name(f"{folder.name}.stderr")
    sys.stdout.flush()
    child = fork()
    if child == 0:
        code = 70
        # background jobs of a shell ignore SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with errors.open("w") as handle, contextlib.redirect_stderr(handle):
                code = _run(folder, counted, report, options)
        except BaseException:
            with errors.open("a") as handle:
                traceback.print_exc(file=handle)
        finally:
            os._exit(code)
    if stop is not None:
        stop(child)
    _, status = os.waitpid(child, 0)
    return End(os.waitstatus_to_exitcode(status), errors.read_text() if errors.exists() else "", counted.phase)


def _run(folder: Path, moments: Moments, report: bool, options: tuple[str, ...]) -> int:
    from harness.track import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        for patch in _patches(moments, report):
            stack.enter_context(patch)
        moments.pass_by("starting")
        return main(["--out", str(folder), "--resume", *options])


def _patches(moments: Moments, report: bool) -> Iterator[Any]:
    """Count moments where the harness does its work."""
    import attacks.judging.judge
    import harness.figures.canvas
    import harness.measuring.bounds
    import harness.measuring.margins
    import harness.report.build
    import harness.store.files
    import harness.store.folder
    import harness.store.tables
    import harness.store.tensors
    import harness.tracking.training_run
    import harness.training.trainer

    def before(owner: Any, name: str, phase: str) -> Any:
        real = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            moments.pass_by(phase)
            return real(*given, **named)

        return mock.patch.object(owner, name, counted)

    yield before(harness.training.trainer.Trainer, "_step", "training")
    yield before(harness.tracking.training_run, "evaluate", "predicting")
    yield before(attacks.judging.judge.Judge, "_attack", "attacking")
    yield before(attacks.judging.judge.Judge, "_refine", "attacking")
    yield before(harness.measuring.bounds.Certifying, "_of_split", "certifying")
    yield before(harness.measuring.margins.Estimating, "_keep", "between units")
    yield before(harness.figures.canvas, "_render", "drawing")
    really_write = harness.store.files.write_atomically

    def write(path: Path, content: Callable[[Path], object]) -> None:
        def dying(temporary: Path) -> None:
            # moments of a file: half written, written under its temporary name, renamed
            content(temporary)
            if moments.target is not None and moments.target[0] == "writing":
                half = temporary.read_bytes()
                temporary.write_bytes(half[: len(half) // 2])
                moments.pass_by("writing")
                temporary.write_bytes(half)
            else:
                moments.pass_by("writing")
            moments.pass_by("writing")

        really_write(path, dying)
        moments.pass_by("writing")

    for module in (
        *(harness.store.files, harness.store.folder, harness.store.tables, harness.store.tensors),
        *(harness.report.build, harness.figures.canvas),
    ):
        yield mock.patch.object(module, "write_atomically", write)
    if not report:
        yield mock.patch.object(harness.report.build, "evaluate", return_value=SimpleNamespace(warm=[]))
        yield mock.patch.object(harness.report.build, "write_report", return_value=[])


def warm_up() -> None:
    """Import the modules that a run needs, so that forked processes do not import them again."""
    torch.set_num_threads(1)
    for name in (
        "harness.report.build",
        "harness.tracking.terminal",
        "harness.track",
        "attacks.registry",
        "attacks.certify.certifiers",
        "attacks.estimators.deepfool",
        "attacks.estimators.fmn",
        "rich.table",
        # imported when an optimiser or the digits are first used, which takes most of a short run's time
        "torch._dynamo",
        "sklearn.datasets",
        "scipy.stats",
    ):
        importlib.import_module(name)


def at_random(draw: random.Random, longest: float, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """Return a ``stop`` that sends a signal at a random time within some seconds."""
    delay = draw.uniform(0, longest)

    def stop(child: int) -> None:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    return stop
