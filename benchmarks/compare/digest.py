"""Several comparisons as Markdown tables: ``python -m benchmarks.compare.digest runs/estimators/* > tables.md``.

`docs/estimators.sh` and `docs/brackets.sh` make the tables of their pages with it. Each folder is an output of
`benchmarks.compare`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.compare.audit import ENVELOPE, EXACT, describe, distances, envelope, ratios
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(prog="python -m benchmarks.compare.digest", description="Tables of comparisons in Markdown.")
    parser.add_argument("folder", nargs="+", type=Path, help="folder that benchmarks.compare wrote")
    parser.add_argument("--estimator", default="deepfool", help="whose error is looked into (default: deepfool)")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="options, versions and machine of all, as JSON")
    given: argparse.Namespace = parser.parse_args(argv)
    missing = [folder for folder in given.folder if not (folder / "margins.csv").exists()]
    if missing:
        print(f"digest: error: expected margins.csv in {missing[0]}, got none; run benchmarks.compare", file=sys.stderr)
        return 2
    for line in digest(given.folder, given.estimator):
        print(line)
    if given.manifest:
        text = json.dumps({folder.name: manifest(folder) for folder in given.folder}, indent=2, ensure_ascii=False)
        write_atomically(given.manifest, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return 0


def manifest(folder: Path) -> dict[str, Any]:
    """The metadata of a comparison, without its tables."""
    facts = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if not (folder / f"{key}.csv").exists()}


def digest(folders: Sequence[Path], culprit: str) -> Iterator[str]:
    """The lines of all tables."""
    against = pd.concat([pd.read_csv(folder / "ratios.csv") for folder in folders], ignore_index=True)
    margins = pd.concat([pd.read_csv(folder / "margins.csv") for folder in folders], ignore_index=True)
    passes = margins.groupby(["problem", "norm", "estimator"])["passes"].mean()
    for reference in (EXACT, ENVELOPE, *sorted(name for name in against["against"].unique() if "without" in name)):
        for norm in against["norm"].unique():
            rows = against[(against["against"] == reference) & (against["norm"] == norm)]
            if len(rows):
                yield f"\n### {norm}, against {_article(reference)}{reference}: mean, within 1% (passes per image)\n"
                yield from _table(quality_table(rows, passes))
    yield f"\n### {culprit}: average distance / average of the envelope\n"
    yield from _table(error_table(margins, culprit))


def quality_table(rows: pd.DataFrame, passes: pd.Series) -> pd.DataFrame:
    """Estimators by problems, cells as text, from the rows of `audit.ratio_table` with one norm and reference."""

    def cell(row: pd.Series) -> str:
        key = (row["problem"], row["norm"], row["estimator"])
        cost = f" ({passes[key]:.0f})" if key in passes.index else ""
        mean = f"{row['mean']:.4f}" if np.isfinite(row["mean"]) else f"{row['mean_found']:.4f} of those found"
        return f"{mean}, {row['within_1']:.0%}{cost}"

    cells = rows.assign(cell=rows.apply(cell, axis=1))
    wide = cells.pivot(index="estimator", columns="problem", values="cell")
    return wide.loc[rows["estimator"].unique(), rows["problem"].unique()].fillna("").reset_index()


def error_table(margins: pd.DataFrame, culprit: str) -> pd.DataFrame:
    """By how much an estimator's average exceeds the envelope's, for correct and incorrect images.

    Averages are over the found images; ``found`` is their share, ``after noise`` the share found from noisy starts
    only, and ``median`` the median of the ratios per image. The last two columns are the averages themselves.
    """
    table = []
    for (problem, norm), own in margins.groupby(["problem", "norm"], sort=False):
        wide = distances(own)
        if culprit not in wide:
            continue
        best, unit = envelope(wide), own[own["estimator"] == culprit].set_index("image").loc[wide.index]
        found = np.isfinite(unit["distance"])
        row = {"problem": problem, "norm": norm, "found": f"{found.mean():.0%}"}
        row["after noise"] = f"{(unit['status'] == 'found_after_noise').mean():.0%}"
        row["median"] = f"{describe(ratios(unit['distance'], best)[found])['median']:.3f}"
        for name, part in {
            "all": found,
            "correct": found & unit["correct"],
            "incorrect": found & ~unit["correct"],
        }.items():
            ratio = unit.loc[part, "distance"].mean() / best[part].mean() if part.any() else np.nan
            row[name] = f"{ratio:.3f} ({int(part.sum())})" if part.any() else "none"
        row["average"], row["envelope's"] = f"{unit.loc[found, 'distance'].mean():.4f}", f"{best[found].mean():.4f}"
        table.append(row)
    return pd.DataFrame(table)


def _table(table: pd.DataFrame) -> Iterator[str]:
    yield f"| {' | '.join(map(str, table.columns))} |"
    yield f"|{'---|' * len(table.columns)}"
    for row in table.itertuples(index=False):
        yield f"| {' | '.join(map(str, row))} |"


def _article(reference: str) -> str:
    return "the envelope " if "without" in reference else "the " if reference == ENVELOPE else ""


if __name__ == "__main__":
    sys.exit(run_command(main))
