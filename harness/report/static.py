"""Static figures of runs as PNG and SVG, for papers and README files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from matplotlib.figure import Figure

from harness import figures
from harness.report.content import RunContent
from harness.statistics.envelope import ENVELOPE

# one figure, or several by what is added to the file's name
Drawn: TypeAlias = Figure | Mapping[str, Figure]


def write_figures(run: RunContent, folder: Path) -> list[str]:
    """Write all figures of one run into a folder and return their file names without suffix."""
    estimator, split = leading(run)
    return [name for what, draw in FIGURES.items() for name in _saved(draw(run, estimator, split), folder, what)]


def write_comparison(runs: list[RunContent], folder: Path) -> list[str]:
    """Distributions of several runs as rows of one figure (Mickisch et al. 2020, Figures 3 and 11)."""
    return _saved(_distributions(runs), folder, "distributions")


def _saved(drawn: Drawn, folder: Path, name: str) -> list[str]:
    named = {name: drawn} if isinstance(drawn, Figure) else {f"{name}-{part}": one for part, one in drawn.items()}
    for each, figure in named.items():
        figures.save(figure, folder, each)
    return list(named)


def _distributions(runs: list[RunContent]) -> dict[str, Figure]:
    """By norm: distributions of training images if there are any, as in the paper, else of the leading split."""
    rows = {run.name: run.margins for run in runs}
    common = [run for run in runs if len(run.margins)] or runs
    estimator, split = leading(common[0])
    shown = "train" if "train" in set(common[0].margins["split"]) else split
    norms = dict.fromkeys(str(norm) for run in runs for norm in run.margins["norm"].unique())
    return {norm: figures.margin_distributions(rows, norm, estimator=estimator, split=shown) for norm in norms}


def _flow(run: RunContent) -> dict[str, Figure]:
    return {quote(split, safe=""): figures.image_flow(table) for split, table in run.correctness.items()}


def _ratios(run: RunContent) -> Figure:
    return figures.estimator_ratios(run.ratios, estimators=[str(name) for name in run.summary["estimator"].unique()])


def _paths(run: RunContent, estimator: str, split: str) -> Figure:
    return figures.image_paths(run.paths[(run.paths["estimator"] == estimator) & (run.paths["split"] == split)])


def leading(run: RunContent) -> tuple[str, str]:
    """Estimator and split of figures that show one curve: the envelope and test images if there are any."""
    estimators, splits = list(run.margins["estimator"].unique()), list(run.margins["split"].unique())
    estimator = ENVELOPE if ENVELOPE in estimators else (estimators or [""])[0]
    return str(estimator), "test" if "test" in splits or not splits else str(splits[-1])


# name of the file -> figure of a run, of the leading estimator and split
FIGURES: dict[str, Callable[[RunContent, str, str], Drawn]] = {
    "margins": lambda run, estimator, split: figures.margin_curves(run.summary, run.epochs),
    "correctness": lambda run, estimator, split: figures.correctness_curves(run.summary, split),
    "distributions": lambda run, estimator, split: _distributions([run]),
    "flow": lambda run, estimator, split: _flow(run),
    "ratios": lambda run, estimator, split: _ratios(run),
    "brackets": lambda run, estimator, split: (
        figures.bracket_bands(run.brackets, split=split) if len(run.brackets) else {}
    ),
    "classes": lambda run, estimator, split: figures.class_margins(run.classes, estimator=estimator, split=split),
    "confidence": lambda run, estimator, split: figures.confidence_margins(
        run.margins, estimator=estimator, split=split
    ),
    "calibration": lambda run, estimator, split: figures.calibration_curves(
        run.reliability, run.calibration, split=split
    ),
    "boundary": lambda run, estimator, split: figures.boundary_classes(
        run.boundary, run.changes, estimator=estimator, split=split
    ),
    "paths": _paths,
}
