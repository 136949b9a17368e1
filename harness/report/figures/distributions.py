"""Histograms of margins at chosen epochs, correct and incorrect images apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.figures.style import SUBSETS
from harness.report.figures.graph import Graph, Key, Panel, Trace, number, text
from harness.report.figures.view import View, axis, column, norm_name, ranges, upper
from harness.report.tables import Table
from harness.statistics.figure_tables import at_nearest_epochs, bin_counts, bin_edges, with_distance

EPOCHS = (10, 20, 40)  # as in Figure 3 of the paper
BINS = 50
COLUMNS = ["run", "epoch", "split", "estimator", "norm", "subset", "low", "high", "count"]


def distributions(view: View) -> Graph:
    """Margin distributions of correct and incorrect images (Figures 3 and 11): rows are runs, columns epochs."""
    parts = (at_nearest_epochs(run.margins, EPOCHS).assign(run=run.name) for run in view.content.runs)
    chosen = [part for part in parts if len(part)]
    graph = Graph(
        "distributions",
        "Distribution of margins",
        "Each bar is a share of the correct, or of the incorrect, images found at that epoch; the hover gives their "
        "number. The bins are the same in all plots of a norm. The last bin also holds all larger distances.",
        reason="" if chosen else "Distributions cannot be shown: no image was measured.",
    )
    if graph.reason:
        return graph
    rows = pd.concat(chosen, ignore_index=True)
    found = with_distance(rows)
    if not len(found):
        return replace(graph, reason="Distributions cannot be shown: no image's boundary was found.")
    bins = pd.DataFrame(list(_count(found)), columns=COLUMNS)
    missing = len(rows) - len(found)
    return replace(
        graph,
        panels=_panels(view, bins),
        columns=epochs if (epochs := int(bins.groupby("run")["epoch"].nunique().max())) > 1 else view.columns,
        choosers=view.choosers(found),
        keys=[Key(subset, colour, area=True) for subset, colour in SUBSETS.items()],
        notes=[f"{missing} of {len(rows)} distances were not found and are in no bin."] if missing else [],
        tables=[Table("distributions", "Bins of the distributions", bins)],
    )


def _count(found: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    """Rows of `COLUMNS`; bins from 0 to the 99th percentile of the norm."""
    for norm, same in found.groupby("norm", sort=False):
        edges = bin_edges(float(np.quantile(column(same, "distance"), 0.99)), BINS)
        keys = ["run", "epoch", "split", "estimator", "correct"]
        for (run, epoch, split, estimator, correct), part in same.groupby(keys, sort=False):
            counts = bin_counts(column(part, "distance"), edges)
            subset = "correct" if correct else "incorrect"
            for low, high, count in zip(edges, edges[1:], counts, strict=False):
                yield run, epoch, split, estimator, norm, subset, float(low), float(high), int(count)


def _panels(view: View, bins: pd.DataFrame) -> list[Panel]:
    totals = bins.groupby([name for name in COLUMNS if name not in ("low", "high", "count")])["count"].transform("sum")
    shares = bins.assign(share=100 * bins["count"] / totals)
    panels = []
    for norm in view.norms:
        every = shares[shares["norm"] == norm]
        ends = ranges(every, ["estimator", "split"], lambda rows: [0.0, upper(rows["share"])])
        for run in view.runs:
            for epoch, rows in every[every["run"] == run].groupby("epoch", sort=True):
                layout = {
                    "barmode": "overlay",
                    "bargap": 0,
                    "xaxis": axis(text(f"{norm_name(norm)} margin"), 0, float(every["high"].max())),
                    "yaxis": axis("images (%)"),
                }
                label = f"Distribution of {norm_name(norm)} margins at epoch {epoch}"
                traces = [_bars(part) for _, part in rows.groupby(["estimator", "split", "subset"], sort=False)]
                title = view.heading(run, norm_name(norm), f"epoch {epoch}")
                panels.append(Panel(title, label, {"run": run, "norm": norm}, layout, traces, ends))
    return panels


def _bars(rows: pd.DataFrame) -> Trace:
    first = rows.iloc[0]
    subset, total = str(first["subset"]), int(rows["count"].sum())
    plotly: dict[str, Any] = {
        "type": "bar",
        "name": subset,
        "x": (rows["low"] + rows["high"]) / 2,
        "y": rows["share"],
        "marker": {"color": SUBSETS[subset], "opacity": 0.62},
        "customdata": rows["count"],
        "hovertemplate": f"%{{customdata}} of {total} images (%{{y:.3g}}%)<extra>%{{fullData.name}}</extra>",
    }
    peak = rows.iloc[int(column(rows, "count").argmax())]
    say = (
        f"{total} {subset} {first['split']} images by {first['estimator']}, most of them between "
        f"{number(peak['low'])} and {number(peak['high'])}"
    )
    return Trace(plotly, {"estimator": str(first["estimator"]), "split": str(first["split"])}, say)
