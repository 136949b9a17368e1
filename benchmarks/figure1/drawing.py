"""Figure 1: error and average margins over epochs, with the script's averages at its measured epochs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.figure1.measuring import Row
from harness.figures import NORM_LABELS, PALETTE
from harness.figures.canvas import dress, epoch_axis, from_zero, legend_below, lines_of_splits, panels
from harness.figures.style import split_styles
from harness.runs import Run

OURS, THEIRS = PALETTE[0], PALETTE[1]


def figure1(run: Run, rows: Sequence[Row], summary: pd.DataFrame) -> Figure:
    """Lines: the run's averages of DeepFool's own points; circles: those of the script on the same networks.

    Args:
        summary: the run's ``summary.csv``.
    """
    norms = list(dict.fromkeys(row.norm for row in rows))
    splits = list(dict.fromkeys(row.split for row in rows))
    figure, (first, *others) = panels(1 + len(norms))
    styles = split_styles(splits)
    lines_of_splits(first, run.epochs.assign(percent=100 * run.epochs["error"]), "percent", styles)
    first.set_ylabel("error in %")
    for axes, norm in zip(others, norms, strict=True):
        for split in splits:
            mine = summary.query("norm == @norm and split == @split and subset == 'all'").sort_values("epoch")
            axes.errorbar(
                *(mine["epoch"], mine["attack_avg"], mine["attack_se"]),
                color=OURS,
                linestyle=styles[split],
                linewidth=1.4,
            )
            there = [row for row in rows if (row.norm, row.split) == (norm, split)]
            axes.plot(
                [row.epoch for row in there],
                [row.their_average for row in there],
                "o",
                color=THEIRS,
                markerfacecolor=THEIRS if split == "train" else "white",
                markersize=6,
            )
        axes.set_ylabel(f"average {NORM_LABELS[norm]} margin ± standard error")
    for axes in (first, *others):
        epoch_axis(axes)
        from_zero(axes)
        dress(axes)
    keys = [
        Line2D([], [], color=OURS, label="harness.track"),
        Line2D([], [], color=THEIRS, marker="o", linestyle="", label="the Foolbox script"),
        *(Line2D([], [], color="black", linestyle=styles[split], label=split) for split in splits),
    ]
    legend_below(figure, keys)
    return figure
