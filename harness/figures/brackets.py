"""Brackets of the average margin over epochs, and their tightness."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness.figures.canvas import dress, empty, epoch_axis, from_zero, legend_below, note, panels
from harness.figures.style import NORM_LABELS, PALETTE, LineStyle, margin_label, norms_of, span
from harness.statistics.figure_tables import with_lower_bound


def bracket_bands(table: pd.DataFrame, *, split: str = "test", names: Sequence[str] = ()) -> Figure:
    """Bands from the average lower bound to the average distance of the same images, one per certifier; their ratio.

    The true average lies in every band. A band that widens or narrows shows a change of the bounds' tightness, not of
    the boundary. The last panel shows the tightness.

    Args:
        table: rows of `harness.statistics.brackets.bracket_table`.
        split: the images that are drawn.
        names: certifiers that take their colours before those in the table.
    """
    rows = with_lower_bound(table[table["split"] == split] if len(table) else table)
    if rows.empty:
        return empty("There are no lower bounds to show: none was certified (--certify crown).")
    norms = norms_of(rows)
    figure, axes = panels(len(norms) + 1)
    order = list(dict.fromkeys([*names, *map(str, rows["certifier"].unique())]))
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(order)}
    looks: tuple[LineStyle, ...] = ("-", "--")
    styles = dict(zip(norms, looks, strict=False))
    for panel, norm in zip(axes, norms, strict=False):
        of_norm = rows[rows["norm"] == norm]
        for name, line in of_norm.groupby("certifier", sort=False):
            drawn, colour = line.sort_values("epoch"), colours[str(name)]
            panel.fill_between(drawn["epoch"], drawn["lower"], drawn["upper"], color=colour, alpha=0.25, linewidth=0)
            panel.plot(drawn["epoch"], drawn["lower"], color=colour, marker="^", markersize=4, linewidth=1.2)
            panel.plot(drawn["epoch"], drawn["upper"], color=colour, marker="v", markersize=4, linewidth=1.2)
        dress(panel)
        epoch_axis(panel)
        from_zero(panel)
        panel.set_ylabel(margin_label(norm, f"average {{}} margin of {split} images"))
        note(panel, f"n = {span(of_norm['images'])} images")
    last = axes[len(norms)]
    for (certifier, kind), line in rows.groupby(["certifier", "norm"], sort=False):
        drawn, look = line.sort_values("epoch"), styles[str(kind)]
        colour = colours[str(certifier)]
        last.plot(drawn["epoch"], drawn["tightness"], look, color=colour, marker="o", markersize=3)
    dress(last)
    epoch_axis(last)
    last.set_ylim(0, 1.02)
    last.set_ylabel("mean lower bound / distance")
    note(last, "1 = exact")
    keys: list[Artist] = [
        Patch(color=colours[name], alpha=0.4, label=name) for name in order if name in set(rows["certifier"])
    ]
    keys.append(Line2D([], [], color="#555555", marker="v", label="smallest distance"))
    keys.append(Line2D([], [], color="#555555", marker="^", label="lower bound"))
    keys += [Line2D([], [], color="#555555", linestyle=s, label=f"{NORM_LABELS[n]} (right)") for n, s in styles.items()]
    legend_below(figure, keys)
    return figure
