"""Margins of single images over epochs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.figures.canvas import HEIGHT, WIDTH, PlainFigure, dress, empty, epoch_axis, from_zero, legend_below, note
from harness.figures.style import HEAT, INCORRECT, NOTE, SMALL, margin_label, norms_of
from harness.statistics.figure_tables import with_distance

BRIGHTEST = 0.85  # position in the colour map; colours above it are too faint on white


def image_paths(paths: pd.DataFrame) -> Figure:
    """Margins of a few images over epochs; a line has a gap where its image has no distance.

    Lines go from dark to bright by rank. A crimson mark means that the image is classified incorrectly at that epoch.

    Args:
        paths: columns split, estimator, norm, image, label, epoch, distance, correct, rank (0: the smallest margin at
            the last epoch). One row of panels per split and estimator, one column per norm.
    """
    if with_distance(paths).empty:
        return empty("There are no paths to show: no image has a distance at any epoch.")
    norms = norms_of(paths)
    lines = list(paths.groupby(["split", "estimator"], sort=False))
    size = ((WIDTH + 0.9) * len(norms), (HEIGHT + 0.6) * len(lines))
    figure = PlainFigure(figsize=size, layout="constrained")
    grid = figure.subplots(len(lines), len(norms), squeeze=False)
    for panels, ((split, estimator), rows) in zip(grid, lines, strict=True):
        for axes, norm in zip(panels, norms, strict=True):
            chosen = rows[rows["norm"] == norm]
            _draw(axes, chosen)
            axes.set_ylabel(margin_label(norm))
            missing = len(chosen) - len(with_distance(chosen))
            count = f"\n{missing} points without a distance" if missing else ""
            note(axes, f"{split}, {estimator}; at the right: image (true class){count}")
    legend_below(
        figure,
        [
            Line2D([], [], color="black", marker="o", markersize=3, linestyle="", label="correct"),
            Line2D([], [], color=INCORRECT, marker="X", markersize=6, linestyle="", label="incorrect"),
        ],
    )
    return figure


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    highest = max(int(rows["rank"].max()), 1) if len(rows) else 1
    ends: list[tuple[float, str, str]] = []
    for rank, group in rows.groupby("rank", sort=True):
        line = group.sort_values("epoch")
        distance = line["distance"].where(np.isfinite(line["distance"]))
        shade = matplotlib.colormaps[HEAT](BRIGHTEST * float(str(rank)) / highest)
        wrong = ~line["correct"].astype(bool)
        label = f"{line['image'].iloc[0]} ({line['label'].iloc[0]})"
        axes.plot(line["epoch"], distance, "-o", color=shade, markersize=2.5, linewidth=1.1, label=label)
        axes.plot(line["epoch"], distance.where(wrong), "X", color=INCORRECT, markersize=5.5, markeredgewidth=0)
        known = distance.dropna()
        if len(known):
            ends.append((float(known.iloc[-1]), label, matplotlib.colors.to_hex(shade)))
    dress(axes)
    epoch_axis(axes)
    from_zero(axes)
    _name_ends(axes, ends, float(rows["epoch"].max()))


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], last: float) -> None:
    """Write the name of each line at its end, moved so that names do not overlap."""
    ordered = sorted(ends)
    top = axes.get_ylim()[1]
    gap = top * min(0.075, 1 / len(ends)) if ends else top
    heights = spread([height for height, _, _ in ordered], gap, top)
    for (height, label, colour), place in zip(ordered, heights, strict=True):
        axes.annotate(
            label,
            (last, height),
            (1.06, place / top),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=NOTE,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 0},
        )


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights moved so that neighbours are at least ``gap`` apart and all lie in 0..top.

    Groups of heights that had to be moved apart stay centred on their mean.
    """
    groups: list[list[float]] = []  # per group: the height of its first name that each member asks for
    for place, height in enumerate(heights):
        groups.append([height - place * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    highest = top - (len(heights) - 1) * gap
    firsts = [min(max(float(np.mean(group)), 0.0), highest) for group in groups for _ in group]
    return [first + place * gap for place, first in enumerate(firsts)]
