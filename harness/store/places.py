"""Names of a run's files: which path each has, and what a path says that its file is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from attacks.types import NORMS

# exactly what `epoch_name` writes: `epoch-1` and `epoch-0001` are other names
EPOCH = re.compile(r"epoch-([0-9]{3}|[1-9][0-9]{3,})")
# a folder of every epoch with a file of every unit, or a file of every epoch
BY_UNIT = {"margins": ".parquet", "bounds": ".parquet", "witnesses": ".safetensors"}
BY_EPOCH = {
    "checkpoints": {".trainer.pt": "trainer", ".safetensors": "checkpoint"},
    "predictions": {".parquet": "predictions"},
}
FOLDERS = ("probes", *BY_EPOCH, *BY_UNIT)


@dataclass(frozen=True)
class Unit:
    """One part's work: an estimator or certifier (canonical text) in one norm."""

    estimator: str
    norm: str

    @property
    def filename(self) -> str:
        """The text with characters that some file systems refuse percent-encoded, then the norm."""
        return f"{quote(self.estimator, safe='=,+-._')}.{self.norm}"

    def __str__(self) -> str:
        return f"{self.estimator} {self.norm}"


@dataclass(frozen=True)
class Place:
    """What the name of a file says that it is.

    Attributes:
        kind: one of `FOLDERS`, or ``checkpoint`` and ``trainer`` of ``checkpoints``.
        epoch, unit, split: those that the kind has; else -1 and None.
    """

    kind: str
    epoch: int = -1
    unit: Unit | None = None
    split: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """As they stand in a file."""
        known = {"epoch": None if self.epoch < 0 else self.epoch, "unit": self.unit, "split": self.split}
        return {"kind": self.kind} | {name: str(value) for name, value in known.items() if value is not None}


def epoch_name(epoch: int) -> str:
    """Of a folder or file of the epoch."""
    return f"epoch-{epoch:03d}"


def place_of(parts: Sequence[str]) -> Place | None:
    """What the parts of a path below the run folder say; None where no file of a run has that name."""
    folder, name = parts[0], parts[-1]
    if folder in BY_UNIT:
        epoch = epoch_of(parts[1]) if len(parts) == 3 else None
        unit = _unit_of(name.removesuffix(BY_UNIT[folder])) if name.endswith(BY_UNIT[folder]) else None
        return Place(folder, epoch, unit) if epoch is not None and unit is not None else None
    if len(parts) == 2:
        for suffix, kind in BY_EPOCH.get(folder, {}).items():
            epoch = epoch_of(name.removesuffix(suffix))
            if name.endswith(suffix) and epoch is not None:
                return Place(kind, epoch)
        split = unquote(name.removesuffix(".safetensors"))
        if folder == "probes" and name == f"{quote(split, safe='')}.safetensors":
            return Place("probes", split=split)
    return None


def epoch_of(name: str) -> int | None:
    """The epoch of which `epoch_name` writes this name."""
    found = EPOCH.fullmatch(name)
    return int(found[1]) if found else None


@lru_cache
def _unit_of(filename: str) -> Unit | None:
    text, _, norm = filename.rpartition(".")
    unit = Unit(unquote(text), norm)
    return unit if text and norm in NORMS and unit.filename == filename else None


@dataclass(frozen=True)
class Listing:
    """What is in one folder of a run.

    Attributes:
        epochs: of every kind and unit, or kind and split, the files by epoch (-1 where there are no epochs).
        foreign: what has a name that no file of a run has, and is left out.
    """

    epochs: dict[Place, dict[int, Path]]
    foreign: list[Path]

    def add(self, place: Place, path: Path) -> None:
        """The file is there."""
        self.epochs.setdefault(replace(place, epoch=-1), {})[place.epoch] = path

    def drop(self, place: Place) -> None:
        """The file is gone."""
        self.epochs.get(replace(place, epoch=-1), {}).pop(place.epoch, None)

    def epochs_of(self, place: Place) -> list[int]:
        """Epochs that there is a file of, in order; ``place`` without an epoch."""
        return sorted(self.epochs.get(place, ()))

    def paths(self, epoch: int | None = None) -> list[Path]:
        """All files, or those of one epoch, by epoch and name."""
        if epoch is None:
            found = [item for files in self.epochs.values() for item in files.items()]
        else:
            found = [(epoch, files[epoch]) for files in self.epochs.values() if epoch in files]
        return [path for _, path in sorted(found, key=lambda item: (item[0], item[1].name))]


def list_folder(root: Path, folder: str) -> Listing:
    """Look a folder of a run up; names that begin with a dot are of files that are being written."""
    found = Listing({}, [])
    for name in _names(root / folder):
        inside: list[tuple[str, ...]] = [(folder, name)]
        if folder in BY_UNIT and epoch_of(name) is not None and (root / folder / name).is_dir():
            inside = [(folder, name, inner) for inner in _names(root / folder / name)]
        for parts in inside:
            place, path = place_of(parts), root.joinpath(*parts)
            if place is None:
                found.foreign.append(path)
            else:
                found.add(place, path)
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


@dataclass(frozen=True)
class RunPaths:
    """All paths of one run, and which of them are there."""

    path: Path
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def probes(self, split: str) -> Path:
        return self.path / "probes" / f"{quote(split, safe='')}.safetensors"

    def checkpoint(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"{epoch_name(epoch)}.safetensors"

    def trainer(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"{epoch_name(epoch)}.trainer.pt"

    def predictions(self, epoch: int) -> Path:
        return self.path / "predictions" / f"{epoch_name(epoch)}.parquet"

    def margins(self, epoch: int, unit: Unit) -> Path:
        return self.path / "margins" / epoch_name(epoch) / f"{unit.filename}.parquet"

    def witnesses(self, epoch: int, unit: Unit) -> Path:
        return self.path / "witnesses" / epoch_name(epoch) / f"{unit.filename}.safetensors"

    def bounds(self, epoch: int, unit: Unit) -> Path:
        return self.path / "bounds" / epoch_name(epoch) / f"{unit.filename}.parquet"

    def shards(self, epoch: int) -> Path:
        return self.path / "shards" / epoch_name(epoch)

    def unsound(self, epoch: int, unit: Unit) -> Path:
        return self.path / "unsound" / f"{epoch_name(epoch)}.{unit.filename}.safetensors"

    @property
    def brackets_csv(self) -> Path:
        return self.path / "brackets.csv"

    @property
    def epochs_csv(self) -> Path:
        return self.path / "epochs.csv"

    @property
    def summary_csv(self) -> Path:
        return self.path / "summary.csv"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def margin_parts(self, epoch: int | None = None) -> list[Path]:
        """Finished margin parts, by epoch and unit; of one epoch where it is given."""
        return self._listing("margins").paths(epoch)

    def measured_epochs(self, unit: Unit) -> list[int]:
        """Epochs that the unit has margins of, in order."""
        return self._listing("margins").epochs_of(Place("margins", unit=unit))

    def bound_parts(self) -> list[Path]:
        """Finished parts of certifiers, by epoch and unit."""
        return self._listing("bounds").paths()

    def bounded_epochs(self, unit: Unit) -> list[int]:
        """Epochs that the unit has lower bounds of, in order."""
        return self._listing("bounds").epochs_of(Place("bounds", unit=unit))

    def prediction_parts(self) -> list[Path]:
        """Finished prediction parts, by epoch."""
        return self._listing("predictions").paths()

    def witness_epochs(self, unit: Unit) -> list[int]:
        """Epochs that witnesses of the unit are kept of, in order."""
        return self._listing("witnesses").epochs_of(Place("witnesses", unit=unit))

    def witness_files(self) -> list[Path]:
        """Witnesses of all units, by epoch and unit."""
        return self._listing("witnesses").paths()

    def probe_splits(self) -> list[str]:
        """Splits that probe images are kept of."""
        return [place.split for place in self._listing("probes").epochs if place.split is not None]

    def checkpoint_epochs(self) -> list[int]:
        """Epochs that there is a checkpoint of, in order."""
        return self._listing("checkpoints").epochs_of(Place("checkpoint"))

    def trainer_epochs(self) -> list[int]:
        """Epochs that there is a trainer's state of, in order."""
        return self._listing("checkpoints").epochs_of(Place("trainer"))

    def _listing(self, folder: str) -> Listing:
        """What is in one of the run's folders: looked up once while the run is locked, as nobody else writes then."""
        listings: dict[str, Listing] | None = self._known.get("listings")
        if listings is None:
            return list_folder(self.path, folder)
        if folder not in listings:
            listings[folder] = list_folder(self.path, folder)
        return listings[folder]

    def place(self, path: Path) -> Place | None:
        """What a file is by its name; None for a name that no run writes."""
        return place_of(path.relative_to(self.path).parts)
