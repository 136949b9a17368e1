"""Files of a finished run deleted, cut short, or with one bit turned; disks that are full or read-only; two writers."""

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

from benchmarks.survive.comparing import DERIVED, compare_apart
from benchmarks.survive.lives import OPTIONS, End, live

# one line that says what is wrong and what to do
ONE_LINE = re.compile(r"track: error: (expected .+, got .+|checksum mismatch in .+: .+); .+\n")
LONGER = (*OPTIONS, "--epochs", "4")
# room on the full disk, from too little for the manifest to nearly all that a run needs
ROOMS = ("4k", "16k", "64k", "128k", "192k", "256k")


@dataclass
class Case:
    """What was tried of one kind, and how it ended.

    Attributes:
        healed: gone on to the same run at once. told: said in one line what is wrong, and gone on to the same run after
            what it said. wrong: neither.
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
            second: after what the first one said was done; None where it was content.
        """
        self.tried += 1
        found = compare_apart(folder, whole)
        self.rows += found.rows
        if second is None and first.code == 0 and not found.differences:
            self.healed += 1
        elif second is not None and ONE_LINE.fullmatch(first.said) and second.code == 0 and not found.differences:
            self.told += 1
        else:
            said = (second or first).said.strip().splitlines()[-1:]
            self.wrong.append(f"{what}: exit {first.code}; {'; '.join([*said, *found.differences[:3]])}")


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
    """Every file of a finished run in turn, damaged in every way; then resumed.

    A trainer's state is what a longer run begins with: where one is damaged, the run is made longer.
    """
    longer = work / "longer"
    shutil.copytree(whole, longer)
    live(longer, report=False, options=LONGER)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    names = [path.relative_to(whole) for path in files]
    parts = [name for name in names if not str(name).startswith(DERIVED)]
    for damage, act in DAMAGES.items():
        case = Case(f"a part {damage}")
        for name in parts:
            folder = work / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            act(folder / name, draw)
            state = name.name.endswith(".trainer.pt")
            options = LONGER if state else OPTIONS
            first, second = live(folder, report=False, options=options), None
            if first.code != 0 and str(folder / name) in first.said:
                # what the error says, whatever the file is
                (folder / name).unlink(missing_ok=True)
                second = live(folder, report=False, options=options)
            case.judge(f"{name} {damage}", first, second, folder, longer if state else whole)
        yield case


def damaged_manifest(whole: Path, work: Path, draw: random.Random, tries: int = 20) -> Case:
    """The manifest damaged, then restored, as it is told."""
    case = Case("the manifest damaged")
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
    """A file system of its own, so much in size; None where this may not be made (it takes root on Linux)."""
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
    """The disk is full at some file; then there is room again."""
    case = Case("the disk full")
    for room in ROOMS:
        with disk(work / "disk", room) as place:
            if place is None:
                return None
            # what is left of it is told elsewhere: here is no room for it
            first = _beside(place / "run", work)
            _remount(place, "size=64m")
            case.judge(f"{room} of room", first, live(place / "run"), place / "run", whole)
    return case


def read_only(whole: Path, work: Path) -> Case | None:
    """The file system can only be read: from the start, in the middle, and when all is done."""
    case = Case("the folder read-only")
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
            first = _beside(folder, work)
            _remount(place, "rw")
            case.judge(state, first, live(folder), folder, whole)
    return case


def _beside(folder: Path, work: Path) -> End:
    """A life whose errors are kept elsewhere."""
    link = work / "read-only-run"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return live(link, report=False)


def two_writers(whole: Path, work: Path, tries: int = 3) -> Case:
    """A second process on the folder is told, and the first one ends as if it were alone."""
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
    """SIGTERM and Ctrl-C at random times: the command says how to resume, and leaves no half-written file."""
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
            found = compare_apart(folder, whole)
            case.rows += found.rows
            if first.code in (0, 130) and second.code == 0 and not half and not found.differences:
                case.told += first.code == 130
                case.healed += first.code == 0
            else:
                case.wrong.append(f"after {delay:.2f} s: exit {first.code}; {[*half, *found.differences[:3]]}")
        yield case
