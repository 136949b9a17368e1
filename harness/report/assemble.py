"""Assembly of a report's content from the evidence of its runs."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd

from harness.report.cards import image_cards
from harness.report.content import ReportContent, RunContent
from harness.report.prose.brackets import bracket_sentences
from harness.report.prose.sentences import headlines, trust_sentences
from harness.report.prose.warm import warm_sentences
from harness.report.prose.warnings import undecided, warnings_of
from harness.statistics.brackets import BRACKET_COLUMNS, bracket_table, bracketed, proved
from harness.statistics.observations.evidence import Evidence
from harness.statistics.observations.pairing import Measured, couples, find_pairs, seed_groups
from harness.statistics.panels import Panel
from harness.statistics.side_by_side import side_by_side
from harness.statistics.tables import boundary_changes, boundary_classes, class_margins, estimator_ratios, image_paths
from harness.statistics.trust import BIAS_COLUMNS, bias_trend, verdicts_by_estimator
from harness.statistics.warm import SAVING_COLUMNS, cold_samples, warm_pairs, warm_ratios, warm_savings
from harness.store import environment
from harness.store.tables import concatenate


def assemble(evidence: Evidence) -> ReportContent:
    """The content of the page."""
    names = [one.run.name for one in evidence.measured]
    runs = [run_content(one, evidence.composition) for one in evidence.measured]
    pairs = {one.run.name: warm_pairs(one.run.manifest.get("estimators", ())) for one in evidence.measured}
    samples = {text for one in evidence.measured for text in cold_samples(one.run)}
    # cold samples are left out: they were measured, and so tested, at fewer epochs than the other estimators
    verdicts = verdicts_by_estimator(evidence.findings[~evidence.findings["estimator"].isin(samples)])
    biases = [bias_trend(run.ratios).assign(run=run.name) for run in runs]
    bias = concatenate(biases, BIAS_COLUMNS)[list(BIAS_COLUMNS)]
    saved = [warm_savings(run.warm, run.margins).assign(run=run.name) for run in runs]
    brackets = concatenate([run.brackets.assign(run=run.name) for run in runs], ["run", *BRACKET_COLUMNS])
    proofs = _proofs(evidence)
    columns = ["run", *SAVING_COLUMNS]
    savings = concatenate(saved, columns)[columns]
    return ReportContent(
        title=f"Margins of {names[0]}" if len(names) == 1 else f"Margins of {len(names)} runs",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=environment()["versions"].get("margin-harness", "not installed"),
        runs=runs,
        findings=evidence.findings,
        descriptions=evidence.descriptions,
        headlines=headlines(evidence.findings),
        warnings=[*evidence.warnings, *undecided(evidence.findings)],
        trust=trust_sentences(bias, evidence.findings),
        verdicts=verdicts,
        biases=bias,
        warm=warm_sentences(savings, pairs),
        savings=savings,
        bracketed=bracket_sentences(brackets, proofs),
        proofs=proofs,
        side_by_side=side_by_side(evidence.measured),
    )


def run_content(one: Measured, composition: pd.DataFrame) -> RunContent:
    """The tables of one run for the static and the interactive figures."""
    curves = distances(one)
    return RunContent(
        name=one.run.name,
        training=one.run.training,
        manifest=one.run.manifest,
        warnings=warnings_of(one),
        summary=one.summary,
        epochs=one.run.epochs,
        margins=one.margins,
        ratios=estimator_ratios(curves),
        classes=class_margins(curves),
        boundary=boundary_classes(curves),
        changes=boundary_changes(curves),
        reliability=one.reliability,
        calibration=one.calibration,
        paths=image_paths(curves),
        composition=composition[composition["run"] == one.run.name],
        correctness=one.correctness,
        images=image_cards(one.run),
        warm=warm_ratios(one.run.margins, warm_pairs(one.run.manifest.get("estimators", ()))),
        brackets=bracket_table(bracketed(one.run.bounds, one.run.margins)),
    )


def _proofs(evidence: Evidence) -> pd.DataFrame:
    """The observations by brackets; observation 2 compares runs of the same seed."""
    named = {one.run.name: one for one in evidence.measured if len(one.run.bounds)}
    rows = {name: (one.run.training, bracketed(one.run.bounds, one.run.margins)) for name, one in named.items()}
    pairs = [
        (one.run.name, other.run.name)
        for standard, adversarial in find_pairs(seed_groups(named.values()))
        for one, other in couples(standard, adversarial)
    ]
    return proved(rows, pairs)


def distances(one: Measured) -> list[Panel]:
    """The panels of the measure ``distance``, which the figures show; the tests use both measures."""
    return [panel for panel in one.panels if panel.measure == "distance"]
