"""The run folder: a manifest and immutable parts; the directory listing is the state.

A part that exists is complete (see `harness.files`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from harness.files import CHECKSUM, StoreError, remove_leftovers, write_atomically

# of the manifest: since 2 it has a checksum
SCHEMA, READABLE = 2, (1, 2)
LOCK = ".lock"
LIBRARIES = ("torch", "torchvision", "foolbox", "torchattacks", "eagerpy", "numpy", "pandas", "pyarrow", "scipy")
MARGIN_COLUMNS = (
    *("epoch", "split", "image", "label", "prediction", "correct", "confidence", "logit_margin"),
    *("estimator", "norm", "domain", "distance", "attack_distance", "status", "target", "message"),
    *("noise_retries", "forwards", "backwards", "seconds"),
)
BOUND_COLUMNS = (
    *("epoch", "split", "image", "label", "prediction", "correct", "certifier", "norm", "domain"),
    *("lower", "upper", "solved", "seconds"),
)
WITNESSES_KEPT = 8  # smallest and as many largest, of epochs before the latest


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """All paths of one run, and how its parts are written and read."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def probes(self, split: str) -> Path:
        return self.path / "probes" / f"{quote(split, safe='')}.safetensors"

    def checkpoint(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"epoch-{epoch:03d}.safetensors"

    def trainer(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"epoch-{epoch:03d}.trainer.pt"

    def predictions(self, epoch: int) -> Path:
        return self.path / "predictions" / f"epoch-{epoch:03d}.parquet"

    def margins(self, epoch: int, unit: Unit) -> Path:
        return self.path / "margins" / f"epoch-{epoch:03d}" / f"{unit.filename}.parquet"

    def witnesses(self, epoch: int, unit: Unit) -> Path:
        return self.path / "witnesses" / f"epoch-{epoch:03d}" / f"{unit.filename}.safetensors"

    def bounds(self, epoch: int, unit: Unit) -> Path:
        return self.path / "bounds" / f"epoch-{epoch:03d}" / f"{unit.filename}.parquet"

    def shards(self, epoch: int) -> Path:
        return self.path / "shards" / f"epoch-{epoch:03d}"

    def unsound(self, epoch: int, unit: Unit) -> Path:
        return self.path / "unsound" / f"epoch-{epoch:03d}.{unit.filename}.safetensors"

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
        folder = "epoch-*" if epoch is None else f"epoch-{epoch:03d}"
        parts = (self.path / "margins").glob(f"{folder}/[!.]*.parquet")
        return sorted(parts, key=lambda path: (_epoch_of(path.parent), path.name))

    def measured_epochs(self, unit: Unit) -> list[int]:
        """Epochs that the unit has margins of, in order."""
        found = (self.path / "margins").glob(f"epoch-*/{unit.filename}.parquet")
        return sorted(_epoch_of(path.parent) for path in found)

    def bound_parts(self) -> list[Path]:
        """Finished parts of certifiers, by epoch and unit."""
        parts = (self.path / "bounds").glob("epoch-*/[!.]*.parquet")
        return sorted(parts, key=lambda path: (_epoch_of(path.parent), path.name))

    def bounded_epochs(self, unit: Unit) -> list[int]:
        """Epochs that the unit has lower bounds of, in order."""
        found = (self.path / "bounds").glob(f"epoch-*/{unit.filename}.parquet")
        return sorted(_epoch_of(path.parent) for path in found)

    def prediction_parts(self) -> list[Path]:
        """Finished prediction parts, by epoch."""
        return sorted((self.path / "predictions").glob("epoch-[0-9]*.parquet"), key=_epoch_of)

    def witness_epochs(self, unit: Unit) -> list[int]:
        """Epochs that witnesses of the unit are kept of, in order."""
        # a unit's filename holds no wildcards: they are percent-encoded
        found = (self.path / "witnesses").glob(f"epoch-*/{unit.filename}.safetensors")
        return sorted(_epoch_of(path.parent) for path in found)

    def checkpoint_epochs(self) -> list[int]:
        """Epochs that there is a checkpoint of, in order."""
        return sorted(map(_epoch_of, (self.path / "checkpoints").glob("epoch-[0-9]*.safetensors")))

    def trainer_epochs(self) -> list[int]:
        """Epochs that there is a trainer's state of, in order."""
        return sorted(map(_epoch_of, (self.path / "checkpoints").glob("epoch-[0-9]*.trainer.pt")))

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.manifest.exists()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            StoreError: missing, damaged or of another schema.
        """
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"expected a run's manifest at {self.manifest}, got {error}; restore it") from None
        if not isinstance(found, dict) or found.get("schema") not in READABLE:
            got = found.get("schema") if isinstance(found, dict) else type(found).__name__
            raise StoreError(f"expected schema {SCHEMA} in {self.manifest}, got {got}; use the version that wrote it")
        wanted = found.pop(CHECKSUM, None)
        if (wanted or found["schema"] != 1) and _manifest_checksum(found) != wanted:
            raise StoreError(
                f"expected the values that the manifest had at {self.manifest}, got others; restore it, or "
                f"take {CHECKSUM} out and write schema 1 if you changed it on purpose"
            )
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes from writing to the run; what killed ones left half-written is removed.

        The same process may take the lock again. A folder that is not there is made.

        Raises:
            StoreError: another process has it, or the folder cannot be written or holds something else.
        """
        if not self.exists():
            self._refuse_foreign()
        if str(self.path) != str(self.path).encode(errors="replace").decode():
            # safetensors opens no other
            raise StoreError(f"expected a folder whose path is UTF-8, got {str(self.path)!a}; choose another one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0, thread_local=False, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise StoreError(
                f"expected a run that no other process writes to, got {self.path} in use; wait for it to end, "
                "or choose another folder"
            ) from None
        except OSError as error:
            raise StoreError(
                f"expected a folder that can be written at {self.path}, got {error}; choose another one"
            ) from None
        try:
            if lock.lock_counter == 1:
                remove_leftovers(self.path)
            yield
        finally:
            lock.release()

    def _refuse_foreign(self) -> None:
        """Refuse a folder with something in it that is no run.

        Raises:
            StoreError: it has.
        """
        ours = (LOCK, f".{self.manifest.name}.")  # of a process that was killed before its first file was there
        if self.path.exists() and not (
            self.path.is_dir() and all(path.name.startswith(ours) for path in self.path.iterdir())
        ):
            if self.exists():  # another process has just started it: the manifest is the first file
                return
            raise StoreError(f"expected a new or empty folder, got {self.path}; choose another one")

    def start(self, manifest: dict[str, Any], *, resume: bool) -> None:
        """Begin a run here, or go on with the same one; on an error nothing is changed.

        Raises:
            StoreError: a run is here and ``resume`` is false, or the runs differ; names the fields.
        """
        if not self.exists():
            self._refuse_foreign()
            try:
                self.write_manifest({"schema": SCHEMA, "created": now(), **manifest})
            except StoreError as error:
                raise StoreError(
                    f"expected a folder that can be written at {self.path}, got {error.__cause__}; choose another one"
                ) from None
            return
        if not resume:
            raise StoreError(f"expected a new folder, got {self.path} with a run in it; add --resume or choose another")
        self.check(manifest)
        before = self.read_manifest()
        kept: dict[str, Any] = {"created": before.get("created")}
        for kind in ("estimators", "certifiers"):
            # those that are not asked for again keep their parts, and so their entries
            entries = (*before.get(kind, ()), *manifest.get(kind, ()))
            kept[kind] = list({entry["estimator"]: entry for entry in entries}.values())
        if "notes" in manifest:
            # what was noted of epochs that are not measured again
            kept["notes"] = list(dict.fromkeys((*before.get("notes", ()), *manifest["notes"])))
        self.write_manifest({**before, **manifest, **kept, "resumed": now()})

    def check(self, manifest: dict[str, Any]) -> None:
        """Refuse a folder that `start` would not continue; nothing is written and no lock is taken.

        Raises:
            StoreError: it holds something else than a run, or another run; names the fields.
        """
        if not self.exists():
            self._refuse_foreign()
            return
        before = self.read_manifest()
        changed = _differences(before.get("fingerprint", {}), manifest["fingerprint"])
        if changed:
            raise StoreError(
                f"expected the options of the run in {self.path}, got {changed}; use them or another folder"
            )
        _check_parameters(before.get("estimators", ()), manifest.get("estimators", ()))
        _check_parameters(before.get("certifiers", ()), manifest.get("certifiers", ()))

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        whole = {**manifest, "schema": SCHEMA}
        whole[CHECKSUM] = _manifest_checksum(whole)
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.manifest, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_parameters(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> None:
    """A text leaves out parameters at their defaults, which another version may have changed.

    Raises:
        StoreError: an estimator that the run has measured with other parameters.
    """
    known = {entry["estimator"]: entry.get("parameters") for entry in before}
    for entry in after:
        text, now_meant = entry["estimator"], entry.get("parameters")
        if text in known and known[text] != now_meant:
            raise StoreError(
                f"expected {text} with the parameters that the run was measured with, {known[text]}, got {now_meant}; "
                "write them out, or use another folder"
            )


def _epoch_of(path: Path) -> int:
    return int(path.name.removeprefix("epoch-").partition(".")[0])


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {after.get(name)!r} (the run has {before.get(name)!r})" for name in names)


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions and machine, for the manifest."""
    versions = {"python": platform.python_version()}
    for library in ("margin-harness", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    machine = {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, "machine": machine | {"threads": threads}, "command": sys.orig_argv[1:]}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
