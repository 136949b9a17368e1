"""Text sections of the page: observations with their tests, tables of estimators, and the manifests of the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.content import Headline, ReportContent, RunContent
from harness.report.tables import FINDINGS_PRINTED, Table, findings_first
from harness.statistics.excess import END_COLUMNS, excess_at_ends
from harness.store.tables import concatenate

TITLES = {
    1: "Standard training moves the decision boundary closer",
    2: "Adversarial training prevents it",
    3: "Misclassified images are closer to the boundary",
}
MARKS = {"supported": "✓", "not supported": "✗", "undecided": "?", "mixed": "±", "not tested": "–"}
SIDE_PRINTED = ("run", "norm", "split", "estimator", "error", "average", "se", "ratio", "low", "high")
# fields of the manifest that have a section of their own, in order; the others follow
FACTS = {
    "config": "Configuration",
    "command": "Command",
    "seeds": "Seeds",
    "estimators": "Estimators",
    "certifiers": "Certifiers",
    "data": "Checksums of the data (SHA-256)",
    "versions": "Versions",
    "machine": "Machine",
    "device": "Device",
    "fingerprint": "Fingerprint",
}


@dataclass(frozen=True)
class Observation:
    """One of the paper's observations: headlines, then the tests and the numbers without a verdict."""

    number: int
    title: str
    headlines: list[Headline]
    tables: list[Table]


def observations(content: ReportContent) -> list[Observation]:
    """The three observations with their headlines and tables."""
    parts = []
    for number, title in TITLES.items():
        tests = _of(content.findings, number)
        numbers = _of(content.descriptions, number)
        count = "1 test" if len(tests) == 1 else f"{len(tests)} tests"
        tables = [
            Table(
                f"findings-{number}",
                f"{count} with intervals",
                findings_first(tests),
                first=20,
                printed=FINDINGS_PRINTED,
            ),
            Table(f"descriptions-{number}", "Numbers without a verdict", numbers, first=20),
        ]
        nothing = Headline(number, "not tested", "There is no data to test it on.", [])
        headlines = content.headlines.get(number) or [nothing]
        parts.append(Observation(number, title, headlines, [table for table in tables if len(table.frame)]))
    return parts


def trust_tables(content: ReportContent) -> list[Table]:
    """Tables of each estimator's estimated excess, of its ratio to the envelope, and of its verdicts."""
    excess = [excess_at_ends(run.summary).assign(run=run.name) for run in content.runs]
    columns = ["run", *END_COLUMNS]
    candidates = [
        Table(
            "excess",
            "Estimated excess of the averages over the margins, at epoch 1 and the last",
            concatenate(excess, columns)[columns],
            first=20,
        ),
        Table("biases", "Each estimator over the envelope, at epoch 1 and the last", content.biases, first=20),
        Table("verdicts", "Verdicts by estimator", content.verdicts, first=20),
    ]
    return [table for table in candidates if len(table.frame)]


def side_tables(content: ReportContent) -> list[Table]:
    """The table of all runs at their last epochs; the rows of the first estimator are in the HTML."""
    rows = content.side_by_side
    first = int((rows["estimator"] == rows["estimator"].iloc[0]).sum()) if len(rows) else 0
    title = "Average margins at the last epoch, and their ratios to the first run's"
    return [Table("side-by-side", title, rows, first, printed=SIDE_PRINTED, open=True)] if len(rows) else []


def _of(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    if not len(rows):
        return rows
    return rows[rows["observation"] == number].drop(columns="observation").reset_index(drop=True)


def facts(run: RunContent) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as titled lists of names and values."""
    rest = {name: name for name in run.manifest if name not in FACTS}
    alone = [(name, worded(run.manifest[name])) for name in rest]
    sections = [(title, _pairs(name, run.manifest[name])) for name, title in FACTS.items() if run.manifest.get(name)]
    return [(title, pairs) for title, pairs in [*sections, ("Other", alone)] if pairs]


def _pairs(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [(str(key), worded(inner)) for key, inner in value.items()]
    if name == "command":
        return [("python", " ".join(str(word) for word in value))]
    if name in ("estimators", "certifiers"):
        return [(str(entry.get("estimator", "")), worded(entry.get("parameters", entry))) for entry in value]
    return [(name, worded(value))]


def worded(value: Any) -> str:
    """The text of a manifest's value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {worded(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(worded(inner) for inner in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return value if isinstance(value, str) else json.dumps(value)


def differences(runs: Sequence[RunContent]) -> tuple[list[str], list[list[str]]]:
    """Names of the options in which the runs differ, and their values, one row per run."""
    options = [{**run.manifest.get("fingerprint", {}), **run.manifest.get("config", {})} for run in runs]
    names = list(dict.fromkeys(name for option in options for name in option))
    differing = [name for name in names if len({worded(option.get(name)) for option in options}) > 1]
    return differing, [[worded(option.get(name)) for name in differing] for option in options]
