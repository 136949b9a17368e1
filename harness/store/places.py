"""Paths of a run's files, and the identity (kind, epoch, unit, split) that a path gives its file."""

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

# only the names that `epoch_name` writes: `epoch-1` and `epoch-0001` do not match
EPOCH = re.compile(r"epoch-([0-9]{3}|[1-9][0-9]{3,})")
# folders with one folder per epoch and one file per unit in it; folders with one file per epoch
BY_UNIT = {"margins": ".parquet", "bounds": ".parquet", "witnesses": ".safetensors"}
BY_EPOCH = {
    "checkpoints": {".trainer.pt": "trainer", ".safetensors": "checkpoint"},
    "predictions": {".parquet": "predictions"},
}
FOLDERS = ("probes", *BY_EPOCH, *BY_UNIT)


@dataclass(frozen=True)
class Unit:
    """An estimator or certifier in one norm: what one part holds.

    Attributes:
        estimator: canonical text of the estimator or certifier.
        norm: ``l2`` or ``linf``.
    """

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
    """The identity of a file, from its path.

    Attributes:
        kind: one of `FOLDERS`; in ``checkpoints``, ``checkpoint`` or ``trainer``.
        epoch: -1 for kinds without epochs.
        unit: None for kinds without units.
        split: None for kinds without splits.
    """

    kind: str
    epoch: int = -1
    unit: Unit | None = None
    split: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """The identity as texts, as in a file's metadata."""
        known = {"epoch": None if self.epoch < 0 else self.epoch, "unit": self.unit, "split": self.split}
        return {"kind": self.kind} | {name: str(value) for name, value in known.items() if value is not None}


def epoch_name(epoch: int) -> str:
    """Name of the epoch's folder, or stem of its file."""
    return f"epoch-{epoch:03d}"


def place_of(parts: Sequence[str]) -> Place | None:
    """The place of a path, given its parts below the run folder; None if no run writes such a file."""
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
    """Inverse of `epoch_name`; None for other names."""
    match = EPOCH.fullmatch(name)
    return int(match[1]) if match else None


@lru_cache
def _unit_of(filename: str) -> Unit | None:
    text, _, norm = filename.rpartition(".")
    unit = Unit(unquote(text), norm)
    return unit if text and norm in NORMS and unit.filename == filename else None


@dataclass(frozen=True)
class Listing:
    """The files in one folder of a run.

    Attributes:
        epochs: files by epoch (-1 for kinds without epochs), per kind and unit or kind and split.
        foreign: files with names that no run writes; they are ignored.
    """

    epochs: dict[Place, dict[int, Path]]
    foreign: list[Path]

    def add(self, place: Place, path: Path) -> None:
        """Add a file."""
        self.epochs.setdefault(replace(place, epoch=-1), {})[place.epoch] = path

    def drop(self, place: Place) -> None:
        """Remove a file, if it is listed."""
        self.epochs.get(replace(place, epoch=-1), {}).pop(place.epoch, None)

    def epochs_of(self, place: Place) -> list[int]:
        """Epochs with a file, in ascending order; ``place`` has no epoch."""
        return sorted(self.epochs.get(place, ()))

    def paths(self, epoch: int | None = None) -> list[Path]:
        """All files, or those of one epoch, ordered by epoch and name."""
        if epoch is None:
            listed = [item for files in self.epochs.values() for item in files.items()]
        else:
            listed = [(epoch, files[epoch]) for files in self.epochs.values() if epoch in files]
        return [path for _, path in sorted(listed, key=lambda item: (item[0], item[1].name))]


def list_folder(root: Path, folder: str) -> Listing:
    """List a folder of a run; names that begin with a dot are files being written and are left out."""
    listing = Listing({}, [])
    for name in _names(root / folder):
        inside: list[tuple[str, ...]] = [(folder, name)]
        if folder in BY_UNIT and epoch_of(name) is not None and (root / folder / name).is_dir():
            inside = [(folder, name, inner) for inner in _names(root / folder / name)]
        for parts in inside:
            place, path = place_of(parts), root.joinpath(*parts)
            if place is None:
                listing.foreign.append(path)
            else:
                listing.add(place, path)
    return listing


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


@dataclass(frozen=True)
class RunPaths:
    """All paths of one run, and which of its files exist."""

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
        """Finished margin parts, ordered by epoch and unit; only those of ``epoch`` if it is given."""
        return self._listing("margins").paths(epoch)

    def measured_epochs(self, unit: Unit) -> list[int]:
        """Epochs with margins of the unit, in ascending order."""
        return self._listing("margins").epochs_of(Place("margins", unit=unit))

    def bound_parts(self) -> list[Path]:
        """Finished parts of certifiers, ordered by epoch and unit."""
        return self._listing("bounds").paths()

    def bounded_epochs(self, unit: Unit) -> list[int]:
        """Epochs with lower bounds of the unit, in ascending order."""
        return self._listing("bounds").epochs_of(Place("bounds", unit=unit))

    def prediction_parts(self) -> list[Path]:
        """Finished prediction parts, ordered by epoch."""
        return self._listing("predictions").paths()

    def witness_epochs(self, unit: Unit) -> list[int]:
        """Epochs with stored witnesses of the unit, in ascending order."""
        return self._listing("witnesses").epochs_of(Place("witnesses", unit=unit))

    def witness_files(self) -> list[Path]:
        """Files of witnesses of all units, ordered by epoch and unit."""
        return self._listing("witnesses").paths()

    def probe_splits(self) -> list[str]:
        """Splits with stored probe images."""
        return [place.split for place in self._listing("probes").epochs if place.split is not None]

    def checkpoint_epochs(self) -> list[int]:
        """Epochs with a checkpoint, in ascending order."""
        return self._listing("checkpoints").epochs_of(Place("checkpoint"))

    def trainer_epochs(self) -> list[int]:
        """Epochs with a trainer's state, in ascending order."""
        return self._listing("checkpoints").epochs_of(Place("trainer"))

    def _listing(self, folder: str) -> Listing:
        """The listing of one of the run's folders; cached while the run is locked, as no other process writes then."""
        listings: dict[str, Listing] | None = self._known.get("listings")
        if listings is None:
            return list_folder(self.path, folder)
        if folder not in listings:
            listings[folder] = list_folder(self.path, folder)
        return listings[folder]

    def place(self, path: Path) -> Place | None:
        """The place of a file of this run by its path; None for a path that no run writes."""
        return place_of(path.relative_to(self.path).parts)
