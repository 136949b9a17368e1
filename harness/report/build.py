"""Writing a report: the page, its tables of tests, and the static figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from harness.report.assemble import assemble
from harness.report.content import ReportContent
from harness.report.page import render
from harness.report.static import write_comparison, write_figures
from harness.runs import Run
from harness.statistics.observations.evidence import gather
from harness.store.files import write_atomically
from harness.store.identity import StoreError
from harness.store.tables import write_csv


def evaluate(runs: list[Run]) -> ReportContent:
    """Run all tests and make all tables of one report.

    Raises:
        StoreError: a part of a run is damaged.
    """
    return assemble(gather(runs))


def check_out(out: Path, runs: Sequence[Path]) -> None:
    """Refuse an output path that would overwrite a part of a run.

    Raises:
        StoreError: ``out`` is no name of a page, or lies in a subfolder of a run. ``RUN/*.html`` is allowed.
    """
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise StoreError(f"expected a file that ends in .html for --out, got {out}; name one")
    for run in (path.resolve() for path in runs):
        if run in out.resolve().parents and out.resolve().parent != run:
            raise StoreError(
                f"expected --out outside of the subfolders of a run, got {out}; put it into {run} itself or elsewhere"
            )


def write_report(runs: list[Run], content: ReportContent, out: Path) -> list[str]:
    """Write the page ``out``, its tests as ``<stem>-observations.csv`` next to it, and the figures.

    The figures of a single run go to its own folder. The figures of several runs go to ``<stem>-figures``, because the
    envelope in them depends on all runs of the report; their averages go to ``<stem>-runs.csv``.

    Returns:
        Messages for the user on figures that could not be written into a run's folder.

    Raises:
        StoreError: the report cannot be written.
    """
    write_atomically(out, lambda path: path.write_text(render(content), encoding="utf-8", errors="replace"))
    write_csv(out.with_name(f"{out.stem}-observations.csv"), content.findings)
    if len(runs) > 1:
        write_csv(out.with_name(f"{out.stem}-runs.csv"), content.side_by_side)
        folder = out.with_name(f"{out.stem}-figures")
        write_comparison(content.runs, folder)
        for run in content.runs:
            write_figures(run, folder / quote(run.name, safe=""))
        return []
    try:
        write_figures(content.runs[0], runs[0].folder.figures)
    except StoreError as error:  # a run folder may be read-only
        return [f"figures of {runs[0].name} are not written: {error}"]
    return []
