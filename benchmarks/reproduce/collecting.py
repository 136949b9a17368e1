"""Collect a study's tables into one file, and the pictures named by its groups."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks.reproduce.around import around
from benchmarks.reproduce.stored import FILE
from benchmarks.reproduce.study import Group, Study
from benchmarks.reproduce.tables import read_tables, write_tables
from harness.report.build import evaluate, write_report
from harness.report.content import RunContent
from harness.runs import Run, read_runs
from harness.store.files import write_atomically

SUMMARY_COLUMNS = (
    *("epoch", "split", "subset", "estimator", "norm", "count", "found", "avg", "se", "median"),
    *("after_noise", "not_found"),
)
# the measure used on the page: the distance after refinement
MEASURES = ("distance", "")


def collect(study: Study, group: Group, runs: Path, out: Path) -> None:
    """Report the runs of a group together, and store its tables and pictures under ``out``.

    A run's tables are those of the first group that contains it, as the envelope depends on the group.

    Raises:
        StoreError: a run is missing or damaged.
    """
    read = read_runs([runs / name for name in group.runs])
    content = evaluate(read)
    page = runs / f"{group.name}.html"
    write_report(read, content, page)
    tables = {
        (group.name, "observations"): _of_distance(content.findings),
        (group.name, "descriptions"): _of_distance(content.descriptions),
        (group.name, "verdicts"): content.verdicts,
        (group.name, "biases"): content.biases,
        (group.name, "proved"): content.proofs,
        (group.name, "composition"): pd.concat([_composition(run) for run in content.runs], ignore_index=True),
    }
    first = study.first_of(group)
    for run, own in zip(read, content.runs, strict=True):
        if run.name in first:
            tables |= {(run.name, name): table for name, table in _run_tables(run, own).items()}
    path, collected = out / FILE, {of for of, _ in tables}
    kept = read_tables(path) if path.exists() else {}
    write_tables(path, {key: table for key, table in kept.items() if key[0] not in collected} | tables)
    for picture in group.pictures:
        _keep(page.with_name(f"{page.stem}-figures") / f"{picture}.png", out / group.place(picture))


def _run_tables(run: Run, content: RunContent) -> dict[str, pd.DataFrame]:
    summary = content.summary
    found = {
        "summary": summary.loc[summary["estimator"].isin(run.parameters), list(SUMMARY_COLUMNS)],
        "epochs": run.epochs,
        "calibration": content.calibration,
        "ratios": content.ratios,
        "confidence": confidence(run.predictions),
        "flow": pd.concat([flow(split, table) for split, table in content.correctness.items()], ignore_index=True),
        "manifest": pd.DataFrame({"manifest": [run.folder.manifest.read_text(encoding="utf-8")]}),
    }
    if len(content.brackets):
        found["brackets"] = content.brackets
    extra = around(run.folder.path)
    return found | {path.stem: pd.read_csv(path) for path in sorted(extra.glob("*.csv"))}


def confidence(predictions: pd.DataFrame) -> pd.DataFrame:
    """Average confidence of correct and incorrect images of the whole sets at every epoch."""
    rows = predictions.assign(correct=predictions["prediction"] == predictions["label"])
    groups = rows.groupby(["epoch", "split", "correct"], observed=True)["confidence"]
    return groups.agg(images="size", confidence="mean").reset_index()


def flow(split: str, correctness: pd.DataFrame) -> pd.DataFrame:
    """The incorrect images of the whole set at every epoch, compared with the previous and the first epoch.

    ``incorrect_before`` counts those that were also incorrect at the previous epoch. ``of_first_now_correct`` is the
    share of images incorrect at epoch 1 that are now correct.

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
    """The changes of a subset's average from epoch to epoch, summed from epoch 1 to the last."""
    own = _of_distance(run.composition)
    key = ["run", "split", "estimator", "norm", "subset"]
    changes = ["change", "stayers", "entrants", "leavers"]
    return own.groupby(key, sort=False)[changes].sum().reset_index()


def _of_distance(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["measure"].isin(MEASURES)].drop(columns=["measure"])


def _keep(drawn: Path, kept: Path) -> None:
    """Copy a picture in 256 colours, which takes a third of the space without visible loss."""
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    write_atomically(kept, lambda path: few.save(path, "PNG", optimize=True))
