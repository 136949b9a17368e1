"""Figures of a comparison: one figure per problem, one panel per norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

from benchmarks.compare.audit import ENVELOPE, distances, envelope, pareto_front
from harness.figures import NORM_LABELS
from harness.figures.canvas import HEIGHT, dress, empty, legend_below, note, panels, say
from harness.figures.style import NOTE, estimator_looks, norms_of

FLOOR = 1e-4  # resolution of refinement: smaller excesses count as equal to the envelope
CEILING = 10.0


def cost_figure(estimators: pd.DataFrame) -> Figure:
    """Passes per image against the mean distance over the envelope; the line joins the Pareto front.

    An estimator that missed images has no mean: its mean over the images that it found is drawn hollow.

    Args:
        estimators: rows of `audit.estimator_table` of one problem, without references.
    """
    if estimators.empty:
        return empty("There is nothing to compare: no estimator was measured.")
    norms = norms_of(estimators)
    figure, axes = panels(len(norms))
    looks = estimator_looks(estimators["estimator"])
    for panel, norm in zip(axes, norms, strict=True):
        here = estimators[estimators["norm"] == norm]
        drawn = here[np.isfinite(here["mean_found"])]
        if drawn.empty:
            say(panel, "No estimator found any image.")
            continue
        _draw_front(panel, here)
        for _, row in drawn.iterrows():
            look = looks[row["estimator"]]
            hollow = not math.isfinite(row["mean"])
            panel.plot(
                [row["passes"]],
                [_excess(row["mean_found"])],
                look.marker,
                color=look.colour,
                markerfacecolor="white" if hollow else look.colour,
                markersize=7,
                zorder=3,
            )
        _cost_axis(panel, drawn["passes"])
        _excess_axis(panel, f"mean {NORM_LABELS[norm]} distance\n/ envelope", drawn["mean_found"])
        dress(panel)
        note(panel, f"n = {int(here['images'].iloc[0])} images")
    front = Line2D([], [], color="black", linewidth=1.2, label="Pareto front")
    hollow = Line2D([], [], color=NOTE, marker="o", markerfacecolor="white", linestyle="", label="missed images")
    missed = [hollow] if np.isinf(estimators["mean"]).any() else []
    legend_below(figure, [*_keys(estimators["estimator"]), front, *missed])
    return figure


def _draw_front(panel: Axes, rows: pd.DataFrame) -> None:
    front = rows[pareto_front(rows["passes"].to_numpy(), rows["mean"].to_numpy())].sort_values("passes")
    if len(front):
        # beyond its last point more passes give no improvement
        passes = [*front["passes"], rows["passes"].max() * 1.2]
        excess = [_excess(value) for value in (*front["mean"], front["mean"].iloc[-1])]
        panel.step(passes, excess, color="black", linewidth=1.2, where="post", zorder=1)


def anytime_figure(curves: pd.DataFrame, names: Sequence[str] = ()) -> Figure:
    """Against passes: the median distance over the envelope (top) and the share of images within 1% of it (bottom).

    Images without a witness yet count as infinite. A curve that ends in an open circle belongs to an estimator whose
    library hides rows: before its end it is too high in the top panel and too low in the bottom panel.

    Args:
        curves: rows of `anytime.curves` of one problem.
        names: estimators in the order of their styles.
    """
    if curves.empty:
        return empty("There is no curve: no estimator was measured.")
    norms = norms_of(curves)
    figure, _ = panels(len(norms))
    figure.clear()
    figure.set_figheight(1.75 * HEIGHT)
    axes = figure.subplots(2, len(norms), squeeze=False, sharex="col")
    looks = estimator_looks([*names, *curves["estimator"]])
    for column, norm in enumerate(norms):
        above, below = axes[0][column], axes[1][column]
        here = curves[curves["norm"] == norm]
        for name, line in here.groupby("estimator", sort=False):
            colour = looks[str(name)].colour
            finite = line[np.isfinite(line["median"])]
            above.plot(finite["passes"], [_excess(value) for value in finite["median"]], color=colour, linewidth=1.4)
            below.plot(line["passes"], line["within_1"], color=colour, linewidth=1.4)
            for panel, end in ((above, finite["median"].map(_excess)), (below, line["within_1"])):
                if len(end):
                    last = line.loc[end.index[-1]]
                    face = "white" if last["hidden"] else colour
                    marker = looks[str(name)].marker
                    panel.plot(
                        [last["passes"]], [end.iloc[-1]], marker, color=colour, markerfacecolor=face, markersize=5
                    )
        _excess_axis(above, f"median {NORM_LABELS[norm]} distance\n/ envelope", here["median"])
        below.set_ylim(-0.02, 1.02)
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
        below.set_ylabel(f"images within 1%\nof the {NORM_LABELS[norm]} envelope")
        for panel in (above, below):
            dress(panel)
        _cost_axis(below, here["passes"])
        note(above, f"n = {int(here['images'].iloc[0])} images")
    legend_below(figure, _keys([*names, *curves["estimator"]], drawn=curves["estimator"]))
    return figure


def security_figure(rows: pd.DataFrame, whole: pd.DataFrame) -> Figure:
    """Share of correctly classified images without a witness within the distance, per estimator and for the envelope.

    Args:
        rows: of `measuring.Measured`, of one problem, with ``role``; references only enter the envelope.
        whole: the same without a budget, for the envelope.
    """
    if rows.empty:
        return empty("There is nothing to compare: no estimator was measured.")
    norms = norms_of(rows)
    figure, axes = panels(len(norms))
    own = rows[rows["role"] != "reference"]
    looks = estimator_looks([*own["estimator"], ENVELOPE])
    for panel, norm in zip(axes, norms, strict=True):
        here = rows[rows["norm"] == norm]
        lines = {str(name): unit for name, unit in own[own["norm"] == norm].groupby("estimator", sort=False)}
        least = envelope(distances(whole[whole["norm"] == norm]))
        correct = here.groupby("image", sort=False)["correct"].first().loc[least.index]
        farthest = _farthest(least)
        for name, unit in lines.items():
            _draw_security(panel, unit["distance"], unit["correct"], farthest, looks[name].colour, looks[name].width)
        _draw_security(panel, least, correct, farthest, looks[ENVELOPE].colour, looks[ENVELOPE].width)
        panel.set_xlim(0, farthest)
        panel.set_ylim(0, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel(f"{NORM_LABELS[norm]} distance (pixel range = 1)")
        panel.set_ylabel("robust share of images")
        dress(panel)
        note(panel, f"n = {len(least)} images, {correct.mean():.0%} correct")
    legend_below(figure, _keys([*own["estimator"], ENVELOPE], markers=False))
    return figure


def _farthest(least: pd.Series) -> float:
    """Twice the envelope's 95th percentile: larger distances are misses of estimators."""
    found = least[np.isfinite(least)]
    return 2 * float(found.quantile(0.95)) if len(found) and found.max() > 0 else 1.0


def _draw_security(
    panel: Axes, distance: pd.Series, correct: pd.Series, farthest: float, colour: str, width: float
) -> None:
    values = np.sort(np.where(correct.to_numpy(), distance.to_numpy(), 0.0))
    within = values[np.isfinite(values)]
    left = 1 - np.arange(1, len(within) + 1) / len(values)
    steps = [0.0, *within, max(farthest, within[-1] if len(within) else 0)]
    panel.step(steps, [1.0, *left, left[-1] if len(left) else 1.0], color=colour, linewidth=width, where="post")


def _excess(ratio: float) -> float:
    """The excess over the envelope, clipped to the range of the axis."""
    return float(np.clip(ratio - 1, FLOOR, CEILING))


def _excess_axis(panel: Axes, label: str, values: Iterable[float]) -> None:
    """A vertical axis of ratios r, logarithmic in r - 1."""
    panel.set_yscale("log")
    drawn = [_excess(value) for value in values if math.isfinite(value)] or [FLOOR]
    low, high = 0.6 * min(*drawn, 0.009), 1.6 * max(*drawn, 0.02)
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(FixedLocator([tick for tick in _ticks(low, high) if FLOOR <= tick <= CEILING]))
    panel.yaxis.set_major_formatter(FuncFormatter(_ratio_text))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel(label)


def _ratio_text(excess: float, _: int) -> str:
    text = f"{1 + excess:.5g}"
    return f"≤ {text}" if math.isclose(excess, FLOOR) else f"≥ {text}" if math.isclose(excess, CEILING) else text


def _cost_axis(panel: Axes, passes: pd.Series) -> None:
    """A horizontal logarithmic axis of passes, at least a decade long."""
    panel.set_xscale("log")
    low, high = passes.min() / 1.4, passes.max() * 1.4
    spare = max(math.sqrt(10 / (high / low)), 1.0)
    low, high = low / spare, high * spare
    panel.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlim(low, high)
    panel.set_xlabel("passes per image")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, as many as fit."""
    steps = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
    return [tick for power in range(-5, 8) for step in steps if low <= (tick := step * 10.0**power) <= high]


def _keys(order: Iterable[str], *, drawn: Iterable[str] | None = None, markers: bool = True) -> list[Line2D]:
    looks = estimator_looks(order)
    shown = looks if drawn is None else {name: looks[name] for name in dict.fromkeys(drawn)}
    return [
        Line2D(
            *([], []),
            color=look.colour,
            marker=look.marker if markers else "",
            linewidth=look.width,
            markersize=5,
            label=name,
        )
        for name, look in shown.items()
    ]
