"""Ratios of estimators to the envelope, and changes of the nearest class from epoch to epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from harness.report.figures.curves import by_norm_and_run, first_and_last, line
from harness.report.figures.graph import Graph, Panel, Trace, text
from harness.report.figures.view import View, axis, column, epoch_axis, norm_name, upper
from harness.report.tables import Table
from harness.statistics.envelope import ENVELOPE
from harness.statistics.figure_tables import is_sparse, with_ratio


def ratios(view: View) -> Graph:
    """Average distance of each estimator divided by the envelope's, with its 95% band."""
    every = view.table("ratios")
    rows = with_ratio(every)
    graph = Graph(
        "ratios",
        "Estimator against the envelope",
        "Average distance of an estimator divided by the average of the smallest distances of all estimators, over the "
        "same images; 1 is the best. Bands: 95%. A ratio that changes over epochs is a bias that can be mistaken for a "
        "trend.",
        tables=[Table("ratios", "Ratios to the envelope", every)],
        reason="" if len(rows) else "Ratios to the envelope cannot be shown: they need two estimators or more.",
    )
    if graph.reason:
        return graph
    keys = view.keys([name for name in view.estimators if name != ENVELOPE])
    return replace(graph, panels=by_norm_and_run(view, rows, _ratio), columns=view.columns, keys=keys)


def _ratio(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    for (estimator, split), part in rows.groupby(["estimator", "split"], sort=False):
        where = {"estimator": str(estimator), "split": str(split)}
        colour, name = view.colour(str(estimator)), f"{estimator}, {split}"
        x, y = list(part["epoch"]), list(column(part, "ratio"))
        band = part[part["low"].notna() & part["high"].notna()]
        sparse = is_sparse(rows, str(estimator))
        if len(band) and not sparse:
            traces.append(Trace(_band(name, band, colour), where, f"with a band of 95% for {name}"))
        hover = "%{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}], %{customdata[2]} images"
        plotly = line(view, name, x, y, colour, view.symbol(str(estimator)), str(split), hover)
        plotly["customdata"] = list(zip(column(part, "low"), column(part, "high"), part["images"], strict=True))
        if sparse:
            plotly["mode"] = "markers"
        traces.append(Trace(plotly, where, first_and_last(name, x, y)))
    low = min(1.0, *(value for value in every["low"].dropna())) if every["low"].notna().any() else 1.0
    high = upper([*column(every, "high"), *column(every, "ratio")]) / 1.06
    room = max(0.05 * (high - low), 0.002)
    layout = {
        "xaxis": epoch_axis(every["epoch"]),
        "yaxis": axis("distance / envelope", low - room, high + room),
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"width": 1}}],
    }
    label = f"{norm_name(norm)} ratio of each estimator to the envelope over epochs"
    return Panel(view.heading(run, norm_name(norm)), label, {"run": run, "norm": norm}, layout, traces)


def _band(name: str, rows: pd.DataFrame, colour: str) -> dict[str, Any]:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text(name),
        "x": [*rows["epoch"], *rows["epoch"][::-1]],
        "y": [*column(rows, "low"), *column(rows, "high")[::-1]],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.16)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def changes(view: View) -> Graph:
    """Share of images with another nearest class than at the measured epoch before."""
    every = view.table("changes")
    graph = Graph(
        "changes",
        "Images with another nearest class than before",
        "Share of the images found at both epochs that have another pair of classes (predicted, beyond the boundary) "
        "than at the measured epoch before.",
        tables=[Table("changes", "Changes of the nearest class", every)],
        reason="" if len(every) else "Changes of the nearest class cannot be shown: they need two measured epochs.",
    )
    if graph.reason:
        return graph
    return replace(graph, panels=by_norm_and_run(view, every, _change), columns=view.columns, keys=view.keys())


def _change(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    for (estimator, split), part in rows.groupby(["estimator", "split"], sort=False):
        x, y = list(part["epoch"]), list(100 * column(part, "changed"))
        name, where = f"{estimator}, {split}", {"estimator": str(estimator), "split": str(split)}
        hover = "%{y:.3g}% of %{customdata} images"
        plotly = line(view, name, x, y, view.colour(str(estimator)), view.symbol(str(estimator)), str(split), hover)
        plotly["customdata"] = list(part["images"])
        traces.append(Trace(plotly, where, first_and_last(f"{name} in percent", x, y)))
    high = min(upper(100 * column(every, "changed")), 102)
    layout = {"xaxis": epoch_axis(every["epoch"]), "yaxis": axis("images changed (%)", 0, high)}
    label, place = "Images with another nearest class than before", {"run": run, "norm": norm}
    return Panel(view.heading(run, norm_name(norm)), label, place, layout, traces)
