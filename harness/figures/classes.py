"""Heat maps: margins by true class, and the class beyond the nearest boundary."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from harness.figures.canvas import PlainFigure, dress, empty, epoch_axis, from_zero, note, panels
from harness.figures.style import (
    HEAT,
    NORM_LABELS,
    SMALL,
    margin_label,
    norms_of,
    split_styles,
)
from harness.statistics.figure_tables import (
    at_last_epoch,
    boundary_counts,
    class_grid,
    row_shares,
    with_class_average,
)

SHOWN_CLASSES = 20
WRITTEN_CLASSES = 12  # with more classes a cell has no room for its number
MISSING = "#DDDDDD"  # a cell without a value


def class_margins(classes: pd.DataFrame, *, estimator: str, split: str = "test") -> Figure:
    """Average margin by true class and epoch, with the values of the last epoch written at the side.

    Of more than twenty classes, the ten with the smallest and the ten with the largest margins at the last epoch are
    drawn.

    Args:
        classes: columns epoch, split, estimator, norm, label, avg (NaN where no image is found), found, count.
    """
    every = _of(classes, estimator, split)
    rows = with_class_average(every)
    if rows.empty:
        return empty(f"There are no margins of classes to show: no {split} image has a distance by {estimator}.")
    norms = norms_of(rows)
    figure, axes = panels(len(norms))
    figure.set_figheight(5.0)
    for panel, norm in zip(axes, norms, strict=True):
        table = class_grid(rows[rows["norm"] == norm])
        chosen = _nearest_and_farthest(table)
        mesh = _draw_heat(panel, chosen, chosen.columns.to_numpy())
        figure.colorbar(
            mesh,
            ax=panel,
            location="top",
            label=margin_label(norm, f"average {{}} margin of {split} images"),
            aspect=30,
        )
        epoch_axis(panel)
        panel.set_ylabel("true class")
        side = panel.secondary_yaxis("right")
        last = chosen.iloc[:, -1]
        side.set_yticks(range(len(last)), ["" if np.isnan(value) else f"{value:#.3g}" for value in last])
        side.tick_params(length=0, labelsize=SMALL)
        if len(chosen) < len(table):
            panel.axhline(SHOWN_CLASSES / 2 - 0.5, color="white", linewidth=3)
            panel.set_ylabel(f"true class ({len(chosen)} of {len(table)}: nearest, farthest)")
        note(panel, _left_out(every[every["norm"] == norm]))
        side.set_ylabel(f"epoch {chosen.columns[-1]}", fontsize=SMALL)
    return figure


def boundary_classes(boundary: pd.DataFrame, changes: pd.DataFrame, *, estimator: str, split: str = "test") -> Figure:
    """The class beyond the nearest boundary by predicted class at the last epoch, and the share of images that changed.

    Args:
        boundary: columns epoch, split, estimator, norm, prediction, target, count.
        changes: columns epoch, split, estimator, norm, images, changed (0..1 of the images); may be empty.
    """
    rows, moves = _of(boundary, estimator, split), _of(changes, estimator, split)
    rows = rows[(rows["target"] >= 0) & (rows["count"] > 0)] if len(rows) else rows
    if rows.empty:
        return empty(f"There is no nearest class to show: no {split} image has a distance by {estimator}.")
    norms = norms_of(rows)
    figure = PlainFigure(figsize=(4.6 * len(norms), 6.0), layout="constrained")
    grid = figure.subplots(2, len(norms), squeeze=False, height_ratios=[3.2, 1])
    for (heat, below), norm in zip(grid.T, norms, strict=True):
        now = at_last_epoch(rows[rows["norm"] == norm])
        last = int(now["epoch"].iloc[0])
        _draw_targets(figure, heat, now)
        note(heat, f"{NORM_LABELS[norm]}, epoch {last}: {now['count'].sum()} {split} images (grey: none)")
        _draw_changes(below, moves[moves["norm"] == norm] if len(moves) else moves, split)
    grid[1, 0].set_ylabel("pair of classes\nchanged (%)")
    return figure


def _of(table: pd.DataFrame, estimator: str, split: str) -> pd.DataFrame:
    return table if table.empty else table[(table["estimator"] == estimator) & (table["split"] == split)]


def _left_out(rows: pd.DataFrame) -> str:
    most = int((rows["count"] - rows["found"]).groupby(rows["epoch"]).sum().max())
    return f"at most {most} images an epoch left out (no distance, or tied)" if most else ""


def _nearest_and_farthest(table: pd.DataFrame) -> pd.DataFrame:
    if len(table) <= SHOWN_CLASSES:
        return table
    order = table.iloc[:, -1].dropna().sort_values(kind="stable").index
    half = SHOWN_CLASSES // 2
    return table.loc[[*order[:half], *order[max(half, len(order) - half) :]]]


def _draw_heat(axes: Axes, table: pd.DataFrame, columns: np.ndarray) -> QuadMesh:
    """Draw cells with edges midway between neighbouring columns; the first row is at the top."""
    axes.set_facecolor(MISSING)
    values = np.ma.masked_invalid(table.to_numpy(dtype=float))
    mesh = axes.pcolormesh(_edges(columns), np.arange(len(table) + 1) - 0.5, values, cmap=HEAT)
    axes.set_yticks(range(len(table)), [str(label) for label in table.index])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.tick_params(labelsize=SMALL)
    return mesh


def _edges(centres: np.ndarray) -> np.ndarray:
    places = centres.astype(float)
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    middles = (places[1:] + places[:-1]) / 2
    return np.array([2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]])


def _draw_targets(figure: Figure, axes: Axes, rows: pd.DataFrame) -> None:
    labels = sorted({*rows["prediction"].astype(int), *rows["target"].astype(int)})
    whole = boundary_counts(rows, labels)
    shares = 100 * row_shares(whole)
    mesh = _draw_heat(axes, shares, np.arange(len(labels)))
    mesh.set_clim(0, 100)
    figure.colorbar(mesh, ax=axes, label="share of the row (%)", aspect=30)
    axes.set_xlabel("class at the nearest boundary")
    axes.set_ylabel("predicted class")
    if len(labels) > WRITTEN_CLASSES:
        few = range(0, len(labels), math.ceil(len(labels) / WRITTEN_CLASSES))
        axes.set_xticks(few, [str(labels[place]) for place in few])
        axes.set_yticks(few, [str(labels[place]) for place in few])
        return
    axes.set_xticks(range(len(labels)), [str(label) for label in labels])
    numbers, heat = whole.to_numpy(dtype=float), shares.to_numpy(dtype=float)
    for row, column in np.argwhere(np.isfinite(numbers)):
        look = {"fontsize": SMALL, "color": "white" if heat[row, column] < 50 else "black"}
        axes.text(column, row, f"{numbers[row, column]:.0f}", look, ha="center", va="center")


def _draw_changes(axes: Axes, rows: pd.DataFrame, split: str) -> None:
    line = rows[np.isfinite(rows["changed"])].sort_values("epoch") if len(rows) else rows
    if line.empty:
        note(axes, "no two epochs to compare")
    else:
        style = split_styles([split])[split]
        axes.plot(line["epoch"], 100 * line["changed"], style, color="black", marker="o", markersize=3, linewidth=1.3)
        note(axes, "against the epoch measured before")
    dress(axes)
    epoch_axis(axes)
    from_zero(axes)
