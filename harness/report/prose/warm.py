"""Sentences and tables on warm starts: passes saved, and dependence of the margins on the path."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from harness.report.content import ReportContent
from harness.report.figures.view import View, norm_name
from harness.report.tables import Table
from harness.statistics.warm import FARTHER, LEVEL, NEARER

WORDS = {
    LEVEL: "Level with the cold margins within 1% at every sample: no dependence on the path was detected",
    NEARER: "Its margins depend on the path: they are smaller than cold ones, because earlier witnesses are reused",
    FARTHER: "Its margins depend on the path and are too large: use {cold} instead",
}
UNTOLD = "Whether its margins depend on the path is undecided within 1%"
MOVES = "; the ratio moves over the epochs, so part of its curve is the warm start's own"


def warm_sentences(savings: pd.DataFrame, pairs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One sentence per warm estimator, run and norm, on test images if there are any.

    Args:
        savings: rows of `harness.statistics.warm.SAVING_COLUMNS`, with the run.
        pairs: run -> `harness.statistics.warm.warm_pairs`.
    """
    shown = savings[savings["split"] == "test"] if (savings["split"] == "test").any() else savings
    lines = [_sentence(row) for _, row in shown.iterrows()]
    compared = set(zip(savings["run"], savings["estimator"], strict=True))
    return lines + [
        f"{estimator} ({run}) starts from the witnesses of the epoch before and was not measured cold as well: "
        "whether its margins depend on the path is unknown."
        for run, estimators in pairs.items()
        for estimator in estimators
        if (run, estimator) not in compared
    ]


def _sentence(row: pd.Series) -> str:
    cost = f"{row['passes']:.0f} passes per image instead of {row['cold_passes']:.0f}"
    saved = f"{_fewer(row['saved'])}; with the cold samples {_fewer(row['net'])}"
    last = f"{row['last']:.3f} ({row['low']:.3f}-{row['high']:.3f}) at epoch {row['last_epoch']}"
    first = f"{row['first']:.3f} at epoch {row['first_epoch']}, " if row["first_epoch"] < row["last_epoch"] else ""
    shares = f"{100 * row['nearer']:.1f}% of the images nearer by more than 1%, {100 * row['farther']:.1f}% farther"
    lost = f", {100 * row['lost']:.1f}% found cold only" if row["lost"] else ""
    words = WORDS.get(row["verdict"], UNTOLD).format(cold=row["cold"]) + (MOVES if row["apart"] else "")
    return (
        f"{row['estimator']} ({row['run']}), {norm_name(row['norm'])}, {row['split']}: {cost} ({saved}); "
        f"warm / cold {first}{last}; {shares}{lost}. {words}."
    )


def _fewer(part: float) -> str:
    return f"{100 * abs(part):.0f}% {'fewer' if part >= 0 else 'more'}"


def warm_tables(content: ReportContent) -> list[Table]:
    """Tables of the passes saved, and of the ratios at every epoch with a cold sample."""
    candidates = [
        Table(
            "warm-savings", "Passes saved by warm starts, and their margins over cold ones", content.savings, first=20
        ),
        Table("warm-ratios", "Warm over cold margins at every sampled epoch", View(content).table("warm"), first=20),
    ]
    return [table for table in candidates if len(table.frame)]
