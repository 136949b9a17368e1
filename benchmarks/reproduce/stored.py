"""The tables that `collecting` kept, by name, and the few numbers that many claims take from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.reproduce.study import Group, Study
from harness.store.identity import StoreError

# of checkpoints that a study names none of
OPTIONAL = ("free", "directions", "brackets")
NORMS, SPLITS = ("l2", "linf"), ("train", "test")


@dataclass(frozen=True)
class Stored:
    """A study and the folder of its summaries."""

    study: Study
    folder: Path
    _read: dict[Path, pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    def groups(self) -> list[Group]:
        """Those that have been collected."""
        return [group for group in self.study.groups if (self.folder / group.name / "observations.csv").exists()]

    def group(self, group: str, table: str) -> pd.DataFrame:
        """A table of a group."""
        return self._table(self.folder / group / f"{table}.csv")

    def has(self, group: str, table: str) -> bool:
        """Whether the group has a table that not every group has."""
        return (self.folder / group / f"{table}.csv").exists()

    def run(self, run: str, table: str) -> pd.DataFrame:
        """A table of a run; without rows where it is one that not every run has, or the run was not collected.

        Raises:
            StoreError: it is missing, though the run was collected.
        """
        path = self.folder / "runs" / run / f"{table}.csv"
        collected = any(run in group.runs for group in self.groups())
        if not path.exists() and (table in OPTIONAL or not collected):
            return pd.DataFrame()
        return self._table(path)

    def options(self, run: str) -> dict[str, Any]:
        """What the run was planned with."""
        return dict(self.study.runs[run].options)

    def of_training(self, group: Group, training: str) -> list[str]:
        """The group's runs of that training."""
        return [run for run in group.runs if self.options(run).get("training", "standard") == training]

    def estimators(self, run: str) -> list[str]:
        """Those that measured every epoch of the run, the paper's first."""
        own = self.run(run, "summary")
        whole = own["epoch"].nunique()
        counts = own.groupby("estimator", sort=False)["epoch"].nunique()
        return sorted((str(name) for name, count in counts.items() if count == whole), key=lambda n: n != "deepfool")

    def curve(self, run: str, estimator: str, norm: str, split: str, subset: str = "all", of: str = "avg") -> pd.Series:
        """A column of the summary by epoch."""
        own = self.run(run, "summary")
        rows = own[
            (own["estimator"] == estimator)
            & (own["norm"] == norm)
            & (own["split"] == split)
            & (own["subset"] == subset)
        ]
        return rows.set_index("epoch")[of].sort_index()

    def errors(self, run: str, split: str) -> pd.Series:
        """The error by epoch."""
        own = self.run(run, "epochs")
        return own[own["split"] == split].set_index("epoch")["error"].sort_index()

    def _table(self, path: Path) -> pd.DataFrame:
        if path not in self._read:
            try:
                self._read[path] = pd.read_csv(path)
            except (OSError, ValueError) as error:
                raise StoreError(f"expected a table at {path}, got {error}; restore it, or collect again") from None
        return self._read[path]


def number(value: float, digits: int = 3) -> str:
    """Some significant digits, without an exponent, with a real minus sign."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{places}f}".replace("-", "−")


def span(values: Iterable[float], digits: int = 3) -> str:
    """One number, or the least and the most."""
    found = [value for value in values if np.isfinite(value)]
    if not found:
        return "–"
    low, high = number(min(found), digits), number(max(found), digits)
    return low if low == high else f"{low} to {high}"
