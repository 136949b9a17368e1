"""Rows, bins and counts of the figures, prepared once for the static and the interactive drawing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from harness.statistics.envelope import ENVELOPE

# side at an epoch, side at the next epoch shown; in the order in which the bands are stacked from below
FLOWS = (("incorrect", "incorrect"), ("incorrect", "correct"), ("correct", "incorrect"), ("correct", "correct"))
FLOW_COLUMNS = ("epoch", "next_epoch", "before", "after", "count")


# epochs


def nearest_epochs(wanted: Iterable[int], measured: Iterable[int]) -> list[int]:
    """The measured epoch nearest to each wanted epoch, ascending, without repeats; ties take the earlier epoch."""
    known = sorted(set(measured))
    if not known:
        return []
    return sorted({min(known, key=lambda epoch: abs(epoch - want)) for want in wanted})


def flow_epochs(epochs: Sequence[int], shown: int) -> list[int]:
    """At most ``shown`` (at least 3) of the epochs: the first two, the last, and more of the early ones between."""
    known = sorted(epochs)
    if len(known) <= shown:
        return known
    places: list[int] = []
    for count in range(2, 4 * shown):
        steps = np.geomspace(1, len(known) - 1, count)
        trial = sorted({0, *np.rint(steps).astype(int).tolist()})
        if len(places) < len(trial) <= max(shown, 3):
            places = trial
    return [known[place] for place in places]


def at_nearest_epochs(rows: pd.DataFrame, wanted: Iterable[int]) -> pd.DataFrame:
    """The rows of the measured epochs nearest to the wanted ones, see `nearest_epochs`."""
    if rows.empty:
        return rows
    return rows[rows["epoch"].isin(nearest_epochs(wanted, [int(epoch) for epoch in rows["epoch"].unique()]))]


def at_last_epoch(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last epoch."""
    return rows[rows["epoch"] == rows["epoch"].max()] if len(rows) else rows


def is_sparse(rows: pd.DataFrame, estimator: str) -> bool:
    """Whether the estimator was measured at fewer epochs than others, so that no line may join its points."""
    epochs = rows.loc[rows["estimator"] == estimator, "epoch"]
    return bool(epochs.nunique() < rows["epoch"].nunique())


# rows that can be drawn


def subset_averages(summary: pd.DataFrame, subsets: Sequence[str]) -> pd.DataFrame:
    """Rows of ``summary.csv`` of the subsets, in the norms that have an average at all.

    Rows with ``found == 0`` stay: a static line has a gap there.
    """
    if summary.empty:
        return summary
    rows = summary[summary["subset"].isin(subsets)]
    return rows[rows.groupby("norm")["found"].transform("max") > 0]


def with_distance(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a finite ``distance``: images that were found, or tied (0)."""
    return _finite(rows, "distance")


def with_lower_bound(brackets: pd.DataFrame) -> pd.DataFrame:
    """Rows of `harness.statistics.brackets.bracket_table` with a finite average lower bound."""
    return _finite(brackets, "lower")


def with_ratio(ratios: pd.DataFrame) -> pd.DataFrame:
    """Rows of `harness.statistics.tables.estimator_ratios` with a finite ratio, without the envelope's own."""
    if ratios.empty:
        return ratios
    return _finite(ratios[ratios["estimator"] != ENVELOPE], "ratio")


def with_class_average(classes: pd.DataFrame) -> pd.DataFrame:
    """Rows of `harness.statistics.tables.class_margins` with a finite average margin."""
    return _finite(classes, "avg")


def filled_bins(reliability: pd.DataFrame) -> pd.DataFrame:
    """Rows of `harness.statistics.calibration.reliability` of bins that hold an image."""
    return reliability[reliability["count"] > 0]


def _finite(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows[np.isfinite(rows[column].to_numpy(dtype=float, na_value=np.nan))] if len(rows) else rows


# heat maps


def class_grid(rows: pd.DataFrame, column: str = "avg") -> pd.DataFrame:
    """The column by true class (rows) and epoch (columns), both ascending, for one estimator, split and norm."""
    return rows.pivot(index="label", columns="epoch", values=column).sort_index()


def boundary_counts(rows: pd.DataFrame, labels: list[int]) -> pd.DataFrame:
    """Images by predicted class (rows) and class beyond the nearest boundary (columns); NaN for no image.

    Args:
        rows: of `harness.statistics.tables.boundary_classes`, of one epoch, estimator, split and norm.
        labels: the classes of both axes, in order.
    """
    counts = rows.pivot(index="prediction", columns="target", values="count")
    return counts.reindex(index=labels, columns=labels)


def row_shares(counts: pd.DataFrame) -> pd.DataFrame:
    """Each count divided by the sum of its row; NaN in rows without an image."""
    totals = counts.sum(axis=1)
    return counts.div(totals.where(totals > 0), axis=0)


# histograms


def bin_edges(end: float, count: int) -> np.ndarray:
    """``(count + 1,)`` edges of equal bins from 0 to ``end``, or to 1 where ``end`` is 0."""
    return np.linspace(0, end or 1.0, count + 1)


def bin_counts(distances: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``(len(edges) - 1,)`` finite distances in each bin; the last bin also holds the distances beyond it."""
    return np.histogram(np.minimum(distances, edges[-1]), edges)[0]


# flow


def image_flow(correctness: pd.DataFrame, epochs: Sequence[int]) -> pd.DataFrame:
    """Images by their side (correct or incorrect) at neighbouring epochs of ``epochs``, in `FLOW_COLUMNS`.

    Args:
        correctness: bool, one row per image, one column per epoch.
        epochs: columns of ``correctness``, ascending; four rows for each pair of neighbours, in the order of `FLOWS`.
    """
    rows = []
    for epoch, following in itertools.pairwise(epochs):
        before, after = correctness[epoch].to_numpy(dtype=bool), correctness[following].to_numpy(dtype=bool)
        for old, new in FLOWS:
            count = int(((before == (old == "correct")) & (after == (new == "correct"))).sum())
            rows.append((epoch, following, old, new, count))
    return pd.DataFrame(rows, columns=list(FLOW_COLUMNS))
