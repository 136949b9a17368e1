"""Tables of the page: the first rows to read, all of them to sort and to save as CSV."""

from __future__ import annotations

import base64
import gzip
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from harness.store.files import as_csv

# what a reader of a test looks for first
FINDINGS_FIRST = ("claim", "verdict", "run", "estimator", "norm", "split", "measure", "epochs", "effect", "value")
FINDINGS_PRINTED = ("claim", "verdict", "estimator", "norm", "split", "measure", "epochs", "value", "low", "high")


@dataclass(frozen=True)
class Table:
    """A table under a name that is also its file's and its element's id.

    Attributes:
        first: so many rows stand in the page; all are in ``packed``.
        printed: the columns that fit on paper, where it is printed; nothing for a table that is not.
        open: whether it is shown without being asked for.
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
        """The first rows as they are read: numbers with five digits."""
        return [[shown(value) for value in row] for row in self.frame.head(self.first).itertuples(index=False)]

    @property
    def classes(self) -> list[str]:
        """Of each column: "number", which stands to the right, and "extra", which is not printed."""
        numbers = ["number" if pd.api.types.is_numeric_dtype(dtype) else "" for dtype in self.frame.dtypes]
        extra = ["extra" if self.printed and name not in self.printed else "" for name in self.columns]
        return [" ".join(filter(None, words)) for words in zip(numbers, extra, strict=True)]

    @cached_property
    def packed(self) -> str:
        """The whole table as CSV with every digit, by gzip, in base64; the same table gives the same text."""
        content = as_csv(self.frame).encode()
        return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def shown(value: object) -> str:
    """A cell; blank for what is undefined."""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None or value is pd.NA else str(value)


def findings_first(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of tests in the order that they are read in."""
    first = [column for column in FINDINGS_FIRST if column in frame]
    return frame[first + [column for column in frame if column not in first]]
