"""Single images: their margins over epochs, and their effect on the averages as they enter and leave a subset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.figures.style import SUBSETS
from harness.report.figures.curves import by_norm_and_run
from harness.report.figures.graph import Graph, Key, Panel, Trace, number, text
from harness.report.figures.view import DARK, View, axis, column, epoch_axis, norm_name, ranges
from harness.report.tables import Table
from harness.statistics.figure_tables import with_distance

# colours of cividis from dark to light, without the palest, which are too faint on white
RANKS = ("#00224E", "#123570", "#3B496C", "#575D6D", "#707173", "#8A8678", "#A59C74")
# part of the change -> title, colour, hatching
PARTS = {
    "stayers": ("own change of images that stayed", "#5B5B5B", ""),
    "entrants": ("images that entered", "#44AA99", "/"),
    "leavers": ("images that left", "#AA4499", "\\"),
}


def paths(view: View) -> Graph:
    """Margins of a dozen single images over epochs."""
    every = view.table("paths")
    graph = Graph(
        "paths",
        "Single images over epochs",
        "A dozen images at even quantiles of the margin at the last epoch, dark for small and light for large margins. "
        "Marks are red where the image is classified incorrectly. Logarithmic axis.",
        tables=[Table("paths", "Single images", every)],
        reason="" if len(every) else "Paths of single images cannot be shown: no image was found at the last epoch.",
    )
    if graph.reason:
        return graph
    found = with_distance(every)
    rows = found[found["distance"] > 0]
    if not len(rows):
        return replace(graph, reason="Paths of single images cannot be shown: none has a finite margin above 0.")
    missing = len(every) - len(rows)
    return replace(
        graph,
        panels=by_norm_and_run(view, rows, _paths),
        columns=view.columns,
        choosers=view.choosers(rows),
        keys=[Key(subset, colour, "circle", "none") for subset, colour in SUBSETS.items()],
        notes=[f"{missing} distances are not drawn: not found, or 0, which has no logarithm."] if missing else [],
    )


def _paths(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    ranks = max(int(every["rank"].max()), 1)
    for (estimator, split, image), part in rows.groupby(["estimator", "split", "image"], sort=False):
        line = part.sort_values("epoch")
        x, y, first = list(line["epoch"]), list(column(line, "distance")), line.iloc[0]
        colour = RANKS[round(int(first["rank"]) / ranks * (len(RANKS) - 1))]
        subsets = ["correct" if correct else "incorrect" for correct in line["correct"]]
        plotly: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"image {image}, class {first['label']}",
            "x": x,
            "y": y,
            "line": {"color": colour, "width": 1.2},
            "marker": {"color": [SUBSETS[subset] for subset in subsets], "size": 4.5},
            "customdata": subsets,
            "hovertemplate": "epoch %{x}: %{y:.4g}, %{customdata}<extra>%{fullData.name}</extra>",
        }
        say = f"image {image} ({split}, {estimator}) {number(y[0])} at epoch {x[0]}, {number(y[-1])} at epoch {x[-1]}"
        traces.append(Trace(plotly, {"estimator": str(estimator), "split": str(split)}, say))
    logarithms = np.log10(column(every, "distance"))
    margin_axis = axis(text(f"{norm_name(norm)} margin"), logarithms.min() - 0.1, logarithms.max() + 0.1)
    layout = {
        "xaxis": epoch_axis(every["epoch"]),
        "yaxis": margin_axis | {"type": "log", "dtick": "D2" if np.ptp(logarithms) < 2 else 1, "tickformat": "~g"},
        "hovermode": "closest",
    }
    label, where = f"{norm_name(norm)} margins of single images over epochs", {"run": run, "norm": norm}
    return Panel(view.heading(run, norm_name(norm)), label, where, layout, traces)


def composition(view: View) -> Graph:
    """Changes of the correct and the incorrect images' averages, by images that stayed, entered and left."""
    every = view.table("composition")
    rows = every[(every["measure"] == "distance") & (every["previous"] > 0)] if len(every) else every
    graph = Graph(
        "composition",
        "Parts of the changes of the correct and incorrect images' averages",
        "The change of an average since the measured epoch before is the sum of three parts: the change of the images "
        "that stayed on their side, the effect of images that entered it, and the effect of images that left it. The "
        "step from epoch 0 is left out.",
        tables=[Table("composition", "Composition of the changes", every)],
        reason="" if len(rows) else "The composition cannot be shown: it needs two measured epochs after epoch 0.",
    )
    if graph.reason:
        return graph
    panels = [
        panel for subset in SUBSETS for panel in by_norm_and_run(view, rows[rows["subset"] == subset], _composition)
    ]
    keys = [Key(title, colour, area=True) for title, colour, _ in PARTS.values()] + [Key("their sum", DARK, "circle")]
    return replace(graph, panels=panels, columns=view.columns, choosers=view.choosers(rows), keys=keys)


def _composition(view: View, run: str, norm: str, every: pd.DataFrame) -> Panel:
    rows, traces = every[every["run"] == run], []
    subset = str(every["subset"].iloc[0])
    for (estimator, split), part in rows.groupby(["estimator", "split"], sort=False):
        place = {"estimator": str(estimator), "split": str(split)}
        for name, (title, colour, shape) in PARTS.items():
            plotly: dict[str, Any] = {
                "type": "bar",
                "name": title,
                "x": part["epoch"],
                "y": part[name],
                "marker": {"color": colour, "pattern": {"shape": shape, "size": 5, "solidity": 0.35}},
                "customdata": part[f"n_{name}"],
                "hovertemplate": "%{y:.3g} (%{customdata} images)<extra>%{fullData.name}</extra>",
            }
            total = number(float(np.nansum(column(part, name))))
            traces.append(Trace(plotly, place, f"{title}, {estimator}, {split}: {total} over all epochs shown"))
        traces.append(_sum(part, place))
    ends = ranges(every, ["estimator", "split"], _ends)
    layout = {
        "barmode": "relative",
        "bargap": 0.25,
        "xaxis": epoch_axis(every["epoch"]),
        "yaxis": axis(text(f"change of {norm_name(norm)} average")),
    }
    label = f"Change of the average {norm_name(norm)} margin of {subset} images in its parts"
    title = view.heading(run, norm_name(norm), f"{subset} images")
    return Panel(title, label, {"run": run, "norm": norm}, layout, traces, ends)


def _ends(rows: pd.DataFrame) -> list[float]:
    """Ends of the y axis that hold the stacked bars and their sum."""
    values = np.nan_to_num(np.concatenate([_stack(rows, 1), _stack(rows, -1), column(rows, "change")]))
    return [1.08 * float(values.min()), 1.08 * float(values.max())]


def _sum(rows: pd.DataFrame, place: dict[str, str]) -> Trace:
    plotly: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "their sum",
        "x": rows["epoch"],
        "y": rows["change"],
        "line": {"color": DARK, "width": 1},
        "marker": {"size": 4, "color": DARK},
        "hovertemplate": "%{y:.3g}<extra>%{fullData.name}</extra>",
    }
    return Trace(plotly, place, f"their sum over all epochs shown: {number(float(np.nansum(column(rows, 'change'))))}")


def _stack(rows: pd.DataFrame, sign: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(epochs,)`` signed height of the stacked bars above (``sign`` 1) or below (-1) zero."""
    parts = np.stack([column(rows, name) for name in PARTS])
    heights: np.ndarray[Any, np.dtype[np.float64]] = sign * np.nansum(np.clip(sign * parts, 0, None), axis=0)
    return heights
