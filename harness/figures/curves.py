"""Curves over epochs: errors, average margins, and average margins of correct and incorrect images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.figures.canvas import (
    dress,
    empty,
    epoch_axis,
    from_zero,
    legend_below,
    line_keys,
    lines_of_splits,
    note,
    panels,
    say,
)
from harness.figures.style import (
    MARKS,
    SUBSETS,
    LineStyle,
    Look,
    estimator_looks,
    faded,
    margin_label,
    norms_of,
    span,
    split_styles,
)
from harness.statistics.figure_tables import is_sparse, subset_averages

NO_AVERAGE = "There is no average margin to show: no image has a distance at any epoch."


def margin_curves(summary: pd.DataFrame, epochs: pd.DataFrame, *, estimators: Sequence[str] = ()) -> Figure:
    """Error, and average margin with its standard error, over epochs (Mickisch et al. 2020, Figures 1, 2, 7, 8, 9).

    Args:
        summary: columns epoch, split, subset, estimator, norm, count, found, avg, se, as in ``summary.csv``. The rows
            of the subset "all" are drawn, one line per estimator (or the envelope) and split. The line has a gap where
            no image was found. An estimator that was measured at fewer epochs than others has points only.
        epochs: columns epoch, split, error (0..1), as in ``epochs.csv``. Empty where the caller trains: there is then
            no error panel.
        estimators: names that take their colours before those in the table, so that figures of other tables agree.
    """
    rows = subset_averages(summary, ["all"])
    norms = norms_of(rows) if len(rows) else []
    if not norms and epochs.empty:
        return empty(NO_AVERAGE)
    figure, axes = panels(bool(len(epochs)) + max(len(norms), 1))
    names, splits = _values([rows], "estimator"), _values([epochs, rows], "split")
    order = [*estimators, *_values([summary], "estimator")]
    if len(epochs):
        lines_of_splits(axes[0], epochs.assign(error=100 * epochs["error"]), "error", split_styles(splits))
        axes[0].set_ylabel("error (%)")
        _dress(axes[0], "")
    for panel, norm in zip(axes[-len(norms) :], norms, strict=False):
        _draw_margins(panel, rows[rows["norm"] == norm], estimator_looks(order), split_styles(splits))
        panel.set_ylabel(margin_label(norm, "average {} margin"))
    if not norms:
        say(axes[-1], NO_AVERAGE)
    legend_below(figure, line_keys(names, order, splits))
    return figure


def correctness_curves(summary: pd.DataFrame, split: str = "test", *, estimators: Sequence[str] = ()) -> Figure:
    """Average margin with its standard error of correct and of incorrect images over epochs (Figures 4, 6, 10).

    The colour stands for correct or incorrect, the marker and the shade for the estimator.

    Args:
        summary: as in `margin_curves`, with gaps and single points as there; the rows of the subsets "correct" and
            "incorrect" of the split are drawn.
        split: the images that are drawn.
        estimators: names that take their markers before those in the table.
    """
    chosen = summary[summary["split"] == split] if len(summary) else summary
    rows = subset_averages(chosen, list(SUBSETS))
    if rows.empty:
        return empty(f"There are no correct or incorrect {split} images with a distance to show.")
    norms = norms_of(rows)
    figure, axes = panels(len(norms))
    looks = estimator_looks([*estimators, *_values([summary], "estimator")])
    style = split_styles([split])[split]
    shades = _shades(_values([rows], "estimator"), looks)
    for panel, norm in zip(axes, norms, strict=True):
        of_norm = rows[rows["norm"] == norm]
        for (estimator, subset), line in of_norm.groupby(["estimator", "subset"], sort=False):
            colour = faded(SUBSETS[str(subset)], shades[str(estimator)])
            look = Look(colour, looks[str(estimator)].marker, looks[str(estimator)].width)
            bar = _draw_line(panel, line, look, style, f"{estimator}, {subset}")
            if is_sparse(of_norm, str(estimator)):
                _points_only(bar)
        _dress(panel, _counts_of_subsets(of_norm))
        panel.set_ylabel(margin_label(norm, f"average {{}} margin of {split} images"))
    keys = [Line2D([], [], color=colour, linewidth=2.5, label=name) for name, colour in SUBSETS.items()]
    for name, shade in shades.items():
        drawn = Look(faded("#333333", shade), looks[name].marker, looks[name].width)
        keys.append(_key(drawn, style, name))
    legend_below(figure, keys)
    return figure


def _values(tables: Sequence[pd.DataFrame], column: str) -> list[str]:
    """The distinct values of the column in order of appearance."""
    return list(dict.fromkeys(str(value) for table in tables if len(table) for value in table[column]))


def _shades(names: Sequence[str], looks: Mapping[str, Look]) -> dict[str, float]:
    """Share of white to mix in: 0 for the first estimator and the envelope, then 0.2 more each, at most 0.5."""
    marked = [name for name in names if looks[name].marker]
    return {name: min(0.2 * marked.index(name), 0.5) if name in marked else 0.0 for name in names}


def _draw_margins(axes: Axes, rows: pd.DataFrame, looks: Mapping[str, Look], styles: Mapping[str, LineStyle]) -> None:
    for (estimator, split), line in rows.groupby(["estimator", "split"], sort=False):
        bar = _draw_line(axes, line, looks[str(estimator)], styles[str(split)], f"{estimator}, {split}")
        if is_sparse(rows, str(estimator)):
            _points_only(bar)
        if split != "train":
            bar.lines[0].set_markerfacecolor("white")
    _dress(axes, _counts_of_splits(rows))


def _draw_line(axes: Axes, rows: pd.DataFrame, look: Look, style: LineStyle, label: str) -> ErrorbarContainer:
    line = rows.sort_values("epoch")
    found = line["found"] > 0
    return axes.errorbar(
        line["epoch"],
        line["avg"].where(found),
        yerr=line["se"].fillna(0),
        color=look.colour,
        linestyle=style,
        marker=look.marker or ".",
        markersize=3.5,
        markevery=_marked(found.to_numpy(dtype=bool), bool(look.marker)),
        linewidth=look.width,
        elinewidth=0.8,
        # the envelope often equals one estimator: drawn below it, both are visible
        zorder=2 if look.marker else 1.9,
        label=label,
    )


def _points_only(bar: ErrorbarContainer) -> None:
    bar.lines[0].set_linestyle("none")
    bar.lines[0].set_markevery(None)


def _marked(found: np.ndarray, regular: bool) -> list[int]:
    """Positions of the markers: regular ones, at most `MARKS`, and every point that no line joins."""
    step = math.ceil(len(found) / MARKS)
    near = np.pad(found, 1)
    alone = found & ~near[:-2] & ~near[2:]
    return [place for place in range(len(found)) if alone[place] or (regular and place % step == 0)]


def _key(look: Look, style: LineStyle, label: str) -> Line2D:
    return Line2D(
        [], [], color=look.colour, marker=look.marker, linewidth=look.width, linestyle=style, markersize=4, label=label
    )


def _dress(axes: Axes, counts: str) -> None:
    dress(axes)
    epoch_axis(axes)
    from_zero(axes)
    note(axes, counts)


def _counts_of_splits(rows: pd.DataFrame) -> str:
    """Number of images in each average: "n = 998–1000 of 1000 train, 1000 test"."""
    parts = []
    for split, group in rows.groupby("split", sort=False):
        of = "" if (group["found"] == group["count"]).all() else f"of {span(group['count'])} "
        parts.append(f"{span(group['found'])} {of}{split}")
    return "n = " + (", " if sum(map(len, parts)) < 36 else ",\n").join(parts)


def _counts_of_subsets(rows: pd.DataFrame) -> str:
    """Number of images in each average, and the largest number left out of one."""
    parts = [f"{span(group['found'])} {subset}" for subset, group in rows.groupby("subset", sort=False)]
    missing = int((rows["count"] - rows["found"]).max())
    return "n = " + ", ".join(parts) + (f"\nat most {missing} left out (no distance, or tied)" if missing else "")
