"""Sentences and tables on brackets: tightness, and observations that are certain."""

from __future__ import annotations

import pandas as pd

from harness.report.content import ReportContent
from harness.report.figures.view import norm_name
from harness.report.tables import Table
from harness.statistics.brackets import TIGHT

CLAIMS = {
    "decline": "standard training moves the boundary closer",
    "level": "adversarial training keeps it farther",
    "misclassified images closer": "misclassified images are closer",
}
CERTAIN = {
    "holds": "holds for these images for all margins between the bounds",
    "does not hold": "does not hold for these images for any margins between the bounds",
    "open": "is not decided by the bounds",
}


def bracket_sentences(brackets: pd.DataFrame, proofs: pd.DataFrame) -> list[str]:
    """Sentences on tightness, on images that certainly moved, and on observations that are certain; on test images.

    Args:
        brackets: rows of `harness.statistics.brackets.bracket_table`, with the run.
        proofs: rows of `harness.statistics.brackets.proved`.
    """
    lines = []
    for (run, certifier, norm), rows in _tests(brackets).groupby(["run", "certifier", "norm"], sort=False):
        ordered = rows.sort_values("epoch")
        first, last = ordered.iloc[0], ordered.iloc[-1]
        ends = f"{last['tightness']:.2f} at epoch {last['epoch']}"
        if len(ordered) > 1:
            low, high = ordered["tightness"].min(), ordered["tightness"].max()
            ends = f"{first['tightness']:.2f} at epoch {first['epoch']}, {ends} (over epochs {low:.2f} to {high:.2f})"
        sentence = (
            f"{certifier} ({run}), {norm_name(str(norm))}, {last['images']} test images: mean lower bound / distance "
            f"{ends}; {100 * last['tight']:.0f}% of the brackets are tighter than {100 * (1 - TIGHT):.0f}%"
        )
        if last["compared"]:
            sentence += (
                f"; since epoch {last['since']:.0f} the boundary has certainly moved closer for "
                f"{last['closer']:.0f} and farther for {last['farther']:.0f} of {last['compared']:.0f}"
            )
        lines.append(sentence + ".")
    for _, row in _tests(proofs).iterrows():
        lines.append(
            f"Observation {row['observation']} ({row['run']}, {norm_name(row['norm'])}, {row['certifier']}, epoch "
            f"{row['epochs']}): that {CLAIMS[row['claim']]} {CERTAIN[row['certain']]}."
        )
    return lines


def _tests(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["split"] == "test"] if len(rows) and (rows["split"] == "test").any() else rows


def bracket_tables(content: ReportContent) -> list[Table]:
    """The table of the observations by both ends; the table of averages is part of the figure."""
    candidates = [Table("proved", "The observations by both ends of the brackets", content.proofs, first=20)]
    return [table for table in candidates if len(table.frame)]
