"""Heat maps: margins by true class, and the class beyond the nearest boundary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.report.figures.curves import by_norm_and_run
from harness.report.figures.graph import Chooser, Graph, Panel, Trace, number, text
from harness.report.figures.view import View, axis, column, common, epoch_axis, norm_name
from harness.report.tables import Table
from harness.statistics.figure_tables import (
    at_last_epoch,
    boundary_counts,
    class_grid,
    flow_epochs,
    row_shares,
    with_class_average,
)

EPOCHS = 12  # largest number of epochs on the slider


def classes(view: View) -> Graph:
    """Average margin of each true class over epochs."""
    every = view.table("classes")
    graph = Graph(
        "classes",
        "Average margin of each class",
        "By the true class of the images. All plots of a norm share one colour scale.",
        tables=[Table("classes", "Margins by true class", every)],
    )
    rows = with_class_average(every)
    if not len(rows):
        return replace(graph, reason="Margins of the classes cannot be shown: no image's boundary was found.")
    panels, choosers = by_norm_and_run(view, rows, _classes), view.choosers(rows)
    return replace(graph, panels=panels, columns=view.columns, choosers=choosers)


def _classes(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    ends = float(np.nanmin(column(every, "avg"))), float(np.nanmax(column(every, "avg")))
    for (estimator, split), part in rows.groupby(["estimator", "split"], sort=False):
        grid, errors, found = (class_grid(part, name) for name in ("avg", "se", "found"))
        hover = "class %{y}, epoch %{x}: %{z:.4g} ± %{customdata[0]:.2g} (%{customdata[1]} images)<extra></extra>"
        plotly = _map(grid, ends, f"{norm_name(norm)} margin", hover)
        plotly["customdata"] = np.stack([errors.to_numpy(), found.to_numpy()], axis=-1)
        last = at_last_epoch(part).sort_values("avg")
        say = (
            f"{estimator}, {split}: at epoch {last['epoch'].iloc[0]} class {last['label'].iloc[0]} is nearest "
            f"({number(last['avg'].iloc[0])}), class {last['label'].iloc[-1]} farthest ({number(last['avg'].iloc[-1])})"
        )
        traces.append(Trace(plotly, {"estimator": str(estimator), "split": str(split)}, say))
    labels = axis("true class") | {"type": "category", "autorange": "reversed"}
    # a numeric axis, because an axis of categories would give all gaps between epochs the same width
    layout = {"xaxis": epoch_axis(every["epoch"]), "yaxis": labels, "hovermode": "closest"}
    label = f"Average {norm_name(norm)} margin of each true class over epochs"
    return Panel(view.heading(run, norm_name(norm)), label, {"run": run, "norm": norm}, layout, traces)


def _map(grid: pd.DataFrame, ends: tuple[float, float], title: str, hover: str) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": grid.columns,
        "y": [str(label) for label in grid.index],
        "z": grid.to_numpy(),
        "colorscale": "Cividis",
        "zmin": ends[0],
        "zmax": ends[1],
        "colorbar": {"title": {"text": text(title), "side": "right"}, "thickness": 10, "outlinewidth": 0},
        "hovertemplate": hover,
    }


def boundary(view: View) -> Graph:
    """The class beyond the nearest boundary by predicted class, at one epoch chosen by a slider."""
    every = view.table("boundary")
    graph = Graph(
        "boundary",
        "The class beyond the nearest boundary",
        "Rows are predicted classes, columns are the classes predicted for the nearest witness. The colour is the "
        "share of the row's images.",
        tables=[Table("boundary", "Classes beyond the nearest boundary", every)],
        reason="" if len(every) else "Nearest classes cannot be shown: no image's boundary was found.",
    )
    if graph.reason:
        return graph
    shown = flow_epochs(common(every), EPOCHS)
    rows = every[every["epoch"].isin(shown)]
    slider = Chooser("epoch", "epoch", [str(epoch) for epoch in shown], str(shown[-1]), slider=True)
    notes = (
        [] if len(shown) == every["epoch"].nunique() else [f"The slider has {len(shown)} of the epochs, the table all."]
    )
    return replace(
        graph,
        panels=by_norm_and_run(view, rows, _boundary),
        columns=view.columns,
        choosers=[*view.choosers(rows), slider],
        notes=notes,
    )


def _boundary(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    labels = sorted({*every["prediction"], *every["target"]})
    for (epoch, estimator, split), part in rows.groupby(["epoch", "estimator", "split"], sort=False):
        counts = boundary_counts(part, labels).fillna(0)
        shares = row_shares(counts)
        hover = "predicted %{y}, beyond the boundary %{x}: %{customdata} images (%{z:.1%})<extra></extra>"
        plotly = _map(shares.round(3), (0.0, 1.0), "share of the row", hover)
        # cells without an image have count 0; the diagonal has none, because a witness has another class
        plotly |= {"x": [str(label) for label in labels], "customdata": counts.astype(int).to_numpy()}
        best = part.iloc[int(column(part, "count").argmax())]
        say = (
            f"{estimator}, {split}, epoch {epoch}: the most frequent pair is predicted {best['prediction']}, beyond "
            f"the boundary {best['target']}, with {best['count']} of {int(part['count'].sum())} images"
        )
        place = {"estimator": str(estimator), "split": str(split), "epoch": int(str(epoch))}
        traces.append(Trace(plotly, place, say))
    layout = {
        "xaxis": axis("class beyond the boundary") | {"type": "category"},
        "yaxis": axis("predicted class") | {"type": "category", "autorange": "reversed"},
        "hovermode": "closest",
    }
    label = f"Class beyond the nearest {norm_name(norm)} boundary by predicted class"
    return Panel(view.heading(run, norm_name(norm)), label, {"run": run, "norm": norm}, layout, traces)
