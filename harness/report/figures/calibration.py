"""Confidence against margin, reliability diagram, and calibration error over epochs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.figures.style import SUBSETS
from harness.report.figures.curves import by_norm_and_run, first_and_last, line
from harness.report.figures.graph import Chooser, Graph, Key, Panel, Trace, number, text
from harness.report.figures.view import (
    DARK,
    View,
    axis,
    column,
    common,
    epoch_axis,
    norm_name,
    ranges,
    upper,
)
from harness.report.tables import Table
from harness.statistics.figure_tables import at_last_epoch, filled_bins, with_distance

MEASURES = {
    "ece": ("expected calibration error", "#4D4D4D"),
    "overconfidence": ("mean confidence - accuracy", "#8C510A"),
}
NO_PREDICTIONS = "cannot be shown: the run kept no predictions of the whole sets."
POINTS = 2000  # largest number of marks at once
SAMPLE_COLUMNS = ["run", "epoch", "split", "estimator", "norm", "image", "correct", "confidence", "distance"]


def calibration(view: View) -> Graph:
    """Expected calibration error and overconfidence over epochs."""
    every = view.table("calibration")
    graph = Graph(
        "calibration",
        "Calibration over epochs",
        "Over the whole sets. The expected calibration error is the mean distance of confidence from accuracy over "
        "15 bins, weighted by their images; overconfidence is mean confidence minus accuracy.",
        tables=[Table("calibration", "Calibration", every)],
        reason="" if len(every) else f"Calibration {NO_PREDICTIONS}",
    )
    if graph.reason:
        return graph
    values = [value for measure in MEASURES for value in column(every, measure) if math.isfinite(value)]
    ends = 1.06 * min([0.0, *values]), upper(values)
    panels = [_calibration(view, run, every, ends) for run in view.runs]
    keys = [Key(title, colour, "circle") for title, colour in MEASURES.values()] + view.keys([])
    return replace(graph, panels=[p for p in panels if p.traces], columns=min(len(view.runs), 3), keys=keys)


def _calibration(view: View, run: str, every: pd.DataFrame, ends: tuple[float, float]) -> Panel:
    traces = []
    for split, part in every[every["run"] == run].groupby("split", sort=False):
        for measure, (title, colour) in MEASURES.items():
            x, y, name = list(part["epoch"]), list(column(part, measure)), f"{title}, {split}"
            plotly = line(view, name, x, y, colour, "circle", str(split), "%{y:.4g}")
            traces.append(Trace(plotly, {"split": str(split)}, first_and_last(name, x, y)))
    layout = {"xaxis": epoch_axis(every["epoch"]), "yaxis": axis("difference", *ends)}
    return Panel(view.heading(run, "Calibration"), "Calibration over epochs", {"run": run}, layout, traces)


def reliability(view: View) -> Graph:
    """Accuracy against confidence in bins, at one epoch chosen by a slider."""
    every = view.table("reliability")
    graph = Graph(
        "reliability",
        "Reliability diagram",
        "Accuracy of the images in each of 15 bins of confidence, over the whole sets, at the chosen epoch. On the "
        "diagonal the confidence equals the accuracy; below it the network is overconfident. Larger marks stand for "
        "more images.",
        tables=[Table("reliability", "Bins of the reliability diagram", every)],
        reason="" if len(every) else f"The reliability diagram {NO_PREDICTIONS}",
    )
    if graph.reason:
        return graph
    epochs = [str(epoch) for epoch in common(every)]
    panels = [_reliability(view, run, every[every["run"] == run]) for run in view.runs]
    return replace(
        graph,
        panels=[panel for panel in panels if panel.traces],
        columns=min(len(view.runs), 3),
        choosers=[Chooser("epoch", "epoch", epochs, epochs[-1], slider=True)],
        keys=view.keys([]),
    )


def _reliability(view: View, run: str, rows: pd.DataFrame) -> Panel:
    traces = []
    for (epoch, split), part in filled_bins(rows).groupby(["epoch", "split"], sort=False):
        x, y, counts = list(column(part, "confidence")), list(column(part, "accuracy")), column(part, "count")
        name = f"{split}, epoch {epoch}"
        hover = "confidence %{x:.3g}, accuracy %{y:.3g}, %{customdata} images"
        plotly = line(view, name, x, y, DARK, "circle", str(split), hover)
        plotly["marker"]["size"] = list(np.round(4 + 14 * np.sqrt(counts / counts.sum()), 1))
        plotly["customdata"] = list(counts.astype(int))
        say = f"{name}: accuracy {number(y[0])} at confidence {number(x[0])}, {number(y[-1])} at {number(x[-1])}"
        traces.append(Trace(plotly, {"split": str(split), "epoch": int(str(epoch))}, say))
    diagonal = {"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "line": {"width": 1, "color": "#999999"}}
    layout = {
        "xaxis": axis("confidence", 0, 1.03),
        "yaxis": axis("accuracy", 0, 1.03),
        "shapes": [diagonal | {"layer": "below"}],
        "hovermode": "closest",
    }
    return Panel(view.heading(run, "Reliability"), "Accuracy by confidence", {"run": run}, layout, traces)


def confidence(view: View) -> Graph:
    """Margin against confidence at the last epoch of each run, for a random sample of the images."""
    sample, left_out = _sample(view)
    graph = Graph(
        "confidence",
        "Margin against confidence at the last epoch",
        f"One mark per image. At most {POINTS} are drawn at once: a random sample, the same for every estimator.",
        tables=[Table("confidence", "Margins against confidence, the images drawn", sample)],
        reason="" if len(sample) else "Margins against confidence cannot be shown: no image's boundary was found.",
    )
    if graph.reason:
        return graph
    return replace(
        graph,
        panels=by_norm_and_run(view, sample, _confidence),
        columns=view.columns,
        choosers=view.choosers(sample),
        keys=[Key(subset, colour, "circle", "none") for subset, colour in SUBSETS.items()],
        notes=[f"{left_out} rows are not drawn, because no boundary was found."] if left_out else [],
    )


def _sample(view: View) -> tuple[pd.DataFrame, int]:
    """Sampled rows of the last epoch, at most `POINTS` per estimator and split; and the number of rows not found."""
    parts, left_out = [], 0
    most = POINTS // max(len(view.norms) * len(view.runs), 1)
    for run in view.content.runs:
        if not len(run.margins):
            continue
        last = at_last_epoch(run.margins)
        found = with_distance(last)
        left_out += len(last) - len(found)
        for _, rows in found.groupby("split", sort=False):
            images = np.unique(rows["image"].to_numpy())
            kept = np.random.default_rng(0).permutation(images)[:most]
            parts.append(rows[rows["image"].isin(kept)].assign(run=run.name)[SAMPLE_COLUMNS])
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=SAMPLE_COLUMNS)), left_out


def _confidence(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    for (estimator, split, correct), part in rows.groupby(["estimator", "split", "correct"], sort=False):
        subset = "correct" if correct else "incorrect"
        x, y = column(part, "confidence"), column(part, "distance")
        plotly: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "name": subset,
            "x": x,
            "y": y,
            "marker": {"color": SUBSETS[subset], "size": 5, "opacity": 0.65},
            "customdata": list(part["image"]),
            "hovertemplate": "image %{customdata}: margin %{y:.4g}, confidence %{x:.3g}<extra>%{fullData.name}</extra>",
        }
        say = f"{len(part)} {subset} {split} images by {estimator}, median margin {number(float(np.median(y)))}"
        traces.append(Trace(plotly, {"estimator": str(estimator), "split": str(split)}, say))
    layout = {
        "xaxis": axis("confidence", 0, 1.03),
        "yaxis": axis(text(f"{norm_name(norm)} margin")),
        "hovermode": "closest",
    }
    label, where = f"{norm_name(norm)} margin against confidence", {"run": run, "norm": norm}
    ends = ranges(every, ["estimator", "split"], lambda rows: [0.0, upper(column(rows, "distance"))])
    return Panel(view.heading(run, norm_name(norm)), label, where, layout, traces, ends)
