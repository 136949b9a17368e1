"""An interactive figure: panels of traces, each of which says where it belongs and what it shows."""

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

DIGITS = 5
# in a <script> element these end it or start a comment; the last two end a line in old JavaScript
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
Where = Mapping[str, object]


@dataclass(frozen=True)
class Trace:
    """One plotly trace.

    Attributes:
        plotly: the trace as plotly's JSON.
        where: run, estimator, norm, split, epoch: what the page shows and hides it by.
        say: what it shows, with numbers, for the text alternative.
    """

    plotly: dict[str, Any]
    where: Where
    say: str


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: its heading.
        label: what it is, for the text alternative.
        where: run and norm, or split: what the page shows and hides it by.
        layout: plotly's.
        ranges: the y axis's ends for choices of the figure's choosers; without them those of ``layout``.
    """

    title: str
    label: str
    where: Where
    layout: dict[str, Any]
    traces: list[Trace]
    ranges: list[tuple[Where, list[float]]] = field(default_factory=list)

    @property
    def wording(self) -> str:
        """The text alternative with every trace in it."""
        return f"{self.label}: {'; '.join(trace.say for trace in self.traces)}."


@dataclass(frozen=True)
class Chooser:
    """A choice of one value of a dimension, that all panels of a figure follow; a slider for epochs."""

    dimension: str
    label: str
    values: list[str]
    chosen: str
    slider: bool = False


@dataclass(frozen=True)
class Key:
    """A line of the legend."""

    label: str
    colour: str
    symbol: str = ""
    dash: str = "solid"
    filled: bool = True
    area: bool = False
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One figure of the page; without panels, ``reason`` says what cannot be shown."""

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
        """The text alternative of a panel as the choosers first stand."""
        chosen = {chooser.dimension: chooser.chosen for chooser in self.choosers}
        shown = [t for t in panel.traces if all(str(t.where.get(d, value)) == value for d, value in chosen.items())]
        return replace(panel, traces=shown).wording


def encode(value: object) -> str:
    """JSON that can stand in a <script> element; numbers of five digits, null where not finite."""
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
    """A name from outside for plotly, which reads some HTML and the templates' ``%{...}`` in its texts."""
    return html.escape(str(name), quote=False).replace("%{", "% {")


def number(value: float) -> str:
    """A number in a sentence."""
    return f"{value:.4g}" if math.isfinite(value) else "no number"
