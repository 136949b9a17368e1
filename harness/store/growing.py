"""A table that grows part by part and reads each part once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.store.tables import as_csv, concatenate


class GrowingTable:
    """The rows of many parts in one table; hundreds of small tables would take a hundred times the memory."""

    def __init__(self, columns: Sequence[str], rows_of: Callable[[Path], pd.DataFrame]) -> None:
        """Prepare; ``rows_of`` reads the rows of a part, with ``columns``."""
        self._rows_of, self._columns = rows_of, list(columns)
        self._known: dict[Path, int] = {}
        self._table = pd.DataFrame(columns=self._columns)
        self._part = np.empty(0, dtype=int)
        self._lines: list[str] = []

    def of(self, parts: Sequence[Path]) -> pd.DataFrame:
        """The rows of these parts, in their order."""
        new = [path for path in parts if path not in self._known]
        tables = [self._rows_of(path) for path in new]
        numbers = np.arange(len(self._lines), len(self._lines) + len(new))
        self._known |= dict(zip(new, numbers.tolist(), strict=True))
        self._lines += [as_csv(table, header=False) for table in tables]
        self._part = np.concatenate([self._part, np.repeat(numbers, [len(table) for table in tables])])
        self._table = concatenate([self._table, *tables], self._columns)
        # a part may come between earlier ones, or be deleted
        place = np.full(len(self._lines), -1)
        place[[self._known[path] for path in parts]] = range(len(parts))
        order = np.argsort(place[self._part], kind="stable")
        return self._table.iloc[order[place[self._part][order] >= 0]].reset_index(drop=True)

    def csv(self, parts: Sequence[Path]) -> str:
        """The rows of these parts as CSV; `of` was called with all of them before. Each row is formatted once."""
        head = ",".join(self._columns) + "\n"
        return head + "".join(self._lines[self._known[path]] for path in parts)

    def forget(self, path: Path) -> None:
        """Read the part again at the next call, as it was rewritten."""
        self._known.pop(path, None)
