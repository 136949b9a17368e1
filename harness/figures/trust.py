"""Ratios of estimators to the envelope over epochs, which show trends of an estimator's bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from harness.figures.canvas import dress, empty, epoch_axis, legend_below, line_keys, note, panels
from harness.figures.style import (
    ENVELOPE_COLOUR,
    MARKS,
    NORM_LABELS,
    estimator_looks,
    norms_of,
    span,
    split_styles,
)
from harness.statistics.envelope import ENVELOPE
from harness.statistics.figure_tables import is_sparse, with_ratio


def estimator_ratios(ratios: pd.DataFrame, *, estimators: Sequence[str] = ()) -> Figure:
    """Average distance of each estimator divided by the envelope's, with its 95% band, over epochs.

    A level line means that the bias of the estimator does not change, so that a trend of its margins is due to the
    network. An estimator that was measured at fewer epochs than others has points only.

    Args:
        ratios: columns epoch, split, estimator, norm, ratio, low, high, images.
        estimators: names that take their colours before those in the table, so that figures of other tables agree.
    """
    rows = with_ratio(ratios)
    if rows.empty:
        return empty("There is no envelope to compare with: it takes two estimators measured at every epoch.")
    norms = norms_of(rows)
    figure, axes = panels(len(norms))
    names = [ENVELOPE, *(str(name) for name in rows["estimator"].unique())]
    order = [*estimators, *names]
    looks, styles = estimator_looks(order), split_styles(rows["split"])
    for panel, norm in zip(axes, norms, strict=True):
        of_norm = rows[rows["norm"] == norm]
        panel.axhline(1, color=ENVELOPE_COLOUR, linewidth=2.2, zorder=1)
        for (estimator, split), group in of_norm.groupby(["estimator", "split"], sort=False):
            line, look = group.sort_values("epoch"), looks[str(estimator)]
            sparse = is_sparse(of_norm, str(estimator))
            if sparse:
                panel.vlines(line["epoch"], line["low"], line["high"], color=look.colour, linewidth=0.8)
            else:
                panel.fill_between(line["epoch"], line["low"], line["high"], color=look.colour, alpha=0.15, linewidth=0)
            panel.plot(
                line["epoch"],
                line["ratio"],
                linestyle="none" if sparse else styles[str(split)],
                color=look.colour,
                marker=look.marker,
                markersize=3.5,
                markevery=1 if sparse else math.ceil(len(line) / MARKS),
                markerfacecolor=look.colour if split == "train" else "white",
                linewidth=look.width,
                label=f"{estimator}, {split}",
            )
        dress(panel)
        epoch_axis(panel)
        panel.ticklabel_format(axis="y", useOffset=False)
        panel.set_ylim(top=max(panel.get_ylim()[1], 1.02))
        panel.set_ylabel(f"average {NORM_LABELS[norm]} margin\n/ average of the envelope")
        note(panel, f"n = {span(of_norm['images'])} images, band: 95%")
    legend_below(figure, line_keys(names, order, rows["split"]))
    return figure
