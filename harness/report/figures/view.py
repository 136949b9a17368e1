"""What all figures of a page share: its runs, estimators, norms and splits, and how each of them looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from harness.figures.style import ENVELOPE_COLOUR, PALETTE
from harness.report.content import ReportContent
from harness.report.figures.graph import Chooser, Key, Where
from harness.statistics.envelope import ENVELOPE

NORM_NAMES = {"l2": "L₂", "linf": "L∞"}
SYMBOLS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross")
SPLIT_DASHES = {"train": "solid", "test": "dash"}
OTHER_DASHES = ("dot", "dashdot")
DARK = "#222222"


@dataclass(frozen=True)
class View:
    """A report's content and the dimensions that its figures are shown by."""

    content: ReportContent

    @cached_property
    def runs(self) -> list[str]:
        return [run.name for run in self.content.runs]

    @cached_property
    def estimators(self) -> list[str]:
        """By appearance; the envelope last."""
        found = self._values("estimator", ("summary", "margins"))
        return [name for name in found if name != ENVELOPE] + [name for name in found if name == ENVELOPE]

    @cached_property
    def norms(self) -> list[str]:
        """L2 first, L∞ second."""
        found = self._values("norm", ("summary", "margins"))
        return [n for n in NORM_NAMES if n in found] + [n for n in found if n not in NORM_NAMES]

    @cached_property
    def splits(self) -> list[str]:
        found = self._values("split", ("summary", "margins", "epochs", "reliability"))
        return list(dict.fromkeys([*found, *(split for run in self.content.runs for split in run.correctness)]))

    def _values(self, column: str, tables: Iterable[str]) -> list[str]:
        found: dict[str, None] = {}
        for run in self.content.runs:
            for name in tables:
                table: pd.DataFrame = getattr(run, name)
                if column in table:
                    found |= dict.fromkeys(str(value) for value in table[column].unique())
        return list(found)

    def table(self, name: str) -> pd.DataFrame:
        """A table of all runs, with the run in its first column."""
        parts = []
        for run in self.content.runs:
            part: pd.DataFrame = getattr(run, name)
            if len(part):
                own = part.drop(columns="run", errors="ignore")
                own.insert(0, "run", run.name)
                parts.append(own)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run"])

    @property
    def columns(self) -> int:
        """Runs side by side; the norms of a single run side by side."""
        return min(len(self.runs), 3) if len(self.runs) > 1 else max(len(self.norms), 1)

    def colour(self, estimator: str) -> str:
        return ENVELOPE_COLOUR if estimator == ENVELOPE else PALETTE[self._place(estimator) % len(PALETTE)]

    def symbol(self, estimator: str) -> str:
        """The marker; none for the envelope. Shifted in every round of colours, so that no two look the same."""
        place = self._place(estimator)
        return "" if estimator == ENVELOPE else SYMBOLS[(place + place // len(PALETTE)) % len(SYMBOLS)]

    def dash(self, split: str) -> str:
        """Solid for training images, dashed for test images, dotted and dash-dotted in turn for others."""
        others = [name for name in self.splits if name not in SPLIT_DASHES]
        return SPLIT_DASHES.get(split) or OTHER_DASHES[others.index(split) % len(OTHER_DASHES)]

    def _place(self, estimator: str) -> int:
        return self.estimators.index(estimator)

    def keys(self, estimators: Sequence[str] | None = None) -> list[Key]:
        """The legend of lines by estimator and split."""
        names = self.estimators if estimators is None else estimators
        return [Key(name, self.colour(name), self.symbol(name), where={"estimator": name}) for name in names] + [
            Key(split, DARK, "circle", self.dash(split), split != "test", where={"split": split})
            for split in self.splits
        ]

    def choosers(self, rows: pd.DataFrame) -> list[Chooser]:
        """A choice of the estimator and of the split, of those in the rows; the envelope and test images first."""
        found = {
            "estimator": [name for name in self.estimators if (rows["estimator"] == name).any()],
            "split": [name for name in self.splits if (rows["split"] == name).any()],
        }
        first = {"estimator": ENVELOPE, "split": "test"}
        return [
            Chooser(name, name, values, first[name] if first[name] in values else values[0])
            for name, values in found.items()
        ]

    def heading(self, run: str, *parts: str) -> str:
        """A panel's heading: the run where there are several, and what it shows."""
        return " · ".join([*([run] if len(self.runs) > 1 else []), *parts]) or run


def norm_name(norm: str) -> str:
    return NORM_NAMES.get(norm, norm)


def upper(values: Iterable[float]) -> float:
    """The end of an axis from 0 that holds all finite values."""
    finite = [value for value in values if math.isfinite(value)]
    return 1.06 * max(finite, default=1.0) or 1.0


def epoch_axis(epochs: Iterable[int]) -> dict[str, Any]:
    """The axis of epochs, with room for the markers."""
    every = [int(epoch) for epoch in epochs]
    low, high = min(every, default=0), max(every, default=1)
    room = max(0.03 * (high - low), 0.3)
    axis: dict[str, Any] = {"title": {"text": "epoch"}, "range": [low - room, high + room]}
    axis["unifiedhovertitle"] = {"text": "epoch %{x}"}
    return axis | ({"dtick": 1} if high - low <= 8 else {"nticks": 8})


def common(rows: pd.DataFrame) -> list[int]:
    """The epochs that all runs have rows of; of any run where there is none such."""
    parts = [{int(epoch) for epoch in part["epoch"].unique()} for _, part in rows.groupby("run", sort=False)]
    return sorted(set.intersection(*parts) or set.union(*parts))


def axis(title: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """An axis with its title, and its ends where they are given."""
    return {"title": {"text": title}} | ({} if high is None else {"range": [low, high]})


def ranges(
    rows: pd.DataFrame, by: Sequence[str], ends: Callable[[pd.DataFrame], list[float]]
) -> list[tuple[Where, list[float]]]:
    """The ends of an axis for every choice of the dimensions ``by``: the same in all plots of the rows."""
    return [
        (dict(zip(by, (str(value) for value in values), strict=True)), ends(part))
        for values, part in rows.groupby(list(by), sort=False)
    ]


def column(rows: pd.DataFrame, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as floats."""
    return rows[name].to_numpy(dtype=np.float64, na_value=np.nan)
