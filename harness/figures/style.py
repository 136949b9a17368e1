"""Colours, markers, line styles and labels that all figures share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from harness.statistics.envelope import ENVELOPE

NORM_LABELS = {"l2": "$L_2$", "linf": r"$L_\infty$"}
# Okabe & Ito's palette without yellow and black: distinguishable for colour-blind readers and in print
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
MARKS = 21  # largest number of markers on one line
LineStyle = Literal["-", "--", ":", "-."]
SPLIT_STYLES: dict[str, LineStyle] = {"train": "-", "test": "--"}
OTHER_STYLES: tuple[LineStyle, ...] = (":", "-.")
CORRECT = "#7A8FA6"
INCORRECT = "#A50F2B"
SUBSETS = {"correct": CORRECT, "incorrect": INCORRECT}
ENVELOPE_COLOUR = "#000000"
HEAT = "cividis"
NOTE = "#555555"
SMALL = 9  # points: the smallest text


@dataclasses.dataclass(frozen=True)
class Look:
    """Colour, marker and line width of an estimator."""

    colour: str
    marker: str
    width: float


def estimator_looks(names: Iterable[str]) -> dict[str, Look]:
    """A look per estimator by its position among ``names``; the envelope takes no position."""
    looks: dict[str, Look] = {}
    place = 0
    for name in dict.fromkeys(names):
        if name == ENVELOPE:
            looks[name] = Look(ENVELOPE_COLOUR, "", 2.2)
            continue
        # markers shift with every repetition of the colours, so that no two estimators look the same
        marker = MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]
        looks[name] = Look(PALETTE[place % len(PALETTE)], marker, 1.3)
        place += 1
    return looks


def split_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """A line style per split; splits other than train and test share the two remaining styles."""
    others = [name for name in dict.fromkeys(names) if name not in SPLIT_STYLES]
    return SPLIT_STYLES | {name: OTHER_STYLES[place % len(OTHER_STYLES)] for place, name in enumerate(others)}


def faded(colour: str, share: float) -> str:
    """The colour with a share in 0..1 of white mixed in."""
    red, green, blue = (value + (1 - value) * share for value in to_rgb(colour))
    return to_hex((red, green, blue))


def norms_of(table: pd.DataFrame) -> list[str]:
    """The norms of the table's rows, in the order of the panels."""
    return [norm for norm in NORM_LABELS if (table["norm"] == norm).any()]


def margin_label(norm: str, text: str = "{} margin") -> str:
    """An axis label with its unit; ``{}`` in the text is replaced by the norm."""
    return f"{text.format(NORM_LABELS[norm])}\n(pixel range = 1)"


def span(values: Iterable[float]) -> str:
    """The range of whole numbers as text: "412" or "412–455"."""
    numbers = [int(value) for value in values]
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}–{high}"
