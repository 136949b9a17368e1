"""The flow of images between correct and incorrect classification (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from harness.figures.canvas import PlainFigure, empty, legend_below, note
from harness.figures.style import CORRECT, INCORRECT, SMALL, faded
from harness.statistics import figure_tables
from harness.statistics.figure_tables import flow_epochs

CUTS = (2, 5, 10, 15, 20, 25, 30, 40, 50)  # percentages at which the axis may end
HALF = 0.06  # half a node's width, in columns
RIBBONS = {
    ("incorrect", "incorrect"): faded(INCORRECT, 0.15),
    ("incorrect", "correct"): faded(INCORRECT, 0.6),
    ("correct", "incorrect"): "#26333F",
    ("correct", "correct"): faded(CORRECT, 0.6),
}
# position of a ribbon's number along it, 0..40; different for ribbons that cross
LABELS = {
    ("incorrect", "incorrect"): 20,
    ("incorrect", "correct"): 9,
    ("correct", "incorrect"): 31,
    ("correct", "correct"): 20,
}


def image_flow(correctness: pd.DataFrame, *, shown: int = 12) -> Figure:
    """Number of images that stay or become correct or incorrect between the epochs shown (Figure 5).

    Correct images are stacked on incorrect ones. Where few images are incorrect, the axis ends below 100% and a note
    says so. The first step, from the untrained network, then has a panel of its own with the whole scale.

    Args:
        correctness: bool, one row per image, one column per epoch.
        shown: the largest number of epochs drawn, at least 3. Each ribbon compares just the two epochs that it joins.
    """
    if correctness.empty or correctness.shape[1] < 2:
        return empty("There is no flow to show: it takes the predictions of at least two epochs.")
    epochs = flow_epochs([int(epoch) for epoch in correctness.columns], shown)
    right = correctness[epochs].to_numpy(dtype=bool)
    wrong = 100 * (1 - right.mean(axis=0))
    if not wrong.any():
        return empty("There is no flow to show: every image is classified correctly at every epoch.")
    parts = [(slice(None), _cut(wrong))]
    if parts[0][1] == 100 and len(epochs) > 2 and _cut(wrong[1:]) < 100:
        parts = [(slice(0, 2), 100), (slice(1, None), _cut(wrong[1:]))]
    widths = [1.3, len(epochs) - 1.7] if len(parts) > 1 else [1]
    figure = PlainFigure(figsize=(max(0.9 * len(epochs) + 1.8, 7.0), 4.4), layout="constrained")
    (panels,) = figure.subplots(1, len(parts), width_ratios=widths, squeeze=False)
    for axes, (part, top) in zip(panels, parts, strict=True):
        moves = figure_tables.image_flow(correctness, epochs[part])
        _draw(axes, moves, wrong[part], epochs[part], top)
        note(axes, "whole scale" if top == 100 else f"the axis ends at {top}%: all above is correct")
    panels[0].set_ylabel(f"share of the {len(right):,} images (%)")
    panels[-1].set_xlabel(f"epoch ({len(epochs)} of {correctness.shape[1]} shown), and the share that is incorrect")
    keys = [Patch(facecolor=colour, label=f"{before} → {after}") for (before, after), colour in RIBBONS.items()]
    legend_below(figure, keys)
    return figure


def _cut(wrong: np.ndarray) -> int:
    """The end of the axis (%), with 25% of room above the largest share."""
    return next((cut for cut in CUTS if 1.25 * wrong.max() <= cut), 100)


def _draw(axes: Axes, flow: pd.DataFrame, wrong: np.ndarray, epochs: Sequence[int], top: int) -> None:
    steps = flow.groupby(["epoch", "next_epoch"], sort=True)
    for place, ((epoch, following), rows) in enumerate(steps):
        counts = dict(zip(zip(rows["before"], rows["after"], strict=True), rows["count"], strict=True))
        _draw_ribbons(axes, place, counts, top, f"{epoch}_{following}")
    places = np.arange(len(epochs))
    axes.bar(places, wrong, 2 * HALF, color=INCORRECT, label="incorrect")
    axes.bar(places, 100 - wrong, 2 * HALF, bottom=wrong, color=CORRECT, label="correct")
    axes.set_xticks(places, [f"{epoch}\n{share:.1f}%" for epoch, share in zip(epochs, wrong, strict=True)])
    axes.set_xlim(-0.1, len(epochs) - 0.9)
    axes.set_ylim(0, top)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ribbons(axes: Axes, place: int, counts: Mapping[tuple[str, str], int], top: int, step: str) -> None:
    """Draw ribbons from one node to the next; nodes are stacked from below: incorrect, then correct images."""
    images = sum(counts.values())
    ways = np.linspace(0, 1, 41)
    x = place + HALF + (1 - 2 * HALF) * ways
    bend = ways**2 * (3 - 2 * ways)
    for (before, after), count in counts.items():
        width = 100 * count / images
        start = 100 * _below(counts, (before, after), 0) / images
        end = 100 * _below(counts, (before, after), 1) / images
        lower = start + (end - start) * bend
        colour = RIBBONS[before, after]
        axes.fill_between(
            x, lower, lower + width, color=colour, linewidth=0, alpha=0.85, gid=f"flow_{step}_{before}_{after}"
        )
        # a line of text of 9 points takes a twentieth of the panel's height
        if top * 0.05 < width and lower[20] + width / 2 < top:
            way = LABELS[before, after]
            axes.text(
                x[way],
                lower[way] + min(width, top - lower[way]) / 2,
                f"{count:,}",
                ha="center",
                va="center",
                fontsize=SMALL,
                color="black" if after == "correct" else "white",
                path_effects=[withStroke(linewidth=2.5, foreground=colour)],
            )


def _below(counts: Mapping[tuple[str, str], int], ribbon: tuple[str, str], side: int) -> int:
    """Images under a ribbon at its start (side 0) or its end (side 1)."""
    order = {"incorrect": 0, "correct": 1}
    rank = (order[ribbon[side]], order[ribbon[1 - side]])
    return sum(count for key, count in counts.items() if (order[key[side]], order[key[1 - side]]) < rank)
