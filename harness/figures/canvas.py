"""Building blocks of the static figures: panels, axes, legends, and the files written."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from harness.figures.style import NORM_LABELS, NOTE, SMALL, LineStyle, estimator_looks, split_styles
from harness.store.files import write_atomically

WIDTH, HEIGHT = 3.7, 3.1  # inches of one panel
# our own labels, which are drawn as mathematics; elsewhere a dollar sign would start mathematics and is escaped
MATHEMATICS = re.compile("|".join(map(re.escape, NORM_LABELS.values())) + r"|(?<!\\)\$")
# control characters except the line feed, and lone surrogates: SVG cannot hold them
UNDRAWABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class PlainFigure(Figure):
    """A figure that draws user-given names literally: only our own labels are read as mathematics."""

    def draw(self, renderer: RendererBase) -> None:
        """See `matplotlib.figure.Figure`."""
        for text in self.findobj(Text):
            text.set_text(plain(text.get_text()))
        super().draw(renderer)


def plain(text: str) -> str:
    """The text escaped for matplotlib, which reads text between dollar signs as TeX."""
    escaped = MATHEMATICS.sub(lambda match: r"\$" if match[0] == "$" else match[0], text)
    return UNDRAWABLE.sub("\ufffd", escaped)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels next to each other."""
    figure = PlainFigure(figsize=(max(WIDTH * count, 4.6), HEIGHT), layout="constrained")
    return figure, [figure.add_subplot(1, count, position) for position in range(1, count + 1)]


def empty(sentence: str) -> Figure:
    """A figure that holds one sentence instead of a drawing."""
    figure = PlainFigure(figsize=(6.4, 1.6), layout="constrained")
    figure.text(0.5, 0.5, textwrap.fill(sentence, 70), ha="center", va="center", fontsize=11, color=NOTE)
    return figure


def say(axes: Axes, sentence: str) -> None:
    """Write the sentence into a panel instead of a drawing."""
    axes.set_axis_off()
    text = textwrap.fill(sentence, 32)
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, color=NOTE, transform=axes.transAxes)


def note(axes: Axes, text: str) -> None:
    """Write a small grey line above the panel."""
    axes.set_title(text, fontsize=SMALL, color=NOTE, loc="left")


def dress(axes: Axes) -> None:
    """Draw a light grid behind the data, and no frame at the top and the right."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def epoch_axis(axes: Axes) -> None:
    """Label the x axis with whole epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def from_zero(axes: Axes) -> None:
    """Start the y axis at 0 and leave 6% of room above the data."""
    highest = float(axes.dataLim.y1)
    axes.set_ylim(0, 1.06 * highest if 0 < highest < math.inf else 1)


def lines_of_splits(axes: Axes, table: pd.DataFrame, column: str, styles: Mapping[str, LineStyle]) -> None:
    """Draw the column over epochs as a black line per split; as a point where there is only one epoch."""
    for split, rows in table.groupby("split", sort=False):
        line = rows.sort_values("epoch")
        axes.plot(
            line["epoch"],
            line[column],
            styles[str(split)],
            color="black",
            marker="o" if len(line) == 1 else "",
            markerfacecolor="black" if split == "train" else "white",
            linewidth=1.6,
            label=str(split),
        )


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draw one legend below the panels, which keep their height, in as many columns as fit."""
    letters = max(len(str(handle.get_label())) for handle in handles)
    for handle in handles:
        label = str(handle.get_label())
        if label.startswith("_"):  # matplotlib hides it
            handle.set_label(f" {label}")
    # inches: a letter of 9 points takes 0.075, a sample of the line and the gaps 0.6
    columns = min(max(int(figure.get_figwidth() / (0.075 * letters + 0.6)), 1), len(handles))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns) + 0.1)
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
    )


def line_keys(estimators: Iterable[str], order: Iterable[str], splits: Iterable[str]) -> list[Line2D]:
    """Legend entries: estimators by colour and marker, splits by line style.

    Args:
        estimators: the estimators drawn.
        order: all estimators that have a look, in the order of `estimator_looks`.
        splits: the splits drawn.
    """
    looks, styles = estimator_looks(order), split_styles(splits)
    keys = []
    for name in dict.fromkeys(estimators):
        look = looks[name]
        keys.append(
            Line2D([], [], color=look.colour, marker=look.marker, linewidth=look.width, markersize=4, label=name)
        )
    for split in dict.fromkeys(splits):
        keys.append(Line2D([], [], color=NOTE, linestyle=styles[split], linewidth=1.4, label=split))
    return keys


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` into the folder and return their paths; equal tables give equal bytes."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        write_atomically(path, partial(_render, figure, path.suffix[1:], name))
        # the layout is final: computing it again for the next format would take half of its time
        figure.set_layout_engine("none")
    return paths


def _render(figure: Figure, kind: str, name: str, path: Path) -> None:
    # reproducible bytes: no date, and ids salted by the name instead of at random
    facts = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # characters that the font lacks are drawn as boxes; the report has the name as text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format=kind, dpi=160, metadata=facts)
