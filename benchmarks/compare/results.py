"""Results of a comparison, computed from the measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from benchmarks.compare.anytime import curves, within_budget
from benchmarks.compare.audit import correlation_table, estimator_table, open_table, ratio_table
from benchmarks.compare.measuring import Measured
from benchmarks.compare.remarks import Remark, remark


@dataclass(frozen=True)
class Results:
    """The tables of a comparison.

    Attributes:
        budget: limit of passes per image; None without one.
        whole: rows of `measuring.Measured` with ``role`` (estimator or reference) and ``passes``.
        rows: the same within the budget.
        estimators: see `audit.estimator_table`.
        ratios: see `audit.ratio_table`.
        unsolved: see `audit.open_table`.
        correlations: see `audit.correlation_table`; estimators only, no references.
        curves: see `anytime.curves`.
        remarks: see `remarks.remark`; always without the budget.
    """

    budget: int | None
    whole: pd.DataFrame
    rows: pd.DataFrame
    estimators: pd.DataFrame
    ratios: pd.DataFrame
    unsolved: pd.DataFrame
    correlations: pd.DataFrame
    curves: pd.DataFrame
    remarks: list[Remark]


def evaluate(
    measured: Measured, references: Sequence[str] = (), leaving: Sequence[str] = (), budget: int | None = None
) -> Results:
    """Compute the tables.

    Args:
        references: estimators that only enter the envelope.
        leaving: estimators that are each excluded from a further envelope.
        budget: compare the best verified distances within a number of passes per image; the envelope keeps all.
    """
    role = measured.rows["estimator"].isin(list(references)).map({True: "reference", False: "estimator"})
    whole = measured.rows.assign(role=role, passes=measured.rows["forwards"] + measured.rows["backwards"])
    rows = whole if budget is None else within_budget(whole, measured.traces, budget)
    return Results(
        budget=budget,
        whole=whole,
        rows=rows,
        estimators=estimator_table(rows, whole),
        ratios=ratio_table(rows, whole, leaving),
        unsolved=open_table(whole),
        correlations=correlation_table(rows[rows["role"] == "estimator"]),
        curves=curves(whole, measured.traces),
        remarks=remark(estimator_table(whole), ratio_table(whole)),
    )
