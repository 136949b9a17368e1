"""Static figures of runs as PNG and SVG, for papers and README files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure

from harness import figures
from harness.report.content import RunContent
from harness.statistics.envelope import ENVELOPE


def write_figures(run: RunContent, folder: Path) -> list[str]:
    """Write all figures of one run into a folder and return their file names without suffix."""
    return [_saved(figure, folder, name) for name, figure in _figures(run)]


def write_comparison(runs: list[RunContent], folder: Path) -> list[str]:
    """Write distributions of several runs, one row per run (Mickisch et al. 2020, Figures 3 and 11).

    Returns the file names without suffix.
    """
    return [_saved(figure, folder, name) for name, figure in _distributions(runs)]


def _saved(figure: Figure, folder: Path, name: str) -> str:
    figures.save(figure, folder, name)
    return name


def _figures(run: RunContent) -> Iterator[tuple[str, Figure]]:
    estimator, split = leading(run)
    yield "margins", figures.margin_curves(run.summary, run.epochs)
    yield "correctness", figures.correctness_curves(run.summary, split)
    yield from _distributions([run])
    for name, correctness in run.correctness.items():
        yield f"flow-{quote(name, safe='')}", figures.image_flow(correctness)
    order = [str(name) for name in run.summary["estimator"].unique()]
    yield "ratios", figures.estimator_ratios(run.ratios, estimators=order)
    if len(run.brackets):
        yield "brackets", figures.bracket_bands(run.brackets, split=split)
    yield "classes", figures.class_margins(run.classes, estimator=estimator, split=split)
    yield "confidence", figures.confidence_margins(run.margins, estimator=estimator, split=split)
    yield "calibration", figures.calibration_curves(run.reliability, run.calibration, split=split)
    yield "boundary", figures.boundary_classes(run.boundary, run.changes, estimator=estimator, split=split)
    paths = run.paths[(run.paths["estimator"] == estimator) & (run.paths["split"] == split)]
    yield "paths", figures.image_paths(paths)


def _distributions(runs: list[RunContent]) -> Iterator[tuple[str, Figure]]:
    """Distributions of training images if there are any, as in the paper; otherwise of the leading split."""
    rows = {run.name: run.margins for run in runs}
    common = [run for run in runs if len(run.margins)] or runs
    estimator, split = leading(common[0])
    splits = set(common[0].margins["split"])
    for norm in dict.fromkeys(str(norm) for run in runs for norm in run.margins["norm"].unique()):
        shown = "train" if "train" in splits else split
        yield f"distributions-{norm}", figures.margin_distributions(rows, norm, estimator=estimator, split=shown)


def leading(run: RunContent) -> tuple[str, str]:
    """Estimator and split of figures that show one curve: the envelope and test images if there are any."""
    estimators, splits = list(run.margins["estimator"].unique()), list(run.margins["split"].unique())
    estimator = ENVELOPE if ENVELOPE in estimators else (estimators or [""])[0]
    return str(estimator), "test" if "test" in splits or not splits else str(splits[-1])
