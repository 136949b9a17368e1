"""Trust in estimators: the bias of each against the envelope, and verdicts that depend on the estimator."""

from __future__ import annotations

import pandas as pd

from harness.statistics.observations.verdicts import NOT_SUPPORTED, SUPPORTED, UNDECIDED

VERDICT_COLUMNS = (
    "observation",
    "claim",
    "run",
    "estimator",
    SUPPORTED,
    NOT_SUPPORTED,
    UNDECIDED,
    "untested",
    "verdict",
)
BIAS_COLUMNS = ("run", "estimator", "norm", "split", "first_epoch", "first", "last_epoch", "last", "apart")
MIXED = "mixed"


def verdicts_by_estimator(findings: pd.DataFrame) -> pd.DataFrame:
    """One row per claim, run and estimator with the number of tests of each verdict, in `VERDICT_COLUMNS`.

    Only questions (norm, split, measure, epochs) that were tested for all estimators of the claim and run count.
    Estimators that were measured at fewer epochs, or in one norm, are therefore compared on the same questions.
    ``verdict`` is that of all tests, or ``mixed``. Tests that could not be made are counted in ``untested`` and do not
    affect ``verdict``.

    Args:
        findings: rows of `harness.statistics.observations.verdicts.FINDING_COLUMNS`; rows without an estimator are
            left out.
    """
    rows = []
    shared = _asked_of_all(findings[findings["estimator"] != ""])
    for (observation, claim, run, estimator), group in shared.groupby(
        ["observation", "claim", "run", "estimator"], sort=False
    ):
        tested = group[group["effect"] != ""]
        counts = {name: int((tested["verdict"] == name).sum()) for name in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)}
        kinds = [name for name, count in counts.items() if count]
        verdict = UNDECIDED if not kinds else kinds[0] if len(kinds) == 1 else MIXED
        key = {"observation": observation, "claim": claim, "run": run, "estimator": estimator}
        rows.append(key | counts | {"untested": len(group) - len(tested), "verdict": verdict})
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS))


def _asked_of_all(findings: pd.DataFrame) -> pd.DataFrame:
    claim = ["observation", "claim", "run"]
    estimators = findings.groupby(claim)["estimator"].transform("nunique")
    asked = findings.groupby([*claim, "norm", "split", "measure", "epochs"])["estimator"].transform("nunique")
    return findings[asked == estimators]


def contradictions(findings: pd.DataFrame) -> list[str]:
    """Questions (norm, split, epochs) that one estimator supports and another contradicts, as text.

    An undecided test neither supports nor contradicts.

    Args:
        findings: rows of one claim and run.
    """
    questions: dict[str, dict[str, None]] = {}
    decided = findings[(findings["estimator"] != "") & findings["verdict"].isin([SUPPORTED, NOT_SUPPORTED])]
    for (norm, split, _, epochs), group in decided.groupby(["norm", "split", "measure", "epochs"], sort=False):
        if group["verdict"].nunique() > 1:
            sides = [
                f"{verdict} by {', '.join(group.loc[group['verdict'] == verdict, 'estimator'])}"
                for verdict in (SUPPORTED, NOT_SUPPORTED)
            ]
            questions.setdefault("; ".join(sides), {})[f"{norm} {split}, epochs {epochs}"] = None
    return [f"{sides} ({'; '.join(places)})" for sides, places in questions.items()]


def bias_trend(ratios: pd.DataFrame) -> pd.DataFrame:
    """Each estimator's ratio to the envelope at the first measured epoch from 1 on and at the last.

    In `BIAS_COLUMNS` without the run. ``apart`` is True where the two 95% intervals do not overlap: part of the
    estimator's curve is then its own bias.

    Args:
        ratios: rows of `harness.statistics.tables.estimator_ratios`.
    """
    rows = []
    for (estimator, norm, split), group in ratios.groupby(["estimator", "norm", "split"], sort=False):
        later = group[group["epoch"] >= 1].sort_values("epoch")
        if len(later) < 2:
            continue
        first, last = later.iloc[0], later.iloc[-1]
        apart = bool(first["high"] < last["low"] or last["high"] < first["low"])
        key = {"estimator": estimator, "norm": norm, "split": split}
        ends = {
            "first_epoch": first["epoch"],
            "first": first["ratio"],
            "last_epoch": last["epoch"],
            "last": last["ratio"],
        }
        rows.append(key | ends | {"apart": apart})
    return pd.DataFrame(rows, columns=list(BIAS_COLUMNS[1:]))
