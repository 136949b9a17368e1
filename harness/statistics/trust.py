"""Which estimator can be trusted: how far each over-estimates, and whose verdicts differ."""

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
    """One row for every claim, run and estimator: how many of its tests came out how, in `VERDICT_COLUMNS`.

    Only questions (norm, split, measure, epochs) that all estimators of the claim and run were asked count, so that
    estimators that were measured at fewer epochs, or in one norm, are compared on the same ones. ``verdict`` is that of
    all tests, or ``mixed``; tests that could not be made are counted in ``untested`` and do not count against it.

    Args:
        findings: rows of `harness.statistics.observations.verdicts.FINDING_COLUMNS`; those without an
            estimator are left out.
    """
    rows = []
    own = _asked_of_all(findings[findings["estimator"] != ""])
    for (observation, claim, run, estimator), group in own.groupby(
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
    """Questions (norm, split, epochs) that one estimator supports and another does not, in words; undecided is neither.

    Args:
        findings: rows of one claim and run.
    """
    questions: dict[str, dict[str, None]] = {}
    own = findings[(findings["estimator"] != "") & findings["verdict"].isin([SUPPORTED, NOT_SUPPORTED])]
    for (norm, split, _, epochs), group in own.groupby(["norm", "split", "measure", "epochs"], sort=False):
        if group["verdict"].nunique() > 1:
            sides = [
                f"{verdict} by {', '.join(group.loc[group['verdict'] == verdict, 'estimator'])}"
                for verdict in (SUPPORTED, NOT_SUPPORTED)
            ]
            questions.setdefault("; ".join(sides), {})[f"{norm} {split}, epochs {epochs}"] = None
    return [f"{sides} ({'; '.join(places)})" for sides, places in questions.items()]


def bias_trend(ratios: pd.DataFrame) -> pd.DataFrame:
    """Each estimator's ratio to the envelope at the first measured epoch from 1 on and at the last.

    In `BIAS_COLUMNS` but for the run. ``apart`` says whether the two 95% bands do not overlap: then part
    of the estimator's curve is its own bias.

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
