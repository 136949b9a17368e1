"""The envelope: per image, the smallest verified distance over estimators."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pandas as pd

ENVELOPE = "envelope"


def complete_estimators(margins: pd.DataFrame, norm: str) -> list[str]:
    """Estimators that measured this norm at every epoch and split where any did, in order of appearance."""
    rows = margins[margins["norm"] == norm]
    points = rows.groupby("estimator", sort=False)[["epoch", "split"]].apply(lambda own: len(own.drop_duplicates()))
    every = len(rows[["epoch", "split"]].drop_duplicates())
    return [str(name) for name, count in points.items() if count == every and name != ENVELOPE]


def envelope(margins: pd.DataFrame, estimators: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """Rows of the estimator ``envelope``, in the columns of ``margins``.

    ``distance`` and ``attack_distance`` are each the smallest over the estimators; the witness's class and
    the status are those of the smallest ``distance``; passes and seconds are summed, as all had to run.

    Args:
        margins: rows of `harness.store.MARGIN_COLUMNS`.
        estimators: norm -> those to take; a norm with fewer than two has no envelope, for it would be
            the estimator itself.
    """
    found = []
    for norm, names in estimators.items():
        rows = margins[(margins["norm"] == norm) & margins["estimator"].isin(list(names))]
        if len(names) < 2 or not len(rows):
            continue
        keys = ["epoch", "split", "image"]
        groups = rows.groupby(keys, sort=False)
        best = rows.loc[groups["distance"].idxmin()].set_index(keys)
        best["attack_distance"] = groups["attack_distance"].min()
        for column in ("forwards", "backwards", "seconds", "noise_retries"):
            best[column] = groups[column].sum()
        found.append(best.assign(estimator=ENVELOPE, message="").reset_index()[list(margins.columns)])
    return pd.concat(found, ignore_index=True) if found else margins.iloc[:0]
