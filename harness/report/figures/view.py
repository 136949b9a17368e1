"""Runs, estimators, norms and splits of a page, their colours and line styles, and helpers for axes."""

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
    """A report's content and its dimensions: runs, estimators, norms and splits."""

    content: ReportContent

    @cached_property
    def runs(self) -> list[str]:
        return [run.name for run in self.content.runs]

    @cached_property
    def estimators(self) -> list[str]:
        """In order of appearance; the envelope last."""
        names = self._values("estimator", ("summary", "margins"))
        return [name for name in names if name != ENVELOPE] + [name for name in names if name == ENVELOPE]

    @cached_property
    def norms(self) -> list[str]:
        """L2 first, L∞ second."""
        names = self._values("norm", ("summary", "margins"))
        return [name for name in NORM_NAMES if name in names] + [name for name in names if name not in NORM_NAMES]

    @cached_property
    def splits(self) -> list[str]:
        names = self._values("split", ("summary", "margins", "epochs", "reliability"))
        return list(dict.fromkeys([*names, *(split for run in self.content.runs for split in run.correctness)]))

    def _values(self, column: str, tables: Iterable[str]) -> list[str]:
        values: dict[str, None] = {}
        for run in self.content.runs:
            for name in tables:
                table: pd.DataFrame = getattr(run, name)
                if column in table:
                    values |= dict.fromkeys(str(value) for value in table[column].unique())
        return list(values)

    def table(self, name: str) -> pd.DataFrame:
        """The table of this name of all runs, with the run in its first column."""
        parts = []
        for run in self.content.runs:
            part: pd.DataFrame = getattr(run, name)
            if len(part):
                named = part.drop(columns="run", errors="ignore")
                named.insert(0, "run", run.name)
                parts.append(named)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run"])

    @property
    def columns(self) -> int:
        """Number of panels in a row: one per run, at most three; one per norm for a single run."""
        return min(len(self.runs), 3) if len(self.runs) > 1 else max(len(self.norms), 1)

    def colour(self, estimator: str) -> str:
        return ENVELOPE_COLOUR if estimator == ENVELOPE else PALETTE[self._place(estimator) % len(PALETTE)]

    def symbol(self, estimator: str) -> str:
        """The marker, shifted with every repetition of the colours so that all differ; empty for the envelope."""
        place = self._place(estimator)
        return "" if estimator == ENVELOPE else SYMBOLS[(place + place // len(PALETTE)) % len(SYMBOLS)]

    def dash(self, split: str) -> str:
        """Line style: solid for training images, dashed for test images, dotted or dash-dotted for others."""
        others = [name for name in self.splits if name not in SPLIT_DASHES]
        return SPLIT_DASHES.get(split) or OTHER_DASHES[others.index(split) % len(OTHER_DASHES)]

    def _place(self, estimator: str) -> int:
        return self.estimators.index(estimator)

    def keys(self, estimators: Sequence[str] | None = None) -> list[Key]:
        """Legend entries of estimators and splits."""
        names = self.estimators if estimators is None else estimators
        return [Key(name, self.colour(name), self.symbol(name), where={"estimator": name}) for name in names] + [
            Key(split, DARK, "circle", self.dash(split), split != "test", where={"split": split})
            for split in self.splits
        ]

    def choosers(self, rows: pd.DataFrame) -> list[Chooser]:
        """Choosers of the estimators and splits in the rows; the envelope and test images are chosen first."""
        choices = {
            "estimator": [name for name in self.estimators if (rows["estimator"] == name).any()],
            "split": [name for name in self.splits if (rows["split"] == name).any()],
        }
        first = {"estimator": ENVELOPE, "split": "test"}
        return [
            Chooser(name, name, values, first[name] if first[name] in values else values[0])
            for name, values in choices.items()
        ]

    def heading(self, run: str, *parts: str) -> str:
        """A panel's heading: the run if there are several, and the parts."""
        return " · ".join([*([run] if len(self.runs) > 1 else []), *parts]) or run


def norm_name(norm: str) -> str:
    return NORM_NAMES.get(norm, norm)


def upper(values: Iterable[float]) -> float:
    """The end of an axis that starts at 0 and holds all finite values, with 6% of room."""
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
    """The epochs that all runs have; the epochs of any run if they have none in common."""
    parts = [{int(epoch) for epoch in part["epoch"].unique()} for _, part in rows.groupby("run", sort=False)]
    return sorted(set.intersection(*parts) or set.union(*parts))


def axis(title: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """An axis with its title, and with its ends if ``high`` is given."""
    return {"title": {"text": title}} | ({} if high is None else {"range": [low, high]})


def ranges(
    rows: pd.DataFrame, by: Sequence[str], ends: Callable[[pd.DataFrame], list[float]]
) -> list[tuple[Where, list[float]]]:
    """Ends of an axis for every choice of the dimensions ``by``, common to all plots of the rows."""
    return [
        (dict(zip(by, (str(value) for value in values), strict=True)), ends(part))
        for values, part in rows.groupby(list(by), sort=False)
    ]


def column(rows: pd.DataFrame, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as float64 with NaN for missing values."""
    return rows[name].to_numpy(dtype=np.float64, na_value=np.nan)
