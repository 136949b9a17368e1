"""``docs/reproduction.md``: the paper's figures and claims beside ours, from the stored tables and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from benchmarks.reproduce import questions
from benchmarks.reproduce.claims import Claim, Row
from benchmarks.reproduce.collecting import write_tables
from benchmarks.reproduce.paper import CLAIMS
from benchmarks.reproduce.stored import Stored, number
from harness.store.files import write_atomically

OBSERVATIONS = {
    1: "Observation 1: standard training moves the boundary closer",
    2: "Observation 2: adversarial training prevents it",
    3: "Observation 3: misclassified images lie closer",
}
# figure of the paper, what it shows, group, picture
FIGURES = (
    ("1", "error and margins, standard training", "fashion-mnist-cnn", "fashion-mnist-cnn-standard-margins"),
    ("2", "the same, PGD training", "fashion-mnist-cnn", "fashion-mnist-cnn-pgd-margins"),
    ("3", "distributions of L2 margins, training images", "fashion-mnist-cnn", "distributions-l2"),
    ("4", "correct and incorrect images", "fashion-mnist-cnn", "fashion-mnist-cnn-standard-correctness"),
    ("5", "flow, whole training set", "fashion-mnist-cnn", "fashion-mnist-cnn-standard-flow-train"),
    ("6", "correct and incorrect images, PGD training", "fashion-mnist-cnn", "fashion-mnist-cnn-pgd-correctness"),
    ("7", "MNIST, dense, standard training", "mnist-dense", "mnist-dense-standard-margins"),
    ("8 and 9", "MNIST, dense, PGD training", "mnist-dense", "mnist-dense-pgd-margins"),
    ("10", "correct and incorrect images of MNIST, its appendix", "mnist-dense", "mnist-dense-standard-correctness"),
    ("10", "of Fashion-MNIST, its caption", "fashion-mnist-dense", "fashion-mnist-dense-standard-correctness"),
    ("11", "distributions of L∞ margins, MNIST, dense", "mnist-dense", "distributions-linf"),
)
NOTES = "notes.md"
OPENING = """# The paper again

Mickisch et al. 2020, [arXiv 2002.01810](https://arxiv.org/abs/2002.01810), repeated: what was run, each claim with what
we measured, the open questions, and each figure. `python -m benchmarks.reproduce` runs
[`benchmarks/reproduce.toml`](../benchmarks/reproduce.toml); with `--page` it makes this page again from the tables in
[`reproduction/`](reproduction). What a test is and what its verdict means: [`statistics.md`](statistics.md). Rows that
are not called a test are read off the curves of these runs and say nothing of others."""
VERDICTS = """## Every claim

Verdicts by DeepFool, the paper's estimator / by the nearest of our estimators (the envelope, or `cascade`), where there
is one."""


def write_page(stored: Stored, page: Path) -> None:
    """Write the page, and ``claims.csv`` with every row of it beside the stored tables.

    Raises:
        StoreError: nothing has been collected, or a table is damaged.
    """
    rows = {claim.key: claim.rows(stored) for claim in CLAIMS}
    flat = [{"claim": key, **dataclasses.asdict(row)} for key, own in rows.items() for row in own]
    tables = dict(_tables(stored))
    write_tables(stored.folder, {"claims": pd.DataFrame(flat), **{name: t for name, (_, t) in tables.items()}})
    parts = [
        *_opening(stored),
        *_claims(stored, rows),
        *_answers(tables, stored.folder.name),
        *_figures(stored, page.parent),
    ]
    text = "\n\n".join(parts) + "\n"
    write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"))


def _tables(stored: Stored) -> Iterator[tuple[str, tuple[str, pd.DataFrame]]]:
    """File name -> heading and table."""
    yield (
        "over-estimates",
        (
            "By how much DeepFool over-estimates: its average over that of the nearest other estimator, test images",
            questions.over_estimates(stored),
        ),
    )
    yield (
        "verdicts-by-estimator",
        (
            "Verdicts that depend on the estimator (of all tests of a claim, both norms and splits)",
            questions.changed_verdicts(stored),
        ),
    )
    yield (
        "domains",
        (
            "Without the pixel range: DeepFool's free margins over its boxed ones, test images",
            questions.domains(stored),
        ),
    )
    yield (
        "detection",
        (
            "Does the margin tell misclassified test images? Areas under the ROC curve at the last epoch",
            questions.detection(stored),
        ),
    )
    yield (
        "calibrations",
        (
            "Expected calibration error of the test set, and its correlation with DeepFool's average margin",
            questions.calibration(stored),
        ),
    )
    yield (
        "trainings",
        (
            "Other losses and trainings: DeepFool's averages on test images",
            questions.trainings(stored, "fashion-mnist-cnn-trainings"),
        ),
    )
    yield (
        "random-directions",
        (
            "Random directions that change the class within so many times DeepFool's margin, last epoch, test images",
            questions.directions(stored),
        ),
    )
    yield (
        "lower-bounds",
        (
            "Certified lower bounds: average bound to average distance of the same test images (mean of their ratios)",
            questions.brackets(stored),
        ),
    )
    yield (
        "certain",
        (
            "Which observations hold wherever the margins of the certified test images are between their bounds",
            questions.certain(stored),
        ),
    )


def _opening(stored: Stored) -> Iterator[str]:
    yield OPENING
    notes = stored.folder / NOTES
    if notes.exists():
        yield notes.read_text(encoding="utf-8").strip()
    yield "## What was run"
    yield _markdown(pd.DataFrame(_runs(stored)))
    waiting = [group.title for group in stored.study.groups if group not in stored.groups()]
    if waiting:
        yield f"Planned and not run yet: {'; '.join(waiting)}."


def _runs(stored: Stored) -> Iterator[dict[str, str]]:
    names = dict.fromkeys(run for group in stored.groups() for run in group.runs)
    for run in names:
        manifest = json.loads((stored.folder / "runs" / run / "manifest.json").read_text(encoding="utf-8"))
        config, errors = manifest["config"], {split: stored.errors(run, split) for split in ("train", "test")}
        whole = stored.run(run, "summary")
        pgd = (
            f", {config['pgd_steps']} PGD steps, ε {number(config['pgd_epsilon'])}"
            if config["training"] == "pgd"
            else ""
        )
        yield {
            "run": f"[`{run}`]({stored.folder.name}/runs/{run}/manifest.json)",
            "training": f"{config['training']}{pgd}",
            "loss": config["loss"],
            "epochs": str(int(errors["test"].index[-1])),
            "images": " + ".join(str(int(n)) for n in whole.groupby("split", sort=False)["count"].max()),
            "every epoch by": ", ".join(stored.estimators(run)),
            "error, train and test": " and ".join(f"{100 * errors[split].iloc[-1]:.2f}%" for split in errors),
        }


def _claims(stored: Stored, rows: dict[str, list[Row]]) -> Iterator[str]:
    groups = [group.name for group in stored.groups()]
    yield VERDICTS
    for observation, title in OBSERVATIONS.items():
        own = [claim for claim in CLAIMS if claim.observation == observation]
        yield f"### {title}"
        shown = [name for name in groups if any(row.group == name for claim in own for row in rows[claim.key])]
        lines = [{"claim": _anchor(claim), **{name: _cell(rows[claim.key], name) for name in shown}} for claim in own]
        yield _markdown(pd.DataFrame(lines))
        for claim in own:
            measured = claim.measured[0].upper() + claim.measured[1:]
            yield f'<a id="{claim.key}"></a>**{claim.sentence}** ({claim.place}) *{measured}.*'
            table = [dataclasses.asdict(row) for row in rows[claim.key]]
            yield _markdown(pd.DataFrame(table)) if table else "Not measured yet."


def _anchor(claim: Claim) -> str:
    return f"[{claim.sentence}](#{claim.key})"


def _cell(rows: Iterable[Row], group: str) -> str:
    by = {row.estimator: row.verdict for row in rows if row.group == group}
    first = by.get("deepfool", by.get(""))
    best = by.get("envelope", by.get("cascade"))
    return " / ".join(v for v in (first, best) if v) or "–"


def _answers(tables: dict[str, tuple[str, pd.DataFrame]], folder: str) -> Iterator[str]:
    yield "## The open questions"
    for name, (heading, table) in tables.items():
        yield f"### {heading}"
        yield _markdown(table) if len(table) else "Not measured yet."
        yield f"[`{name}.csv`]({folder}/{name}.csv)"


def _figures(stored: Stored, beside: Path) -> Iterator[str]:
    yield "## Every figure"
    for figure, shows, group, picture in FIGURES:
        yield f"### Figure {figure}: {shows}"
        path = stored.folder / group / f"{picture}.png"
        there = f"![Figure {figure}, ours: {shows}]({path.relative_to(beside).as_posix()})"
        yield there if path.exists() else "Not run yet."


def _markdown(table: pd.DataFrame) -> str:
    if not len(table):
        return "–"
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[_cell_text(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell_text(value: object) -> str:
    return "–" if value is None or value != value or value == "" else str(value).replace("|", "\\|")
