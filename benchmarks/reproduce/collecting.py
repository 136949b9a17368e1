"""What is kept of a study: tables small enough to commit, and the figures. The page is made of nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from benchmarks.reproduce.around import around
from benchmarks.reproduce.study import Group, Study
from harness.report.build import evaluate, write_report
from harness.report.content import ReportContent, RunContent
from harness.runs import Run, read_runs
from harness.store.files import as_csv, write_atomically

SUMMARY_COLUMNS = (
    *("epoch", "split", "subset", "estimator", "norm", "count", "found", "avg", "se", "median"),
    *("after_noise", "not_found"),
)
PAIR_FIGURES = ("margins", "correctness", "flow-train", "ratios", "calibration")
RUN_FIGURES = ("margins",)
# runs of a group up to which each has a figure of its own
FEW = 5
GROUP_FIGURES = ("distributions-l2", "distributions-linf")
# of the measures, what the page speaks of: the distance after refinement
MEASURES = ("distance", "")


def collect(study: Study, group: Group, runs: Path, out: Path) -> None:
    """Report a group's runs together, and keep its tables and figures under ``out``.

    A run's own tables are those of the first group that it is in: the envelope depends on the company.

    Raises:
        StoreError: a run that is not there, or damaged.
    """
    read = read_runs([runs / name for name in group.runs])
    content = evaluate(read)
    page = runs / f"{group.name}.html"
    write_report(read, content, page)
    tables = {
        "observations": _of_distance(content.findings),
        "descriptions": _of_distance(content.descriptions),
        "verdicts": content.verdicts,
        "biases": content.biases,
        "proved": content.proofs,
        "composition": pd.concat([_composition(run) for run in content.runs], ignore_index=True),
    }
    write_tables(out / group.name, tables)
    first = study.first_of(group)
    for run, own in zip(read, content.runs, strict=True):
        if run.name not in first:
            continue
        write_tables(out / "runs" / run.name, _run_tables(run, own))
        shutil.copy(run.folder.manifest, out / "runs" / run.name)
    _copy_figures(content, page.with_name(f"{page.stem}-figures"), out / group.name)


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """One CSV file each, six significant digits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        _write(folder / f"{name}.csv", as_csv(table, float_format="%.6g"))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _run_tables(run: Run, content: RunContent) -> dict[str, pd.DataFrame]:
    summary = content.summary
    found = {
        "summary": summary.loc[summary["estimator"].isin(run.parameters), list(SUMMARY_COLUMNS)],
        "epochs": run.epochs,
        "calibration": content.calibration,
        "ratios": content.ratios,
        "confidence": confidence(run.predictions),
        "flow": pd.concat([flow(split, table) for split, table in content.correctness.items()], ignore_index=True),
    }
    if len(content.brackets):
        found["brackets"] = content.brackets
    extra = around(run.folder.path)
    return found | {path.stem: pd.read_csv(path) for path in sorted(extra.glob("*.csv"))}


def confidence(predictions: pd.DataFrame) -> pd.DataFrame:
    """Average confidence of correct and incorrect images of the whole sets, at every epoch."""
    rows = predictions.assign(correct=predictions["prediction"] == predictions["label"])
    groups = rows.groupby(["epoch", "split", "correct"], observed=True)["confidence"]
    return groups.agg(images="size", confidence="mean").reset_index()


def flow(split: str, correctness: pd.DataFrame) -> pd.DataFrame:
    """At every epoch the incorrect images of the whole set, and what the epoch before and the first made of them.

    ``incorrect_before`` are those that were so at the epoch before too; ``of_first_now_correct`` is the share of the
    images incorrect at epoch 1 that are correct now.

    Args:
        correctness: ``(image x epoch)`` bool.
    """
    wrong = ~correctness
    rows = []
    for before, epoch in zip([None, *wrong.columns], wrong.columns, strict=False):
        row = {"split": split, "epoch": epoch, "images": len(wrong), "incorrect": int(wrong[epoch].sum())}
        row["incorrect_before"] = None if before is None else int((wrong[epoch] & wrong[before]).sum())
        first = 1 in wrong and epoch >= 1 and wrong[1].any()
        row["of_first_now_correct"] = float((~wrong.loc[wrong[1], epoch]).mean()) if first else None
        rows.append(row)
    return pd.DataFrame(rows)


def _composition(run: RunContent) -> pd.DataFrame:
    """The changes of a subset's average from epoch to epoch, added up from epoch 1 to the last."""
    own = _of_distance(run.composition)
    key = ["run", "split", "estimator", "norm", "subset"]
    changes = ["change", "stayers", "entrants", "leavers"]
    return own.groupby(key, sort=False)[changes].sum().reset_index()


def _of_distance(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["measure"].isin(MEASURES)].drop(columns=["measure"])


def _copy_figures(content: ReportContent, source: Path, target: Path) -> None:
    """Those of a pair all, of several runs the margins, of seeds of one set-up none."""
    runs = [run.name for run in content.runs]
    wanted = PAIR_FIGURES if len(runs) <= 2 else RUN_FIGURES if len(runs) <= FEW else ()
    names = {f"{run}-{name}.png": source / quote(run, safe="") / f"{name}.png" for run in runs for name in wanted}
    if len(runs) == 2:
        names |= {f"{name}.png": source / f"{name}.png" for name in GROUP_FIGURES}
    for kept, drawn in names.items():
        shutil.copy(drawn, target / kept)
