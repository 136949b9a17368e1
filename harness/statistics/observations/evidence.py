"""Evidence on the three observations from runs: tests with verdicts, and numbers without a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.config.run_config import ADVERSARIAL
from harness.runs import Run
from harness.statistics.averages import summarise
from harness.statistics.calibration import calibration_error, reliability
from harness.statistics.composition import composition_table
from harness.statistics.envelope import complete_estimators, envelope
from harness.statistics.excess import with_others
from harness.statistics.observations import observation1, observation2, observation3
from harness.statistics.observations.pairing import (
    Measured,
    couples,
    find_pairs,
    notes,
    pool,
    pool_name,
    refuse_unequal,
    seed_groups,
)
from harness.statistics.observations.verdicts import FINDING_COLUMNS, Trial, judge
from harness.statistics.panels import Panel, panels
from harness.statistics.tables import confidence_correlation, correctness
from harness.statistics.trends import DESCRIPTION_COLUMNS, correlation, describe, describe_trend


@dataclass(frozen=True)
class Evidence:
    """Results of all tests of a report.

    Attributes:
        measured: the runs with their derived tables.
        findings: tests, in `FINDING_COLUMNS`.
        descriptions: numbers without a verdict, in `DESCRIPTION_COLUMNS`.
        composition: see `harness.statistics.composition`.
        warnings: sentences on how runs were put together.
    """

    measured: list[Measured]
    findings: pd.DataFrame
    descriptions: pd.DataFrame
    composition: pd.DataFrame
    warnings: list[str]


def gather(runs: list[Run]) -> Evidence:
    """All tests of one report.

    The envelope is over the estimators that all runs have at all their measured epochs with equal parameters, so that
    the envelopes of different runs are comparable. Five or more runs that differ by seed only are pooled. The tests of
    the single runs are then left out, because each is about one network only.
    """
    shared, warnings = _shared_estimators(runs)
    measured = [_derive(run, shared) for run in runs]
    groups = seed_groups(measured)
    trials = [trial for group in groups for trial in _within(group)]
    pairs = find_pairs(groups)
    trials += [trial for pair in pairs for trial in _between(*pair)]
    warnings += notes(measured, groups, pairs)
    tables = [judge([trial for trial in trials if trial.observation == number]) for number in (1, 2, 3)]
    findings = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    descriptions = pd.DataFrame([row for one in measured for row in _describe(one)], columns=list(DESCRIPTION_COLUMNS))
    compositions = composition_table([panel for one in measured for panel in one.panels])
    return Evidence(measured, findings[list(FINDING_COLUMNS)], descriptions, compositions, warnings)


def _shared_estimators(runs: list[Run]) -> tuple[dict[str, list[str]], list[str]]:
    """Norm -> estimators that the envelope is over, and warnings on estimators that are left out of it."""
    norms = list(dict.fromkeys(str(norm) for run in runs for norm in run.margins["norm"].unique()))
    shared, warnings = {}, []
    for norm in norms:
        having = [run for run in runs if (run.margins["norm"] == norm).any()]
        complete = [complete_estimators(run.margins, norm) for run in having]
        everywhere = [name for name in complete[0] if all(name in other for other in complete[1:])]
        shared[norm] = [n for n in everywhere if len({run.parameters.get(n, "") for run in having}) == 1]
        every = {str(name) for run in having for name in run.margins.loc[run.margins["norm"] == norm, "estimator"]}
        absent = sorted(every - set(shared[norm]))
        if absent:
            warnings.append(
                f"{', '.join(absent)} ({norm}) not measured at every epoch of every run with equal parameters, and so "
                "no part of the envelope"
            )
    return shared, warnings


def _derive(run: Run, shared: dict[str, list[str]]) -> Measured:
    best = envelope(run.margins, shared)
    margins = pd.concat([run.margins, best], ignore_index=True) if len(best) else run.margins
    predictions = run.predictions
    if not len(predictions) and len(margins):
        # every estimator and norm has rows of the same images
        predictions = margins.drop_duplicates(["epoch", "split", "image"])
    bins = reliability(predictions)
    return Measured(
        run=run,
        margins=margins,
        summary=with_others(summarise(margins)),
        panels=list(panels(run.name, margins)) if len(margins) else [],
        correctness=correctness(predictions),
        reliability=bins,
        calibration=calibration_error(bins),
    )


def _within(group: list[Measured]) -> list[Trial]:
    """Tests of observations 1 and 3."""
    each = []
    for one in group:
        trials = list(observation3.trials(one.panels))
        trials += [observation3.persistence(one.run.name, split, table) for split, table in one.correctness.items()]
        if one.run.training not in ADVERSARIAL:
            trials += observation1.trials(one.panels)
        each.append(trials)
    return pool(each, group, pool_name(group))


def _between(standard: list[Measured], adversarial: list[Measured]) -> list[Trial]:
    """Tests of observation 2."""
    each, pairs = [], couples(standard, adversarial)
    for one, other in pairs:
        name = f"{other.run.name} / {one.run.name}"
        each.append(list(observation2.trials(one.panels, other.panels, name)))
    together = [one for pair in pairs for one in pair]
    each = [[refuse_unequal(trial, together) for trial in trials] for trials in each]
    return pool(each, together, f"{len(pairs)} seeds of {adversarial[0].run.name} / {standard[0].run.name}")


def _describe(one: Measured) -> list[dict[str, Any]]:
    rows = []
    observation = 2 if one.run.training in ADVERSARIAL else 1
    for panel in one.panels:
        rows += describe_trend(observation, panel, one.run.epochs)
        if observation == 2:
            rows += observation2.describe_change(panel)
        rows += observation3.describe_groups(panel)
        rows += _describe_calibration(panel, one.calibration)
    for split, table in one.correctness.items():
        rows += observation3.describe_persistence(one.run.name, split, table)
    return rows


def _describe_calibration(panel: Panel, calibration: pd.DataFrame) -> list[dict[str, Any]]:
    """Correlation of margins with confidence over images, and with the calibration error over epochs."""
    later = panel.later
    if not len(later):
        return []
    ece = (
        calibration[calibration["split"] == panel.split].set_index("epoch")["ece"].reindex(later).to_numpy(dtype=float)
    )
    span, last = f"{later[0]} → {later[-1]}", str(later[-1])
    ranks = confidence_correlation(panel, int(later[-1]))
    along = correlation(panel.averages[panel.epochs >= 1], ece)
    return [
        describe(3, "rank correlation of margin and confidence over images", panel, last, ranks),
        describe(3, "correlation of the average with the expected calibration error over epochs", panel, span, along),
    ]
