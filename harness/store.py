"""The run folder: a manifest and immutable parts; the directory listing is the state.

A part that exists is complete: it is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = 1
LIBRARIES = ("torch", "torchvision", "foolbox", "torchattacks", "eagerpy", "numpy", "pandas", "pyarrow", "scipy")
MARGIN_COLUMNS = (
    *("epoch", "split", "image", "label", "prediction", "correct", "confidence", "logit_margin"),
    *("estimator", "norm", "domain", "distance", "attack_distance", "status", "target", "message"),
    *("noise_retries", "forwards", "backwards", "seconds"),
)
WITNESSES_KEPT = 8  # smallest and as many largest, of epochs before the latest


class StoreError(ValueError):
    """A run folder that cannot be used as asked; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One part's work: an estimator (canonical text) in one norm."""

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

    @property
    def epochs_csv(self) -> Path:
        return self.path / "epochs.csv"

    @property
    def summary_csv(self) -> Path:
        return self.path / "summary.csv"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def margin_parts(self) -> list[Path]:
        """Finished margin parts, by epoch and unit."""
        parts = (self.path / "margins").glob("epoch-*/[!.]*.parquet")
        return sorted(parts, key=lambda path: (_epoch_of(path.parent), path.name))

    def prediction_parts(self) -> list[Path]:
        """Finished prediction parts, by epoch."""
        return sorted((self.path / "predictions").glob("epoch-[0-9]*.parquet"), key=_epoch_of)

    def witness_epochs(self, unit: Unit) -> list[int]:
        """Epochs that witnesses of the unit are kept of, in order."""
        # a unit's filename holds no wildcards: they are percent-encoded
        found = (self.path / "witnesses").glob(f"epoch-*/{unit.filename}.safetensors")
        return sorted(_epoch_of(path.parent) for path in found)

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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StoreError(f"expected a run's manifest at {self.manifest}, got {error}; restore it") from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            got = found.get("schema") if isinstance(found, dict) else type(found).__name__
            raise StoreError(f"expected schema {SCHEMA} in {self.manifest}, got {got}; use the version that wrote it")
        return found

    def start(self, manifest: dict[str, Any], *, resume: bool) -> None:
        """Begin a run here, or go on with the same one; on an error nothing is changed.

        Raises:
            StoreError: a run is here and ``resume`` is false, or the runs differ; names the fields.
        """
        if not self.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(f"expected a new or empty folder, got {self.path}; choose another one")
            try:
                self.write_manifest({"schema": SCHEMA, "created": now(), **manifest})
            except OSError as error:
                raise StoreError(
                    f"expected a folder that can be written at {self.path}, got {error}; choose another one"
                ) from None
            return
        if not resume:
            raise StoreError(f"expected a new folder, got {self.path} with a run in it; add --resume or choose another")
        before = self.read_manifest()
        changed = _differences(before.get("fingerprint", {}), manifest["fingerprint"])
        if changed:
            raise StoreError(
                f"expected the options of the run in {self.path}, got {changed}; use them or another folder"
            )
        # estimators that are not asked for again keep their parts, and so their entries
        entries = (*before.get("estimators", ()), *manifest.get("estimators", ()))
        estimators = list({entry["estimator"]: entry for entry in entries}.values())
        kept = {"created": before.get("created"), "estimators": estimators}
        self.write_manifest({**before, **manifest, **kept, "resumed": now()})

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.manifest, lambda path: path.write_text(text, encoding="utf-8"))


def _epoch_of(path: Path) -> int:
    return int(path.name.removeprefix("epoch-").partition(".")[0])


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {after.get(name)!r} (the run has {before.get(name)!r})" for name in names)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it and rename it: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # directories cannot be opened for syncing everywhere
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Replace a derived table; blank where a statistic is undefined."""
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))


def write_part(path: Path, table: pd.DataFrame, **facts: str) -> None:
    """Write one Parquet part with ``facts`` in its metadata and a checksum of every page."""
    content = pa.Table.from_pandas(table, preserve_index=False)
    content = content.replace_schema_metadata({**(content.schema.metadata or {}), **facts})
    write_atomically(
        path, lambda temporary: pq.write_table(content, temporary, compression="zstd", write_page_checksum=True)
    )


def read_part(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """A Parquet part and the facts in its metadata.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        content = pq.read_table(path, page_checksum_verification=True)
        facts = {key.decode(): value.decode() for key, value in (content.schema.metadata or {}).items()}
        return content.to_pandas(), facts
    except Exception as error:  # pyarrow and pandas raise many kinds for a damaged file
        raise StoreError(f"expected a Parquet part at {path}, got {_reason(error)}; delete it and --resume") from None


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of all parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, model: nn.Module, epoch: int) -> None:
    """Write the model's parameters and buffers as safetensors, with their checksum; tied weights once."""
    from safetensors.torch import save_model

    facts = {"epoch": str(epoch), "weights": weights_checksum(model)}
    write_atomically(path, lambda temporary: save_model(model, str(temporary), metadata=facts))


def load_checkpoint(path: Path, model: nn.Module) -> None:
    """Load a checkpoint into ``model``.

    Raises:
        StoreError: missing, damaged, or of another model.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        load_model(model, str(path))
        with safe_open(str(path), framework="pt") as handle:
            wanted = (handle.metadata() or {}).get("weights")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StoreError(
            f"expected a checkpoint of this model at {path}, got {_reason(error)}; delete it and --resume"
        ) from None
    if weights_checksum(model) != wanted:
        raise StoreError(
            f"expected weights {str(wanted)[:12]} in {path}, got others; the file is damaged: delete it and --resume"
        )


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors."""
    from safetensors.torch import save_file

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, str(temporary), metadata=facts))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors.

    Raises:
        StoreError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"expected tensors at {path}, got {error}; restore the file") from None


def save_trainer(path: Path, state: Mapping[str, object]) -> None:
    """Write a trainer's state: tensors and plain values only."""
    import torch

    write_atomically(path, lambda temporary: torch.save(dict(state), temporary))


def load_trainer(path: Path) -> dict[str, Any]:
    """Read a trainer's state; no code in it is run.

    Raises:
        StoreError: missing or damaged.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StoreError(f"expected a trainer's state at {path}, got {error}; delete it and --resume") from None
    except Exception:  # torch raises many kinds for a damaged file, most of them with advice that is none here
        state = None
    if not isinstance(state, dict):
        raise StoreError(f"expected a trainer's state at {path}, got a damaged or foreign file; delete it and --resume")
    return state


def _reason(error: Exception) -> str:
    """The first line of what a library says of a damaged file."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def concatenate(tables: Iterable[pd.DataFrame], columns: Iterable[str]) -> pd.DataFrame:
    """One table of all; with the columns also where there is none."""
    kept = [table for table in tables if len(table)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=list(columns))
