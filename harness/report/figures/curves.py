"""Curves over epochs: errors, average margins, and average margins of correct and incorrect images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from harness.figures.style import SUBSETS
from harness.report.figures.graph import Graph, Key, Panel, Trace, number, text
from harness.report.figures.view import DARK, View, axis, column, epoch_axis, norm_name, ranges, upper
from harness.report.tables import Table
from harness.statistics.envelope import ENVELOPE
from harness.statistics.figure_tables import is_sparse, subset_averages

NO_MARGINS = "Average margins cannot be shown: no image's boundary was found."


def line(
    view: View, name: str, x: Sequence[float], y: Sequence[float], colour: str, symbol: str, split: str, hover: str
) -> dict[str, Any]:
    """A plotly line: solid for training images, dashed with open markers for test images; no markers if no symbol."""
    ends = {"color": "#FFFFFF" if split == "test" else colour, "line": {"color": colour, "width": 1.2}}
    return {
        "type": "scatter",
        "mode": "lines+markers" if symbol or len(x) == 1 else "lines",
        "name": text(name),
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "dash": view.dash(split), "width": 1.8 if symbol else 2.6},
        "marker": {"symbol": symbol or "circle", "size": 5, **ends},
        "hovertemplate": hover + "<extra>%{fullData.name}</extra>",
    }


def first_and_last(name: str, x: Sequence[float], y: Sequence[float]) -> str:
    """First and last finite value of a curve as text."""
    ends = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not ends:
        return f"{name}: no number"
    (first, low), (last, high) = ends[0], ends[-1]
    return f"{name} {number(low)} at epoch {first:g}" + (f", {number(high)} at epoch {last:g}" if len(ends) > 1 else "")


def by_norm_and_run(
    view: View, rows: pd.DataFrame, make: Callable[[View, str, str, pd.DataFrame], Panel]
) -> list[Panel]:
    """One panel per norm and run, without panels that have no trace.

    ``make`` gets the view, the run, the norm and the norm's rows of all runs.
    """
    if not len(rows):
        return []
    panels = [make(view, run, norm, rows[rows["norm"] == norm]) for norm in view.norms for run in view.runs]
    return [panel for panel in panels if panel.traces]


def margins(view: View) -> Graph:
    """Error, and average margin with its standard error (Mickisch et al. 2020, Figures 1, 2, 7, 8 and 9)."""
    summary, epochs = view.table("summary"), view.table("epochs")
    rows = _drawn(summary, ["all"])
    graph = Graph(
        "margins",
        "Error and average margin over epochs",
        "Bars are standard errors by the paper's formula. The margin is the distance to the boundary of the predicted "
        "class, averaged over the images found; the hover gives their number. Unit: pixel range = 1. Epoch 0 is the "
        "network before its first update.",
        tables=[
            Table("summary", "Averages, standard errors and quantiles", summary),
            Table("epochs", "Loss and error", epochs),
        ],
        reason=NO_MARGINS if not len(rows) and not len(epochs) else "",
    )
    if graph.reason:
        return graph
    panels = [_errors(view, run, epochs[epochs["run"] == run], epochs) for run in view.runs if len(epochs)]
    panels += by_norm_and_run(view, rows, _by_estimator)
    kept = [panel for panel in panels if panel.traces]
    notes = [] if len(epochs) else ["There is no error panel: the run kept no predictions."]
    if not len(rows):
        notes.append(NO_MARGINS)
    columns = len(view.runs) if len(view.runs) in (2, 3) else min(3, len(kept))
    return replace(graph, panels=kept, columns=columns, keys=view.keys(), notes=notes)


def subsets(view: View) -> Graph:
    """Average margin of correctly and incorrectly classified images (Figures 4, 6 and 10)."""
    summary = view.table("summary")
    rows = _drawn(summary, list(SUBSETS))
    graph = Graph(
        "subsets",
        "Average margin of correctly and incorrectly classified images",
        "The images are sorted again at every epoch, so a curve also moves when images change sides.",
        tables=[Table("summary", "Averages, standard errors and quantiles", summary)],
        reason="" if len(rows) else NO_MARGINS,
    )
    if graph.reason:
        return graph
    notes = [
        f"No {subset} image was measured: its line is missing."
        for subset in SUBSETS
        if not (rows["subset"] == subset).any()
    ]
    return replace(
        graph,
        panels=by_norm_and_run(view, rows, _by_subset),
        columns=view.columns,
        choosers=view.choosers(rows)[:1],
        keys=[Key(subset, colour, "circle") for subset, colour in SUBSETS.items()] + view.keys([]),
        notes=notes,
    )


def _drawn(summary: pd.DataFrame, chosen: list[str]) -> pd.DataFrame:
    """Averages of the subsets, without the gaps."""
    rows = subset_averages(summary, chosen)
    return rows[rows["found"] > 0] if len(rows) else rows


def _errors(view: View, run: str, rows: pd.DataFrame, every: pd.DataFrame) -> Panel:
    traces = []
    for split, part in rows.groupby("split", sort=False):
        x, y = list(part["epoch"]), list(100 * column(part, "error"))
        plotly = line(view, str(split), x, y, DARK, "circle", str(split), "%{y:.4g}%")
        traces.append(Trace(plotly, {"split": str(split)}, first_and_last(f"{split} error in percent", x, y)))
    layout = {"xaxis": epoch_axis(every["epoch"]), "yaxis": axis("error (%)", 0, upper(100 * column(every, "error")))}
    return Panel(view.heading(run, "Error"), "Error over epochs", {"run": run}, layout, traces)


def _by_estimator(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    # the envelope first, so that it is drawn below estimators that it may equal
    for (estimator, split), part in sorted(rows.groupby(["estimator", "split"], sort=False), key=_not_envelope):
        name, colour = f"{estimator}, {split}", view.colour(str(estimator))
        traces.append(_average(view, name, part, colour, view.symbol(str(estimator)), _mode(rows, str(estimator))))
    return _averages(view, run, norm, every, traces)


def _by_subset(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    for (estimator, split, subset), part in rows.groupby(["estimator", "split", "subset"], sort=False):
        mode = _mode(rows, str(estimator))
        traces.append(_average(view, f"{subset}, {split}", part, SUBSETS[str(subset)], "circle", mode))
    panel = _averages(view, run, norm, every, traces)
    return replace(panel, ranges=ranges(every, ["estimator"], lambda rows: [0.0, _highest(rows)]))


def _mode(rows: pd.DataFrame, estimator: str) -> str:
    """The plotly mode "markers" for a sparse estimator; empty for the mode that `line` chooses."""
    return "markers" if is_sparse(rows, estimator) else ""


def _average(view: View, name: str, rows: pd.DataFrame, colour: str, symbol: str, mode: str) -> Trace:
    estimator, split = str(rows["estimator"].iloc[0]), str(rows["split"].iloc[0])
    x, y, errors = list(rows["epoch"]), list(column(rows, "avg")), list(column(rows, "se"))
    plotly = line(view, name, x, y, colour, symbol, split, "%{y:.4g} ± %{customdata[0]:.2g} (%{customdata[1]} images)")
    plotly["mode"] = mode or plotly["mode"]
    plotly["customdata"] = list(zip(errors, rows["found"], strict=True))
    plotly["error_y"] = {"type": "data", "array": errors, "thickness": 0.9, "width": 2}
    return Trace(plotly, {"estimator": estimator, "split": split}, first_and_last(name, x, y))


def _not_envelope(group: tuple[Any, pd.DataFrame]) -> bool:
    return bool(group[0][0] != ENVELOPE)


def _highest(rows: pd.DataFrame) -> float:
    return upper(column(rows, "avg") + column(rows.fillna({"se": 0.0}), "se"))


def _averages(view: View, run: str, norm: str, every: pd.DataFrame, traces: list[Trace]) -> Panel:
    title = f"average {norm_name(norm)} margin"
    layout = {"xaxis": epoch_axis(every["epoch"]), "yaxis": axis(text(title), 0, _highest(every))}
    return Panel(
        view.heading(run, f"{norm_name(norm)} margin"),
        f"{title} over epochs",
        {"run": run, "norm": norm},
        layout,
        traces,
    )
