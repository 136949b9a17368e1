"""One function a figure: tables in, Figure out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.files import write_atomically

NORM_LABELS = {"l2": "$L_2$", "linf": r"$L_\infty$"}
# Okabe & Ito's palette without yellow and black: told apart by colour-blind readers and in print
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SPLIT_STYLES = {"train": "-", "test": "--"}
MARKERS = "osD^vP"


def margin_curves(summary: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Error, and average margin with its standard error, over epochs (Mickisch et al. 2020, Figure 1).

    Args:
        summary: rows of ``summary.csv``; those of all images are drawn, one line an estimator and split.
        epochs: rows of ``epochs.csv``; empty where the caller trains, then without the error panel.
    """
    shown = summary[(summary["subset"] == "all") & (summary["found"] > 0)]
    norms = [norm for norm in NORM_LABELS if (shown["norm"] == norm).any()]
    panels = (["error"] if len(epochs) else []) + norms
    figure = Figure(figsize=(4.6 * max(len(panels), 1), 3.9), layout="constrained")
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position)
        if panel == "error":
            _draw_errors(axes, epochs)
        else:
            _draw_margins(axes, shown[shown["norm"] == panel], list(shown["estimator"].unique()))
            axes.set_ylabel(f"average {NORM_LABELS[panel]} margin (pixel range = 1)")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw_errors(axes: Axes, epochs: pd.DataFrame) -> None:
    for split, rows in epochs.groupby("split", sort=False):
        style = SPLIT_STYLES.get(str(split), ":")
        axes.plot(rows["epoch"], 100 * rows["error"], style, color="black", label=str(split), linewidth=1.6)
    axes.set_ylabel("error (%)")


def _draw_margins(axes: Axes, rows: pd.DataFrame, estimators: Sequence[str]) -> None:
    for (estimator, split), line in rows.groupby(["estimator", "split"], sort=False):
        place = estimators.index(str(estimator))
        axes.errorbar(
            line["epoch"],
            line["avg"],
            yerr=line["se"].fillna(0),
            color=PALETTE[place % len(PALETTE)],
            linestyle=SPLIT_STYLES.get(str(split), ":"),
            # shifted in every round of colours, so that no two estimators look the same
            marker=MARKERS[(place + place // len(PALETTE)) % len(MARKERS)],
            markersize=3.5,
            markerfacecolor="white" if split == "test" else None,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=f"{estimator}, {split}",
        )


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg``; the same tables give the same bytes."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        write_atomically(path, partial(_render, figure, path.suffix[1:], name))
    return paths


def _render(figure: Figure, kind: str, name: str, path: Path) -> None:
    # without a date and with ids salted by the name instead of at random
    facts = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, format=kind, dpi=160, metadata=facts)
