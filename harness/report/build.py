"""Write the report of one or several runs, its figures and its table of tests."""

from __future__ import annotations

from pathlib import Path

from harness.files import write_atomically, write_csv
from harness.report.assemble import assemble
from harness.report.content import ReportContent
from harness.report.page import render
from harness.report.static import write_comparison, write_figures
from harness.runs import Run
from harness.statistics.evidence import gather


def evaluate(runs: list[Run]) -> ReportContent:
    """All tests and tables of one report.

    Raises:
        StoreError: a part of a run is damaged.
    """
    return assemble(gather(runs))


def write_report(runs: list[Run], content: ReportContent, out: Path) -> list[str]:
    """Write ``out``, its tests as ``<stem>-observations.csv`` beside it, and the figures.

    Each run's figures go to its own folder; what compares several runs goes to ``<stem>-figures``.

    Returns:
        Lines to say: what could not be written into a run's folder.

    Raises:
        OSError: the report cannot be written.
    """
    write_atomically(out, lambda path: path.write_text(render(content), encoding="utf-8"))
    write_csv(out.with_name(f"{out.stem}-observations.csv"), content.findings)
    if len(runs) > 1:
        write_comparison(content.runs, out.with_name(f"{out.stem}-figures"))
    lines = []
    for run, tables in zip(runs, content.runs, strict=True):
        try:
            write_figures(tables, run.folder.figures)
        except OSError as error:  # somebody else's run, that can only be read
            lines.append(f"figures of {run.name} are not written: {error}")
    return lines
