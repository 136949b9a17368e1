"""Read and write the files of a run: atomically, with checksums that are verified when a file is read.

Tables are Parquet, tensors are safetensors, and a trainer's state is a torch file of tensors and plain values. None of
these formats contains code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from attacks.types import one_line
from harness.store.identity import (
    FACTS_OF,
    IDENTITY,
    check_identity,
    check_regular,
    check_tensors,
    expanded,
    header_of,
)
from harness.store.identity import StoreError as StoreError

if TYPE_CHECKING:
    from torch import Tensor, nn


# metadata entries of a file: the checksum of its content, and those that pyarrow and pandas write
CHECKSUM = "sha256"
FORMAT = ("pandas", "ARROW:schema")
# facts of parts, and names of tensors, that earlier versions wrote without a checksum or facts
FACTS = {"epoch", "seconds", "weights", "start"}
NAMES = {"images", "labels", "ids", "image", "witness", "distance", "label", "lower", "upper"}
# most rows of a part and most tensors of a file other than a checkpoint; reading more would take hours
ROWS, TENSORS = 10_000_000, 1_000
# names of safetensors' own temporary files, and the folders that can contain them
SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
OF_TENSORS = ("probes", "checkpoints", "witnesses", "shards", "unsound")
# a text that a spreadsheet evaluates as a formula, and the same text after quoting
FORMULA, QUOTED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: ``write`` fills a temporary file, which is synced and renamed to ``path``.

    Raises:
        StoreError: the file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {one_line(error, most=200)}; make room or give permission, then resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # some systems cannot open a directory for syncing
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing an existing one."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a derived table as CSV, replacing an existing one; undefined statistics are blank."""
    write_atomically(path, lambda temporary: temporary.write_text(as_csv(table), encoding="utf-8"))


def as_csv(table: pd.DataFrame, *, header: bool = True, float_format: str | None = None) -> str:
    """A table as CSV in which a spreadsheet evaluates no text as a formula; `from_csv` reads it back.

    A text that begins with ``= + - @``, a tab or a carriage return, possibly after single quotes, gets one more single
    quote in front. Numbers are not changed.
    """
    texts = [place for place, dtype in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(dtype)]
    table = table.copy(deep=False)
    for place in texts:
        table.isetitem(place, [_defused(value) for value in table.iloc[:, place]])
    table.columns = [_defused(name) for name in table.columns]
    return table.to_csv(index=False, header=header, float_format=float_format, lineterminator="\n")


def from_csv(path: Path) -> pd.DataFrame:
    """Read a table that `as_csv` wrote."""
    table = pd.read_csv(path)
    for name in table.columns[[not pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]]:
        table[name] = [value[1:] if isinstance(value, str) and QUOTED.match(value) else value for value in table[name]]
    return table


def _defused(value: object) -> object:
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed writers; only for the one process that writes to the folder."""
    for temporary in folder.rglob(".*tmp*"):
        of_safetensors = temporary.relative_to(folder).parts[0] in OF_TENSORS and SAFETENSORS.fullmatch(temporary.name)
        if temporary.suffix == ".tmp" or of_safetensors:
            with contextlib.suppress(OSError):
                temporary.unlink()


def facts_of(path: Path) -> dict[str, str]:
    """The facts in a file's metadata, without reading the rest; empty if they cannot be read.

    Raises:
        StoreError: the path is a pipe, a socket, a device or a folder.
    """
    check_regular(path)
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
            return {key.decode(): value.decode() for key, value in metadata.items() if key.decode() not in FORMAT}
        if path.suffix == ".safetensors":
            return expanded(header_of(path).get("__metadata__", {}))
        return _trainer(path)[1]
    except Exception:  # reading the whole file later reports the error
        return {}


def write_part(path: Path, table: pd.DataFrame, **facts: str) -> None:
    """Write a Parquet part with ``facts`` and a checksum of the whole in its metadata, and a checksum per page."""
    content = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**facts, CHECKSUM: _part_checksum(table, facts)}
    content = content.replace_schema_metadata({**(content.schema.metadata or {}), **metadata})
    write_atomically(
        path, lambda temporary: pq.write_table(content, temporary, compression="zstd", write_page_checksum=True)
    )


def read_part(path: Path, place: Mapping[str, str] | None = None) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read a Parquet part and the facts in its metadata.

    Page checksums cover the pages; the checksum of all values also covers the footer, which defines their meaning.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is damaged, has too many rows, or belongs to another place.
    """
    check_regular(path)
    try:
        rows = pq.read_metadata(path).num_rows
        if rows > ROWS:
            raise ValueError(f"{rows} rows, more than {ROWS}")
        content = pq.read_table(path, page_checksum_verification=True)
        metadata = {key.decode(): value.decode() for key, value in (content.schema.metadata or {}).items()}
        table = content.to_pandas()
    except Exception as error:  # pyarrow and pandas raise many types for a damaged file
        raise StoreError(
            f"expected a Parquet part at {path}, got {one_line(error, most=200)}; delete it and --resume"
        ) from None
    wanted = metadata.pop(CHECKSUM, None)
    facts = {key: value for key, value in metadata.items() if key not in FORMAT}
    # parts of earlier versions have facts but no checksum; an unknown fact may be a damaged name of the checksum
    earlier = bool(facts) and facts.keys() <= FACTS
    if not earlier if wanted is None else _part_checksum(table, facts) != wanted:
        raise StoreError(f"checksum mismatch in {path}: the part is damaged; delete it and --resume")
    check_identity(path, facts, place or {})
    return table, facts


def _part_checksum(table: pd.DataFrame, facts: Mapping[str, str]) -> str:
    """SHA-256 of the facts, the names and dtypes of the columns, and all values."""
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name, column in table.items():
        values = column.to_numpy()
        text = values.dtype.kind in "OUT"
        digest.update(f"{name} {'text' if text else values.dtype} {len(values)}".encode())
        digest.update("\x1f".join(map(str, values)).encode() if text else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers; of the network inside wrappers.

    Raises:
        InputError: some weights of the model are elsewhere (sharded or on the meta device).
    """
    import torch

    from attacks.isolation.unwrapping import check_whole, unwrapped

    check_whole(model)
    state = unwrapped(model).state_dict()
    return _tensors_checksum({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})


def _tensors_checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    import torch

    digest = hashlib.sha256(_facts_text(facts).encode() if facts else b"")
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _facts_text(facts: Mapping[str, str]) -> str:
    return json.dumps(dict(facts), sort_keys=True)


def save_checkpoint(path: Path, model: nn.Module, epoch: int, facts: Mapping[str, str] | None = None) -> None:
    """Write the network's parameters and buffers as safetensors, with a checksum and facts; tied weights once."""
    from safetensors.torch import save_model

    from attacks.isolation.unwrapping import unwrapped

    metadata = {**(facts or {}), "epoch": str(epoch), "weights": weights_checksum(model)}
    metadata[CHECKSUM] = hashlib.sha256(_facts_text(metadata).encode()).hexdigest()
    network = unwrapped(model)
    write_atomically(path, lambda temporary: save_model(network, str(temporary), metadata=metadata))


def load_checkpoint(path: Path, model: nn.Module, place: Mapping[str, str] | None = None) -> None:
    """Load a checkpoint into ``model``, or into the network inside its wrappers.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, is of another model, or belongs to another place.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    from attacks.isolation.unwrapping import unwrapped

    network = unwrapped(model)
    # more than any checkpoint of this model has
    check_tensors(path, 2 * len(network.state_dict()) + TENSORS)
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
        # safetensors also stores there which weights are tied
        facts = {name: value for name, value in metadata.items() if name in (*IDENTITY, "weights")}
        check_identity(path, facts, place or {})
        load_model(network, str(path))
    except StoreError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StoreError(
            f"expected a checkpoint of this model at {path}, got {one_line(error, most=200)}; delete it and --resume"
        ) from None
    wanted = facts.get("weights")
    if weights_checksum(model) != wanted:
        raise StoreError(f"checksum mismatch in {path}: the weights are damaged; delete it and --resume")
    # checkpoints of version 0.1.0 have no checksum of their facts
    digest = hashlib.sha256(_facts_text(facts).encode()).hexdigest()
    if metadata.get(CHECKSUM, "" if "kind" in facts else digest) != digest:
        raise StoreError(f"checksum mismatch in {path}: the metadata is damaged; delete it and --resume")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write named tensors as safetensors, with facts and a checksum of both."""
    from safetensors.torch import save_file

    dense = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = _facts_text({**facts, CHECKSUM: _tensors_checksum(dense, facts)})
    # one entry: safetensors writes several in random order, but the same tensors should give the same bytes
    write_atomically(path, lambda temporary: save_file(dense, str(temporary), metadata={FACTS_OF: text}))


def load_tensors(path: Path, place: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Read named tensors.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, or belongs to another place.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_tensors(path, TENSORS)
    try:
        tensors = load_file(str(path))
        with safe_open(str(path), framework="pt") as handle:
            facts = expanded(handle.metadata() or {})
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"expected tensors at {path}, got {one_line(error, most=200)}; restore the file, or delete it and --resume"
        ) from None
    # files of earlier versions have no facts, but these names of tensors
    earlier = not facts and {name.rpartition(".")[2] for name in tensors} <= NAMES
    wanted = facts.pop(CHECKSUM, None)
    if not earlier and wanted != _tensors_checksum(tensors, facts):
        raise StoreError(
            f"checksum mismatch in {path}: the tensors are damaged; restore the file, or delete it and --resume"
        )
    check_identity(path, facts, place or {})
    return tensors


def save_trainer(path: Path, state: Mapping[str, object], **facts: str) -> None:
    """Write a trainer's state (tensors and plain values only) with facts."""
    import torch

    def save(temporary: Path) -> None:
        try:
            torch.save({**state, "facts": facts}, temporary)
        except RuntimeError as error:  # torch raises it when the disk is full
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error

    write_atomically(path, save)


def load_trainer(path: Path, place: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a trainer's state; no code in the file is run.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, or belongs to another place.
    """
    state, facts = _trainer(path)
    check_identity(path, facts, place or {})
    return state


def _trainer(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A trainer's state and its facts."""
    import torch

    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums that it writes
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StoreError(f"expected a trainer's state at {path}, got {error}; delete it and --resume") from None
    except Exception:  # torch raises many types for a damaged file, most with advice that does not apply
        state = None
    # version 0.1.0 wrote no facts
    facts = state.pop("facts", {}) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(facts, dict) or state.keys() != {"epoch", "optimizer"}:
        raise StoreError(f"expected a trainer's state at {path}, got a damaged or foreign file; delete it and --resume")
    return state, {**facts, "epoch": str(state["epoch"])}


def concatenate(tables: Iterable[pd.DataFrame], columns: Iterable[str]) -> pd.DataFrame:
    """One table of all non-empty tables; an empty table with ``columns`` if there is none."""
    kept = [table for table in tables if len(table)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=list(columns))
