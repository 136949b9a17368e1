"""All tables of a study in one Parquet file; each row names its table and its group or run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from harness.store.files import write_atomically
from harness.store.identity import StoreError

# group or run, table
Key = tuple[str, str]
OF, TABLE = "of", "table"
# in the file's metadata: table -> its columns
COLUMNS = b"columns"


def read_tables(path: Path) -> dict[Key, pd.DataFrame]:
    """Every table that has rows, in the order of the file.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        whole = pq.read_table(path)
        columns = json.loads(whole.schema.metadata[COLUMNS])
        return {key: rows.select(columns[key[1]]).to_pandas() for key, rows in _parts(whole)}
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow raises the first two
        raise StoreError(f"expected a study's tables at {path}, got {error}; restore it, or collect again") from None


def write_tables(path: Path, tables: Mapping[Key, pd.DataFrame]) -> None:
    """Write the tables that have rows, floats with six significant digits."""
    columns: dict[str, dict[str, None]] = {}
    parts = []
    for (of, name), table in tables.items():
        if len(table):
            columns.setdefault(name, {}).update(dict.fromkeys(table.columns))
            parts.append(_arrow(pd.DataFrame({TABLE: name, OF: of} | dict(table.items()))))
    whole = pa.concat_tables(parts, promote_options="permissive")
    fields = [field.with_type(pa.float64()) if pa.types.is_null(field.type) else field for field in whole.schema]
    said = {COLUMNS: json.dumps({name: list(own) for name, own in columns.items()})}
    floats = [field.name for field in fields if pa.types.is_floating(field.type)]
    others = [field.name for field in fields if field.name not in floats]
    write_atomically(
        path,
        lambda temporary: pq.write_table(
            whole.cast(pa.schema(fields, said)),
            temporary,
            compression="zstd",
            compression_level=19,
            use_dictionary=others,
            use_byte_stream_split=floats,
        ),
    )


def _parts(whole: pa.Table) -> Iterator[tuple[Key, pa.Table]]:
    start = 0
    for key, rows in groupby(zip(whole[OF].to_pylist(), whole[TABLE].to_pylist(), strict=True)):
        length = sum(1 for _ in rows)
        yield key, whole.slice(start, length)
        start += length


def _arrow(table: pd.DataFrame) -> pa.Table:
    """The table; a column without values takes its type from other tables."""
    arrays = {}
    for name, column in table.items():
        if column.isna().all():
            arrays[name] = pa.nulls(len(table))
        elif pd.api.types.is_float_dtype(column):
            arrays[name] = pa.array(column.map(_rounded), from_pandas=True)
        elif isinstance(column.dtype, pd.CategoricalDtype):
            arrays[name] = pa.array(column.astype(object), from_pandas=True)
        else:
            arrays[name] = pa.array(column, from_pandas=True)
    return pa.table(arrays)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
