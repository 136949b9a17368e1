"""Read and write tables: Parquet parts, with checksums that are verified when a part is read, and CSV."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.types import one_line
from harness.store.files import write_atomically
from harness.store.identity import CHECKSUM, FORMAT, StoreError, check_identity, check_regular

# facts of parts that earlier versions wrote without a checksum
FACTS = {"epoch", "seconds", "weights", "start"}
# most rows of a part; reading more would take hours
ROWS = 10_000_000
# a text that a spreadsheet evaluates as a formula, and the same text after quoting
FORMULA, QUOTED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")


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


def concatenate(tables: Iterable[pd.DataFrame], columns: Iterable[str]) -> pd.DataFrame:
    """One table of all non-empty tables; an empty table with ``columns`` if there is none."""
    kept = [table for table in tables if len(table)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=list(columns))
