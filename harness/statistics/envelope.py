"""The envelope: per image, the smallest verified distance over estimators."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pandas as pd

ENVELOPE = "envelope"


def complete_estimators(margins: pd.DataFrame, norm: str) -> list[str]:
    """Estimators that measured this norm at every epoch and split at which any did, in order of appearance."""
    rows = margins[margins["norm"] == norm]
    points = rows.groupby("estimator", sort=False)[["epoch", "split"]].apply(lambda group: len(group.drop_duplicates()))
    every = len(rows[["epoch", "split"]].drop_duplicates())
    return [str(name) for name, count in points.items() if count == every and name != ENVELOPE]


def envelope(margins: pd.DataFrame, estimators: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """Rows of the estimator ``envelope``, in the columns of ``margins``.

    ``distance`` and ``attack_distance`` are each the smallest over the estimators. The witness's class and the status
    are those of the smallest ``distance``. Passes, noise retries and seconds are summed, because all estimators ran.

    Args:
        margins: rows of `harness.store.MARGIN_COLUMNS`.
        estimators: norm -> the estimators to include. A norm with fewer than two has no envelope: it would equal the
            estimator.
    """
    tables = []
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
        tables.append(best.assign(estimator=ENVELOPE, message="").reset_index()[list(margins.columns)])
    return pd.concat(tables, ignore_index=True) if tables else margins.iloc[:0]
