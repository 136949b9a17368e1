"""Write ``docs/reproduction.md``: verdicts on the paper's claims, from the stored tables and notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from benchmarks.reproduce import questions
from benchmarks.reproduce.claims import Row
from benchmarks.reproduce.paper import CLAIMS
from benchmarks.reproduce.stored import FILE, Stored, number
from harness.store.files import write_atomically
from harness.store.tables import as_csv

OBSERVATIONS = {
    1: "Observation 1: standard training moves the boundary closer",
    2: "Observation 2: adversarial training prevents it",
    3: "Observation 3: misclassified images lie closer",
}
# Markdown for this page; as .txt the site does not render it a second time
NOTES = "notes.txt"
OPENING = """# The paper again

Mickisch et al. 2020, [arXiv 2002.01810](https://arxiv.org/abs/2002.01810), repeated.
`python -m benchmarks.reproduce` runs `benchmarks/reproduce.toml`; with `--page` it
makes this page again from [`{file}`]({folder}/{file})."""
VERDICTS = """## Verdicts

By DeepFool, the paper's estimator / by the nearest of our estimators (the envelope, or `cascade`); one verdict where
they agree or only one was tested. [`statistics.md`](statistics.md) says what a test is and what its verdict means; rows
without a test are read off the curves of these runs and say nothing of others. Every row, with what was looked at,
effects and intervals: [`claims.csv`]({folder}/claims.csv)."""
# the table shown on the page, and its shown columns
OVER_ESTIMATES, SHOWN = "over-estimates", ["run", "norm", "epoch 1", "epoch 20", "epoch 40"]


def write_page(stored: Stored, page: Path) -> None:
    """Write the page, and the tables that it links to next to the stored ones.

    Raises:
        StoreError: nothing has been collected, or a table is damaged.
    """
    rows = {claim.key: claim.rows(stored) for claim in CLAIMS}
    tables = dict(_tables(stored))
    for name, table in {"claims": _flat(rows), **{name: table for name, (_, table) in tables.items()}}.items():
        _write(stored.folder / f"{name}.csv", as_csv(table, float_format="%.6g"))
    parts = [*_opening(stored), *_claims(stored, rows), *_answers(tables, stored.folder.name), *_figures(stored)]
    _write(page, "\n\n".join(parts) + "\n")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flat(rows: dict[str, list[Row]]) -> pd.DataFrame:
    """Every row of every claim, with the paper's sentence and the measured quantity."""
    return pd.DataFrame(
        [
            {"claim": claim.key, "observation": claim.observation, "sentence": claim.sentence, "place": claim.place}
            | {"criterion": claim.measured}
            | dataclasses.asdict(row)
            for claim in CLAIMS
            for row in rows[claim.key]
        ]
    )


def _tables(stored: Stored) -> Iterator[tuple[str, tuple[str, pd.DataFrame]]]:
    """File name -> heading and table."""
    yield "runs", ("What was run: training, epochs, estimators and errors", pd.DataFrame(_runs(stored)))
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
    yield OPENING.format(file=FILE, folder=stored.folder.name)
    notes = stored.folder / NOTES
    if notes.exists():
        yield notes.read_text(encoding="utf-8").strip()
    waiting = [group.title for group in stored.study.groups if group not in stored.groups()]
    if waiting:
        yield f"Planned and not run yet: {'; '.join(waiting)}."


def _runs(stored: Stored) -> Iterator[dict[str, str]]:
    for run in dict.fromkeys(run for group in stored.groups() for run in group.runs):
        whole = stored.run(run, "summary")
        config, errors = stored.config(run), {split: stored.errors(run, split) for split in ("train", "test")}
        pgd = f", {config['pgd_steps']} PGD steps, ε {number(config['pgd_epsilon'])}"
        yield {
            "run": run,
            "training": f"{config['training']}{pgd if config['training'] == 'pgd' else ''}",
            "loss": config["loss"],
            "epochs": str(int(errors["test"].index[-1])),
            "images": " + ".join(str(int(n)) for n in whole.groupby("split", sort=False)["count"].max()),
            "every epoch by": ", ".join(stored.estimators(run)),
            "error, train and test": " and ".join(f"{100 * errors[split].iloc[-1]:.2f}%" for split in errors),
        }


def _claims(stored: Stored, rows: dict[str, list[Row]]) -> Iterator[str]:
    groups = [group.name for group in stored.groups()]
    yield VERDICTS.format(folder=stored.folder.name)
    for observation, title in OBSERVATIONS.items():
        own = [claim for claim in CLAIMS if claim.observation == observation]
        yield f'<a id="observation-{observation}"></a>\n\n### {title}'
        shown = [name for name in groups if any(row.group == name for claim in own for row in rows[claim.key])]
        lines = [{"claim": claim.sentence, **{name: _cell(rows[claim.key], name) for name in shown}} for claim in own]
        yield _markdown(pd.DataFrame(lines))


def _cell(rows: Iterable[Row], group: str) -> str:
    by = {row.estimator: row.verdict.split(":")[0] for row in rows if row.group == group}
    first = by.get("deepfool", by.get(""))
    best = by.get("envelope", by.get("cascade"))
    tested = [verdict for verdict in (first, best) if verdict and verdict != "not tested"]
    return " / ".join(dict.fromkeys(tested)) or "–"


def _answers(tables: dict[str, tuple[str, pd.DataFrame]], folder: str) -> Iterator[str]:
    yield "## The open questions"
    yield "\n".join(f"- {heading}: [`{name}.csv`]({folder}/{name}.csv)" for name, (heading, _) in tables.items())
    heading, table = tables[OVER_ESTIMATES]
    yield f"### {heading}"
    yield _markdown(table.reindex(columns=SHOWN)) if len(table) else "Not measured yet."


def _figures(stored: Stored) -> Iterator[str]:
    yield "## Figures"
    for group in stored.groups():
        for picture, caption in group.pictures.items():
            yield f"### {caption}"
            yield f"![{group.title}]({stored.folder.name}/{group.place(picture).as_posix()})"


def _markdown(table: pd.DataFrame) -> str:
    if not len(table):
        return "–"
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[_cell_text(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell_text(value: object) -> str:
    return "–" if value is None or value != value or value == "" else str(value).replace("|", "\\|")
