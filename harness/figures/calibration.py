"""Confidence against margin, reliability diagram, and calibration error over epochs."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.figures.canvas import (
    PlainFigure,
    dress,
    empty,
    epoch_axis,
    from_zero,
    legend_below,
    lines_of_splits,
    note,
    panels,
    say,
)
from harness.figures.style import CORRECT, INCORRECT, NOTE, margin_label, norms_of, split_styles
from harness.statistics.figure_tables import at_last_epoch, filled_bins, with_distance

LEAST = 1e-7  # smallest 1 - confidence drawn: confidences are stored as 32-bit floats
# name, value of `correct`, colour, marker, marker size
GROUPS = (("correct", True, CORRECT, "o", 7), ("incorrect", False, INCORRECT, "X", 22))


def confidence_margins(
    margins: pd.DataFrame, *, estimator: str, split: str = "test", epoch: int | None = None
) -> Figure:
    """Margin against confidence, one mark per image, correct and incorrect images apart, at one epoch.

    Args:
        margins: columns epoch, split, estimator, norm, correct, confidence (0..1), distance (inf where not found).
        epoch: the last measured epoch by default.
    """
    rows = margins
    if len(rows):
        rows = rows[(rows["estimator"] == estimator) & (rows["split"] == split)]
        rows = at_last_epoch(rows) if epoch is None else rows[rows["epoch"] == epoch]
    if with_distance(rows).empty:
        when = "" if epoch is None else f" at epoch {epoch}"
        return empty(f"There are no margins to set against confidence: no {split} image has one by {estimator}{when}.")
    norms = norms_of(rows)
    figure, axes = panels(len(norms))
    for panel, norm in zip(axes, norms, strict=True):
        _draw_cloud(panel, rows[rows["norm"] == norm])
        panel.set_ylabel(margin_label(norm))
        panel.set_xlabel(f"1 − confidence of {split} images\n(more confident to the right)")
    keys = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=name)
        for name, _, colour, marker, _ in GROUPS
    ]
    legend_below(figure, keys)
    return figure


def calibration_curves(reliability: pd.DataFrame, calibration: pd.DataFrame, *, split: str = "test") -> Figure:
    """Reliability diagram at the first and the last epoch of training, and calibration error over epochs.

    Args:
        reliability: columns epoch, split, low, high, count, confidence, accuracy (NaN for empty bins).
        calibration: columns epoch, split, ece (0..1); every split is drawn.
    """
    rows = reliability[reliability["split"] == split] if len(reliability) else reliability
    if rows.empty and calibration.empty:
        return empty("There is no calibration to show: no predictions were recorded.")
    figure = PlainFigure(figsize=(8.6, 4.0), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    curve = figure.add_subplot(grid[0, 0])
    if rows.empty:
        say(curve, f"No predictions of {split} images were recorded.")
    else:
        _draw_reliability(curve, figure.add_subplot(grid[1, 0], sharex=curve), rows)
    error = figure.add_subplot(grid[:, 1])
    _draw_errors(error, calibration)
    keys = [*_keys(curve, "left"), *_keys(error, "right")]
    if keys:
        legend_below(figure, keys)
    return figure


def _keys(axes: Axes, side: str) -> list[Line2D]:
    keys = []
    for line in axes.get_lines():
        key = Line2D([], [])
        key.update_from(line)
        key.set_label(f"{line.get_label()} ({side})")
        keys.append(key)
    return keys


def _draw_cloud(axes: Axes, rows: pd.DataFrame) -> None:
    found = with_distance(rows)
    counts = []
    for name, correct, colour, marker, size in GROUPS:
        group = found[found["correct"].astype(bool) == correct]
        counts.append(f"{len(group)} {name}")
        doubt = (1 - group["confidence"].astype(float)).clip(lower=LEAST)
        axes.scatter(doubt, group["distance"], s=size, color=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
    dress(axes)
    axes.set_xscale("log")
    axes.set_xlim(1.6, LEAST / 2)
    axes.set_xticks([1, 1e-2, 1e-4, LEAST], ["1", "$10^{-2}$", "$10^{-4}$", r"$\leq 10^{-7}$"])
    axes.minorticks_off()
    from_zero(axes)
    missing = len(rows) - len(found)
    lines = [f"epoch {int(rows['epoch'].iloc[0])}: {', '.join(counts)}"]
    lines += [f"{missing} without a distance"] if missing else []
    note(axes, "\n".join(lines))


def _draw_reliability(curve: Axes, bars: Axes, rows: pd.DataFrame) -> None:
    last, style = int(rows["epoch"].max()), split_styles(rows["split"])[str(rows["split"].iloc[0])]
    curve.plot([0, 1], [0, 1], ":", color=NOTE, linewidth=1, label="accuracy = confidence")
    for epoch, colour, face in ((1, "#888888", "white"), (last, "black", "black"))[last == 1 :]:
        bins = rows[rows["epoch"] == epoch].sort_values("low")
        if bins.empty:
            continue
        line = filled_bins(bins)
        curve.plot(
            line["confidence"],
            line["accuracy"],
            style,
            color=colour,
            marker="o",
            markersize=4.5,
            markerfacecolor=face,
            label=f"epoch {epoch}",
        )
        bars.stairs(bins["count"], [*bins["low"], bins["high"].iloc[-1]], color=colour, linestyle=style)
    for axes in (curve, bars):
        dress(axes)
    bars.set_yscale("log")
    bars.set_ylim(bottom=0.8)
    bars.set_ylabel("images")
    bars.set_xlabel("confidence")
    curve.tick_params(labelbottom=False)
    curve.set_ylim(0, 1.02)
    curve.set_ylabel(f"accuracy of {rows['split'].iloc[0]} images")


def _draw_errors(axes: Axes, calibration: pd.DataFrame) -> None:
    if calibration.empty:
        say(axes, "No calibration error was computed.")
        return
    lines_of_splits(axes, calibration, "ece", split_styles(calibration["split"]))
    dress(axes)
    epoch_axis(axes)
    from_zero(axes)
    axes.set_ylabel("expected calibration error")
