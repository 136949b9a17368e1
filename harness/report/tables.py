"""Tables of the page: the first rows as HTML, and all rows packed, to sort and to save as CSV."""

from __future__ import annotations

import base64
import gzip
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from harness.store.tables import as_csv

# the columns of a test that stand first in its table
FINDINGS_FIRST = ("claim", "verdict", "run", "estimator", "norm", "split", "measure", "epochs", "effect", "value")
FINDINGS_PRINTED = ("claim", "verdict", "estimator", "norm", "split", "measure", "epochs", "value", "low", "high")


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: also the name of its CSV file and part of its element's id.
        first: the number of rows in the HTML; all rows are in ``packed``.
        printed: the columns that are printed on paper; empty for a table that is not printed.
        open: whether it is expanded from the start.
    """

    name: str
    title: str
    frame: pd.DataFrame
    first: int = 8
    printed: tuple[str, ...] = ()
    open: bool = False

    @property
    def columns(self) -> list[str]:
        return [str(column) for column in self.frame.columns]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the first rows; numbers have five digits."""
        return [[shown(value) for value in row] for row in self.frame.head(self.first).itertuples(index=False)]

    @property
    def classes(self) -> list[str]:
        """CSS classes per column: "number" is aligned to the right, "extra" is not printed."""
        numbers = ["number" if pd.api.types.is_numeric_dtype(dtype) else "" for dtype in self.frame.dtypes]
        extra = ["extra" if self.printed and name not in self.printed else "" for name in self.columns]
        return [" ".join(filter(None, words)) for words in zip(numbers, extra, strict=True)]

    @cached_property
    def packed(self) -> str:
        """The whole table as CSV with all digits, compressed by gzip, in base64; equal tables give equal texts."""
        content = as_csv(self.frame).encode()
        return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def shown(value: object) -> str:
    """The text of a cell; blank for NaN and missing values."""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None or value is pd.NA else str(value)


def findings_first(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of tests with the columns of `FINDINGS_FIRST` first."""
    first = [column for column in FINDINGS_FIRST if column in frame]
    return frame[first + [column for column in frame if column not in first]]
