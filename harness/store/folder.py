"""The run folder: read, write, lock, start and resume a run.

A part that exists is complete (`harness.store.files` writes atomically), so the directory listing is the state of the
run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from harness.store.files import remove_leftovers, write_atomically
from harness.store.identity import CHECKSUM, StoreError, check_identity, check_regular
from harness.store.manifest import check_parameters, check_probes, check_shape, differences, manifest_checksum, now
from harness.store.metadata import facts_of
from harness.store.places import FOLDERS, Place, RunPaths
from harness.store.places import Unit as Unit
from harness.store.tables import read_part, write_part
from harness.store.tensors import (
    load_checkpoint,
    load_tensors,
    load_trainer,
    save_checkpoint,
    save_tensors,
    save_trainer,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

# schema of the manifest: since 2 it has a checksum
SCHEMA, READABLE = 2, (1, 2)
LOCK = ".lock"
# witnesses kept of epochs before the latest: this many with the smallest distances, and as many with the largest
WITNESSES_KEPT = 8


@dataclasses.dataclass(frozen=True)
class RunFolder(RunPaths):
    """All paths of one run; reads and writes its parts.

    Every file is written with facts that identify it, and they are compared with its place when it is read.
    """

    def facts(self, place: Place | None) -> dict[str, str]:
        """The facts of a file at this place; ``run`` is the digest in the manifest and not the name of the folder."""
        run = {"run": self.digest} if self.digest else {}
        return {**place.facts, **run} if place else {}

    @property
    def digest(self) -> str:
        """The digest of the run's fingerprint; empty if there is no manifest or it has none."""
        if not self._known.get("digest") and self.exists():
            self._known["digest"] = str(self.read_manifest().get("digest", ""))
        return str(self._known.get("digest", ""))

    def write_part(self, path: Path, table: pd.DataFrame, **facts: str) -> None:
        """Write one of the run's Parquet parts (see `harness.store.tables.write_part`)."""
        write_part(path, table, **self.facts(self.place(path)), **facts)
        self._wrote(path)

    def read_part(self, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
        """Read one of the run's parts and its facts (see `harness.store.tables.read_part`)."""
        rows, facts = read_part(path, self.facts(self.place(path)))
        self._read(path, facts)
        return rows, facts

    def save_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write probes or witnesses (see `harness.store.tensors.save_tensors`)."""
        save_tensors(path, tensors, **self.facts(self.place(path)))
        self._wrote(path)

    def load_tensors(self, path: Path) -> dict[str, Tensor]:
        """Read probes or witnesses (see `harness.store.tensors.load_tensors`)."""
        return load_tensors(path, self.facts(self.place(path)))

    def save_checkpoint(self, epoch: int, model: nn.Module) -> None:
        """Write the epoch's weights (see `harness.store.tensors.save_checkpoint`)."""
        save_checkpoint(self.checkpoint(epoch), model, epoch, self.facts(Place("checkpoint", epoch)))
        self._wrote(self.checkpoint(epoch))

    def load_checkpoint(self, epoch: int, model: nn.Module) -> None:
        """Load the epoch's weights (see `harness.store.tensors.load_checkpoint`)."""
        load_checkpoint(self.checkpoint(epoch), model, self.facts(Place("checkpoint", epoch)))

    def save_trainer(self, epoch: int, state: Mapping[str, object]) -> None:
        """Write the trainer's state at the epoch."""
        save_trainer(self.trainer(epoch), state, **self.facts(Place("trainer", epoch)))
        self._wrote(self.trainer(epoch))

    def load_trainer(self, epoch: int) -> dict[str, Any]:
        """Read the trainer's state at the epoch (see `harness.store.tensors.load_trainer`)."""
        return load_trainer(self.trainer(epoch), self.facts(Place("trainer", epoch)))

    def drop(self, path: Path) -> None:
        """Delete a file of the run, if it exists."""
        path.unlink(missing_ok=True)
        place = self.place(path)
        if place is not None and "listings" in self._known:
            self._listing(path.relative_to(self.path).parts[0]).drop(place)

    def _wrote(self, path: Path) -> None:
        place = self.place(path)
        if place is not None and "listings" in self._known:
            self._listing(path.relative_to(self.path).parts[0]).add(place, path)

    def check_places(self) -> None:
        """Check the facts of every file against its place, without reading the rest of the file.

        Raises:
            StoreError: a file belongs to another place; the message names both.
        """
        for folder in FOLDERS:
            for path in self._listing(folder).paths():
                facts = facts_of(path)
                check_identity(path, facts, self.facts(self.place(path)))
                self._read(path, facts)

    def _read(self, path: Path, facts: Mapping[str, str]) -> None:
        if facts and "kind" not in facts:
            self._known.setdefault("silent", path)

    def remarks(self) -> list[str]:
        """Lines about files that are ignored, and about files of version 0.1.0, which have no identity."""
        lines = []
        foreign = [path.relative_to(self.path).as_posix() for name in FOLDERS for path in self._listing(name).foreign]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            lines.append(f"{self.path}: {', '.join(foreign[:3])}{more} left out: not the name of a file of a run")
        if "silent" in self._known:
            lines.append(
                f"{self.path}: files of version 0.1.0, such as {self._known['silent'].name}, do not record their "
                "identity; their names are trusted"
            )
        return lines

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.manifest.exists()

    def read_manifest(self) -> dict[str, Any]:
        """Read and check the manifest.

        Raises:
            StoreError: it is missing or damaged, has another schema, or has values of other types.
        """
        check_regular(self.manifest)
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"expected a run's manifest at {self.manifest}, got {error}; restore it") from None
        if not isinstance(content, dict) or content.get("schema") not in READABLE:
            got = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise StoreError(f"expected schema {SCHEMA} in {self.manifest}, got {got}; use the version that wrote it")
        wanted = content.pop(CHECKSUM, None)
        if (wanted or content["schema"] != 1) and manifest_checksum(content) != wanted:
            raise StoreError(
                f"checksum mismatch in {self.manifest}: the manifest is damaged or was edited; restore it, or, if you "
                f"edited it on purpose, remove {CHECKSUM} and write schema 1"
            )
        check_shape(self.manifest, content)
        return content

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run against writes by other processes, and delete temporary files of killed processes.

        The same process may take the lock again. A missing folder is created.

        Raises:
            StoreError: another process holds the lock, or the folder cannot be written or holds other files.
        """
        if not self.exists():
            self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0, thread_local=False, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise StoreError(
                f"{self.path} is in use by another process; wait for it to end, or choose another folder"
            ) from None
        except OSError as error:
            raise StoreError(
                f"expected a folder that can be written at {self.path}, got {error}; choose another one"
            ) from None
        first = "listings" not in self._known
        try:
            if lock.lock_counter == 1 and not self._known.get("cleaned"):
                remove_leftovers(self.path)
                self._known["cleaned"] = True
            self._known.setdefault("listings", {})
            yield
        finally:
            if first:
                self._known.pop("listings", None)
            lock.release()

    def _refuse_foreign(self) -> None:
        """Check that the folder is new, empty or a run, and that its path is UTF-8.

        Raises:
            StoreError: it is not.
        """
        if str(self.path) != str(self.path).encode(errors="replace").decode():
            # safetensors cannot open other paths
            raise StoreError(f"expected a folder whose path is UTF-8, got {str(self.path)!a}; choose another one")
        # left by a process that was killed before it wrote its first file
        ours = (LOCK, f".{self.manifest.name}.")
        if self.path.exists() and not (
            self.path.is_dir() and all(path.name.startswith(ours) for path in self.path.iterdir())
        ):
            if self.exists():  # another process has just written the manifest, a run's first file
                return
            raise StoreError(f"expected a new or empty folder, got {self.path}; choose another one")

    def start(self, manifest: dict[str, Any], *, resume: bool) -> None:
        """Start a run in the folder, or continue the same run; on an error nothing is changed.

        Raises:
            StoreError: the folder has a run and ``resume`` is false, or the runs differ; the message names the fields.
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
        # 1 and 1.0 are equal options with different digests; the run's files carry the first one
        kept: dict[str, Any] = {name: before[name] for name in ("created", "fingerprint", "digest") if name in before}
        for kind in ("estimators", "certifiers"):
            # estimators that are not named again keep their parts, and therefore their entries
            entries = (*before.get(kind, ()), *manifest.get(kind, ()))
            kept[kind] = list({entry["estimator"]: entry for entry in entries}.values())
        if "notes" in manifest:
            # notes about epochs that are not measured again
            kept["notes"] = list(dict.fromkeys((*before.get("notes", ()), *manifest["notes"])))
        self.write_manifest({**before, **manifest, **kept, "resumed": now()})

    def check(self, manifest: dict[str, Any]) -> None:
        """Check that `start` could continue the run in the folder; nothing is written and no lock is taken.

        Raises:
            StoreError: the folder holds other files, or another run; the message names the fields.
        """
        if not self.exists():
            self._refuse_foreign()
            return
        before = self.read_manifest()
        changed = differences(before.get("fingerprint", {}), manifest["fingerprint"])
        if changed:
            raise StoreError(
                f"expected the options of the run in {self.path}, got {changed}; use them or another folder"
            )
        check_parameters(before.get("estimators", ()), manifest.get("estimators", ()))
        check_parameters(before.get("certifiers", ()), manifest.get("certifiers", ()))
        check_probes(before, manifest)
        self.check_places()
        self._check_revisions("margins", manifest.get("estimators", ()))
        self._check_revisions("bounds", manifest.get("certifiers", ()))

    def _check_revisions(self, folder: str, entries: Iterable[dict[str, Any]]) -> None:
        """Check that the estimators' revisions are those that the run was measured with.

        An estimator's revision changes when its numbers change.

        Raises:
            StoreError: they differ; the message names the estimator and both revisions.
        """
        revisions = {entry["estimator"]: entry.get("revision", 1) for entry in entries}
        for series, files in self._listing(folder).epochs.items():
            text = series.unit.estimator if series.unit else ""
            # all epochs of a unit have the same revision
            if text in revisions and files:
                revision = facts_of(files[max(files)]).get("revision", "1")
                if revision != str(revisions[text]):
                    raise StoreError(
                        f"expected `{text}` revision {revisions[text]}, got {revision} in {self.path}; "
                        "measure into a new run or remove its units"
                    )

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest with its schema and checksum."""
        whole = {**manifest, "schema": SCHEMA}
        whole[CHECKSUM] = manifest_checksum(whole)
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.manifest, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
        self._known.pop("digest", None)
