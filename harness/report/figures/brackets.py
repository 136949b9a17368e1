"""Lower bounds in the report: the bands, what is certain, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from harness.figures.style import PALETTE
from harness.report.content import ReportContent
from harness.report.figures.curves import by_norm_and_run, first_and_last, line
from harness.report.figures.graph import Graph, Key, Panel, Trace, text
from harness.report.figures.view import View, axis, column, epoch_axis, norm_name, upper
from harness.report.tables import Table
from harness.statistics.brackets import TIGHT

CLAIMS = {
    "decline": "standard training moves the boundary closer",
    "level": "adversarial training keeps it farther",
    "misclassified images closer": "misclassified images are closer",
}
CERTAIN = {
    "holds": "holds for these images whatever their margins are between the bounds",
    "does not hold": "does not hold for these images, whatever their margins are between the bounds",
    "open": "is open between the bounds",
}


def bracket_sentences(brackets: pd.DataFrame, proofs: pd.DataFrame) -> list[str]:
    """How tight the brackets are, how many images moved for certain, and which observations stand, on test images.

    Args:
        brackets: `harness.statistics.brackets.bracket_table`, with the run. proofs: `proved`.
    """
    lines = []
    for (run, certifier, norm), rows in _tests(brackets).groupby(["run", "certifier", "norm"], sort=False):
        ordered = rows.sort_values("epoch")
        first, last = ordered.iloc[0], ordered.iloc[-1]
        ends = f"{last['tightness']:.2f} at epoch {last['epoch']}"
        if len(ordered) > 1:
            low, high = ordered["tightness"].min(), ordered["tightness"].max()
            ends = f"{first['tightness']:.2f} at epoch {first['epoch']}, {ends} (over epochs {low:.2f} to {high:.2f})"
        sentence = (
            f"{certifier} ({run}), {norm_name(str(norm))}, {last['images']} test images: mean lower bound / distance "
            f"{ends}; {100 * last['tight']:.0f}% of the brackets are tighter than {100 * (1 - TIGHT):.0f}%"
        )
        if last["compared"]:
            sentence += (
                f"; since epoch {last['since']:.0f} the boundary has certainly moved closer for "
                f"{last['closer']:.0f} and farther for {last['farther']:.0f} of {last['compared']:.0f}"
            )
        lines.append(sentence + ".")
    for _, row in _tests(proofs).iterrows():
        lines.append(
            f"Observation {row['observation']} ({row['run']}, {norm_name(row['norm'])}, {row['certifier']}, epoch "
            f"{row['epochs']}): that {CLAIMS[row['claim']]} {CERTAIN[row['certain']]}."
        )
    return lines


def _tests(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["split"] == "test"] if len(rows) and (rows["split"] == "test").any() else rows


def bracket_tables(content: ReportContent) -> list[Table]:
    """The observations by both ends; the averages stand beside the figure."""
    found = [Table("proved", "The observations by both ends of the brackets", content.proofs, first=20)]
    return [table for table in found if len(table.frame)]


def brackets(view: View) -> Graph:
    """The band that the average margin is in."""
    every = view.table("brackets")
    rows = every[np.isfinite(column(every, "lower"))] if len(every) else every
    graph = Graph(
        "brackets",
        "Between which averages the average margin is",
        "From the average certified lower bound to the average of the smallest distances, of the same images. The true "
        "average is in the band; how wide it is changes with the network, and with it either end: the boundary has "
        "moved for certain only where bands of two epochs do not overlap.",
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
