"""Data classes of an interactive figure: panels, traces, choosers and legend; and their JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.report.tables import Table

DIGITS = 5  # significant digits of numbers in the page
# characters that end a <script> element or start a comment in it; the last two end a line in old JavaScript
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
Where = Mapping[str, object]


@dataclass(frozen=True)
class Trace:
    """One plotly trace.

    Attributes:
        plotly: the trace as plotly's JSON.
        where: dimension (run, estimator, norm, split, epoch) -> value, by which the page shows and hides the trace.
        say: its contents with numbers, for the text alternative.
    """

    plotly: dict[str, Any]
    where: Where
    say: str


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: its heading.
        label: its subject, for the text alternative.
        where: dimension (run and norm, or split) -> value, by which the page shows and hides the panel.
        layout: plotly's layout.
        ranges: ends of the y axis for each choice of the figure's choosers; empty where ``layout`` holds for all.
    """

    title: str
    label: str
    where: Where
    layout: dict[str, Any]
    traces: list[Trace]
    ranges: list[tuple[Where, list[float]]] = field(default_factory=list)

    @property
    def wording(self) -> str:
        """The text alternative, with all traces."""
        return f"{self.label}: {'; '.join(trace.say for trace in self.traces)}."


@dataclass(frozen=True)
class Chooser:
    """A control for one value of a dimension, common to all panels of a figure; a slider for epochs."""

    dimension: str
    label: str
    values: list[str]
    chosen: str
    slider: bool = False


@dataclass(frozen=True)
class Key:
    """One entry of the legend."""

    label: str
    colour: str
    symbol: str = ""
    dash: str = "solid"
    filled: bool = True
    area: bool = False
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One figure of the page; without panels, ``reason`` is the sentence shown instead."""

    name: str
    title: str
    caption: str = ""
    panels: list[Panel] = field(default_factory=list)
    columns: int = 1
    choosers: list[Chooser] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    reason: str = ""

    @property
    def data(self) -> str:
        """The panels as JSON for a <script> element."""
        panels = [
            {
                "label": panel.label,
                "where": panel.where,
                "layout": panel.layout,
                "ranges": [{"where": where, "range": ends} for where, ends in panel.ranges],
                "traces": [{"where": t.where, "say": t.say, "trace": t.plotly} for t in panel.traces],
            }
            for panel in self.panels
        ]
        return encode({"panels": panels})

    def wording(self, panel: Panel) -> str:
        """The text alternative of a panel for the initial choices of the choosers."""
        chosen = {chooser.dimension: chooser.chosen for chooser in self.choosers}
        shown = [t for t in panel.traces if all(str(t.where.get(d, value)) == value for d, value in chosen.items())]
        return replace(panel, traces=shown).wording


def encode(value: object) -> str:
    """JSON that is safe inside a <script> element; numbers have five digits, and are null where not finite."""
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(UNSAFE)


def _plain(value: object) -> object:
    if isinstance(value, float | np.floating):
        # whole numbers are shorter without their ".0"
        rounded = float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
        return int(rounded) if rounded is not None and rounded.is_integer() and abs(rounded) < 1e15 else rounded
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | pd.Series | pd.Index):
        return [_plain(inner) for inner in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def text(name: object) -> str:
    """A user-given name escaped for plotly, which interprets some HTML, and ``%{...}`` of templates, in its texts."""
    return html.escape(str(name), quote=False).replace("%{", "% {")


def number(value: float) -> str:
    """A number in a sentence, with four digits."""
    return f"{value:.4g}" if math.isfinite(value) else "no number"
