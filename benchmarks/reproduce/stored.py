"""Read the stored tables by name, and numbers that several claims use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.reproduce.study import Group, Study
from benchmarks.reproduce.tables import Key, read_tables
from harness.store.identity import StoreError

FILE = "study.parquet"
# tables without rows where the study asks for no certificates, free margins or random directions
OPTIONAL = ("free", "directions", "brackets", "proved")
NORMS, SPLITS = ("l2", "linf"), ("train", "test")


@dataclass(frozen=True)
class Stored:
    """A study and the folder of its summaries."""

    study: Study
    folder: Path

    def groups(self) -> list[Group]:
        """The collected groups."""
        return [group for group in self.study.groups if (group.name, "observations") in self._tables]

    def group(self, group: str, table: str) -> pd.DataFrame:
        """A table of a group; empty if the table is optional and missing.

        Raises:
            StoreError: it is missing.
        """
        return self._table((group, table), needed=table not in OPTIONAL)

    def run(self, run: str, table: str) -> pd.DataFrame:
        """A table of a run; empty if the table is optional and missing, or the run was not collected.

        Raises:
            StoreError: it is missing, though the run was collected.
        """
        collected = any(run in group.runs for group in self.groups())
        return self._table((run, table), needed=collected and table not in OPTIONAL)

    def config(self, run: str) -> dict[str, Any]:
        """The configuration in the run's manifest."""
        return dict(json.loads(self.run(run, "manifest")["manifest"].item())["config"])

    def options(self, run: str) -> dict[str, Any]:
        """The planned options of the run."""
        return dict(self.study.runs[run].options)

    def of_training(self, group: Group, training: str) -> list[str]:
        """The runs of a group with this training."""
        return [run for run in group.runs if self.options(run).get("training", "standard") == training]

    def estimators(self, run: str) -> list[str]:
        """The estimators measured at every epoch of the run, the paper's first."""
        own = self.run(run, "summary")
        whole = own["epoch"].nunique()
        counts = own.groupby("estimator", sort=False)["epoch"].nunique()
        return sorted((str(name) for name, count in counts.items() if count == whole), key=lambda n: n != "deepfool")

    def curve(self, run: str, estimator: str, norm: str, split: str, subset: str = "all", of: str = "avg") -> pd.Series:
        """A column of the summary by epoch."""
        whole = self.run(run, "summary")
        if run not in self._curves:
            subsets = whole.sort_values("epoch").set_index("epoch").groupby(["estimator", "norm", "split", "subset"])
            self._curves[run] = dict(list(subsets))
        rows = self._curves[run].get((estimator, norm, split, subset))
        return whole.iloc[:0].set_index("epoch")[of] if rows is None else rows[of]

    def errors(self, run: str, split: str) -> pd.Series:
        """The error by epoch."""
        own = self.run(run, "epochs")
        return own[own["split"] == split].set_index("epoch")["error"].sort_index()

    def _table(self, key: Key, *, needed: bool) -> pd.DataFrame:
        if needed and key not in self._tables:
            raise StoreError(
                f"expected a table {key[1]} of {key[0]} in {self.folder / FILE}, got none; restore it, or collect again"
            )
        return self._tables.get(key, pd.DataFrame())

    @cached_property
    def _curves(self) -> dict[str, dict[Any, pd.DataFrame]]:
        return {}

    @cached_property
    def _tables(self) -> dict[Key, pd.DataFrame]:
        return read_tables(self.folder / FILE)


def number(value: float, digits: int = 3) -> str:
    """Format with significant digits, without an exponent, with a Unicode minus sign."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{places}f}".replace("-", "−")


def span(values: Iterable[float], digits: int = 3) -> str:
    """Format one number, or the smallest and the largest."""
    found = [value for value in values if np.isfinite(value)]
    if not found:
        return "–"
    low, high = number(min(found), digits), number(max(found), digits)
    return low if low == high else f"{low} to {high}"
