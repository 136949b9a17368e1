"""Brackets of the average margin over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from harness.figures.style import PALETTE
from harness.report.figures.curves import by_norm_and_run, first_and_last, line
from harness.report.figures.graph import Graph, Key, Panel, Trace, text
from harness.report.figures.view import View, axis, column, epoch_axis, norm_name, upper
from harness.report.tables import Table
from harness.statistics.figure_tables import with_lower_bound


def brackets(view: View) -> Graph:
    """Bands from the average lower bound to the average distance, per certifier and split."""
    every = view.table("brackets")
    rows = with_lower_bound(every)
    graph = Graph(
        "brackets",
        "Brackets of the average margin",
        "From the average certified lower bound to the average of the smallest distances, over the same images. The "
        "true average is in the band. Its width changes with the network, and so may either end: the boundary has "
        "certainly moved only where the bands of two epochs do not overlap.",
        tables=[Table("brackets", "Lower bounds and smallest distances", every)],
        reason="" if len(rows) else "Brackets cannot be shown: nothing was certified.",
    )
    if graph.reason:
        return graph
    keys = [Key(name, _colour(rows, name), area=True) for name in _names(rows)] + view.keys([])
    return replace(graph, panels=by_norm_and_run(view, rows, _band), columns=view.columns, keys=keys)


def _names(rows: pd.DataFrame) -> Sequence[str]:
    return [str(name) for name in rows["certifier"].unique()]


def _colour(rows: pd.DataFrame, name: str) -> str:
    return PALETTE[_names(rows).index(name) % len(PALETTE)]


def _band(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    traces = []
    for (certifier, split), part in every[every["run"] == run].groupby(["certifier", "split"], sort=False):
        rows, colour = part.sort_values("epoch"), _colour(every, str(certifier))
        name, where = f"{certifier}, {split}", {"split": str(split)}
        red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        area = {
            "type": "scatter",
            "mode": "lines",
            "name": text(name),
            "x": [*rows["epoch"], *rows["epoch"][::-1]],
            "y": [*column(rows, "upper"), *column(rows, "lower")[::-1]],
            "fill": "toself",
            "fillcolor": f"rgba({red},{green},{blue},0.22)",
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
        traces.append(Trace(area, where, f"the band of {name}"))
        for end, words, symbol in (("lower", "lower bound", "triangle-up"), ("upper", "distance", "triangle-down")):
            x, y = list(rows["epoch"]), list(column(rows, end))
            hover = f"{words} %{{y:.4g}}, lower / distance %{{customdata[0]:.3g}}, %{{customdata[1]}} images"
            plotly = line(view, f"{name}: {words}", x, y, colour, symbol, str(split), hover)
            plotly["customdata"] = list(zip(column(rows, "tightness"), rows["images"], strict=True))
            traces.append(Trace(plotly, where, first_and_last(f"{name}, {words}", x, y)))
    layout = {
        "xaxis": epoch_axis(every["epoch"]),
        "yaxis": axis("average margin", 0, upper(column(every, "upper"))),
    }
    label = f"Average {norm_name(norm)} lower bound and distance over epochs"
    return Panel(view.heading(run, norm_name(norm)), label, {"run": run, "norm": norm}, layout, traces)
