"""Damaged files of a finished run, full and read-only disks, signals, and two processes on one folder."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.survive.comparing import DERIVED, compare_apart
from tests.survive.lives import OPTIONS, End, live

# one line with the error and the remedy
ONE_LINE = re.compile(r"track: error: (expected .+, got .+|checksum mismatch in .+: .+); .+\n")
LONGER = (*OPTIONS, "--epochs", "4")
# sizes of the full disk, from too small for the manifest to nearly enough for a run
ROOMS = ("4k", "16k", "64k", "128k", "192k", "256k")


@dataclass
class Case:
    """The outcomes of one kind of damage.

    Attributes:
        healed: runs that resumed at once and ended as the undisturbed run.
        told: runs that ended with a one-line error and matched the undisturbed run after its remedy was applied.
        wrong: all others.
    """

    name: str
    tried: int = 0
    healed: int = 0
    told: int = 0
    rows: int = 0
    wrong: list[str] = field(default_factory=list)

    def judge(self, what: str, first: End, second: End | None, folder: Path, whole: Path) -> None:
        """Count one try.

        Args:
            second: the start after the remedy in the first error; None if the first start ended without an error.
        """
        self.tried += 1
        comparison = compare_apart(folder, whole)
        self.rows += comparison.rows
        if second is None and first.code == 0 and not comparison.differences:
            self.healed += 1
        elif second is not None and ONE_LINE.fullmatch(first.said) and second.code == 0 and not comparison.differences:
            self.told += 1
        else:
            message = (second or first).said.strip().splitlines()[-1:]
            self.wrong.append(f"{what}: exit {first.code}; {'; '.join([*message, *comparison.differences[:3]])}")


def _truncated(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _deleted(path: Path, draw: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "deleted": _deleted,
    "truncated": _truncated,
    "one bit flipped": _flipped,
}


def damaged_parts(whole: Path, work: Path, draw: random.Random) -> Iterator[Case]:
    """Damage every file of a finished run in every way, one at a time, and resume the run.

    A trainer's state is read by a longer run only, so a run with a damaged one is resumed with one more epoch.
    """
    longer = work / "longer"
    shutil.copytree(whole, longer)
    live(longer, report=False, options=LONGER)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    names = [path.relative_to(whole) for path in files]
    parts = [name for name in names if not str(name).startswith(DERIVED)]
    for damage, act in DAMAGES.items():
        case = Case(f"file {damage}")
        for name in parts:
            folder = work / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            act(folder / name, draw)
            state = name.name.endswith(".trainer.pt")
            options = LONGER if state else OPTIONS
            first, second = live(folder, report=False, options=options), None
            if first.code != 0 and str(folder / name) in first.said:
                # the remedy in the error is to delete or restore the file
                (folder / name).unlink(missing_ok=True)
                second = live(folder, report=False, options=options)
            case.judge(f"{name} {damage}", first, second, folder, longer if state else whole)
        yield case


def damaged_manifest(whole: Path, work: Path, draw: random.Random, tries: int = 20) -> Case:
    """Damage the manifest, then restore it as the error advises."""
    case = Case("manifest damaged")
    for turn in range(tries):
        folder = work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        manifest = folder / "manifest.json"
        (_truncated if turn % 2 else _flipped)(manifest, draw)
        first = live(folder, report=False)
        shutil.copy(whole / "manifest.json", manifest)
        case.judge(f"manifest.json, try {turn}", first, live(folder, report=False), folder, whole)
    return case


@contextlib.contextmanager
def disk(place: Path, room: str) -> Iterator[Path | None]:
    """Mount a file system of a given size; None if mounting is not permitted (it takes root on Linux)."""
    place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", place], capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def full_disk(whole: Path, work: Path) -> Case | None:
    """Run on a disk that becomes full, then make room and resume."""
    case = Case("disk full")
    for room in ROOMS:
        with disk(work / "disk", room) as place:
            if place is None:
                return None
            first = _with_errors_elsewhere(place / "run", work)
            _remount(place, "size=64m")
            case.judge(f"{room} of room", first, live(place / "run"), place / "run", whole)
    return case


def read_only(whole: Path, work: Path) -> Case | None:
    """Run on a read-only file system with an empty folder, half a run and a whole run, then resume."""
    case = Case("folder read-only")
    for state in ("nothing there", "half a run", "all of it"):
        with disk(work / "disk", "64m") as place:
            if place is None:
                return None
            folder = place / "run"
            if state != "nothing there":
                shutil.copytree(whole, folder)
            if state == "half a run":
                for path in [*folder.glob("*/epoch-002*"), *folder.glob("*/epoch-003*")]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            _remount(place, "ro")
            first = _with_errors_elsewhere(folder, work)
            _remount(place, "rw")
            case.judge(state, first, live(folder), folder, whole)
    return case


def _with_errors_elsewhere(folder: Path, work: Path) -> End:
    """Run on a folder whose disk has no room for what is written to stderr."""
    link = work / "read-only-run"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return live(link, report=False)


def two_writers(whole: Path, work: Path, tries: int = 3) -> Case:
    """Start a second process on the folder, which must be refused without affecting the first one."""
    case = Case("two processes on one folder")
    for turn in range(tries):
        folder, seconds = work / f"shared-{turn}", list[End]()

        def second(child: int, folder: Path = folder, seconds: list[End] = seconds) -> None:
            while not (folder / "checkpoints").exists():
                time.sleep(0.01)
            link = folder.with_name(f"{folder.name}-again")
            link.unlink(missing_ok=True)
            link.symlink_to(folder)
            seconds.append(live(link, report=False))

        first = live(folder, stop=second, report=False)
        case.judge(f"try {turn}", seconds[0], first, folder, whole)
    return case


def told_to_stop(whole: Path, work: Path, draw: random.Random, tries: int = 20) -> Iterator[Case]:
    """SIGTERM and Ctrl-C at random times: the command prints how to resume and leaves no half-written file."""
    began = time.perf_counter()
    live(work / "timed", report=False)
    longest = time.perf_counter() - began
    for number in (signal.SIGTERM, signal.SIGINT):
        case = Case(f"{number.name}")
        for turn in range(tries):
            folder = work / f"stopped-{number.name}-{turn}"
            delay = draw.uniform(0.1, longest)

            def stop(child: int, delay: float = delay, number: signal.Signals = number) -> None:
                time.sleep(delay)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)

            first = live(folder, stop=stop, report=False)
            half = [str(path) for path in folder.rglob(".*.tmp")]
            second = live(folder, report=False)
            case.tried += 1
            comparison = compare_apart(folder, whole)
            case.rows += comparison.rows
            if first.code in (0, 130) and second.code == 0 and not half and not comparison.differences:
                case.told += first.code == 130
                case.healed += first.code == 0
            else:
                case.wrong.append(f"after {delay:.2f} s: exit {first.code}; {[*half, *comparison.differences[:3]]}")
        yield case
