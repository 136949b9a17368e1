"""Histograms of margins at chosen epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from harness.figures.canvas import PlainFigure, dress, empty, legend_below, say
from harness.figures.style import CORRECT, INCORRECT, SMALL, margin_label
from harness.statistics.figure_tables import at_nearest_epochs, bin_counts, bin_edges, with_distance

BINS = 30
FEWEST = 10  # images of a histogram; fewer images are drawn one by one
GROUPS = (("correct", True, CORRECT), ("incorrect", False, INCORRECT))


def margin_distributions(
    runs: Mapping[str, pd.DataFrame],
    norm: str,
    *,
    estimator: str,
    split: str = "train",
    epochs: Sequence[int] = (10, 20, 40),
) -> Figure:
    """Distribution of the margins of correct and of incorrect images at a few epochs (Figures 3, 11).

    The bars of each group add up to 100% of its images with a distance. Fewer than ten images are drawn one by one.
    Medians count images without a distance as infinitely far.

    Args:
        runs: name of a run -> its margins: columns epoch, split, estimator, norm, correct, distance. One row of panels
            per run.
        norm, estimator, split: the margins that are drawn.
        epochs: the epochs wanted. Of each run the nearest measured epochs are drawn, one column of panels per epoch.
    """
    chosen = {name: _rows(table, norm, estimator, split) for name, table in runs.items()}
    if not any(len(with_distance(rows)) for rows in chosen.values()):
        return empty(f"There is no distribution to show: no {split} image has a distance by {estimator} in this norm.")
    chosen = {name: at_nearest_epochs(rows, epochs) for name, rows in chosen.items()}
    columns = {name: sorted(rows["epoch"].unique()) if len(rows) else [] for name, rows in chosen.items()}
    width = max(map(len, columns.values()))
    figure = PlainFigure(figsize=(max(3.1 * width, 4.6), 2.5 * len(chosen) + 0.5), layout="constrained")
    grid = figure.subplots(len(chosen), width, sharex=True, sharey="row", squeeze=False)
    for line, (name, rows) in zip(grid, chosen.items(), strict=True):
        shown = columns[name]
        if shown:
            # the same bins for all epochs of a run
            edges = bin_edges(with_distance(rows)["distance"].to_numpy(dtype=float).max(initial=0), BINS)
            for axes, epoch in zip(line, shown, strict=False):
                _draw(axes, rows[rows["epoch"] == epoch], edges)
            line[0].set_ylim(bottom=0)
        else:
            say(line[0], f"{name}: there are no {split} images by {estimator}.")
        for axes in line[max(len(shown), 1) :]:
            axes.set_axis_off()
        line[0].set_ylabel(f"{name}\nshare of the group (%)")
    for axes in [[axes for axes in column if axes.axison][-1] for column in grid.T]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(margin_label(norm))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    legend_below(figure, [Patch(facecolor=colour, alpha=0.7, label=name) for name, _, colour in GROUPS])
    return figure


def _rows(margins: pd.DataFrame, norm: str, estimator: str, split: str) -> pd.DataFrame:
    if margins.empty:
        return margins
    wanted = margins["norm"].eq(norm) & margins["estimator"].eq(estimator) & margins["split"].eq(split)
    return margins[wanted]


def _draw(axes: Axes, rows: pd.DataFrame, edges: np.ndarray) -> None:
    counts = []
    for name, correct, colour in GROUPS:
        every = rows.loc[rows["correct"].astype(bool) == correct, "distance"].to_numpy(dtype=float)
        values = every[np.isfinite(every)]
        median = float(np.median(every)) if len(every) else math.inf
        counts.append(f"{len(values)} {name}" + (f", median {median:.3g}" if math.isfinite(median) else ""))
        if len(values) >= FEWEST:
            shares = 100 * bin_counts(values, edges) / len(values)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.45)
            axes.stairs(shares, edges, color=colour, linewidth=1.2, label=name)
        else:
            low = np.full(len(values), 0.05)
            across = axes.get_xaxis_transform()
            axes.plot(values, low, "|", color=colour, markersize=16, markeredgewidth=1.5, label=name, transform=across)
    dress(axes)
    missing = int((~np.isfinite(rows["distance"])).sum())
    lines = [f"epoch {int(rows['epoch'].iloc[0])}", *counts]
    lines += [f"{missing} without a distance"] if missing else []
    axes.set_title("\n".join(lines), fontsize=SMALL)
