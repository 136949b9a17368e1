"""``python -m harness.report``: write the report page and the figures of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.command import DONE, exit_code, run_command
from harness.config.options import OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = OneLineParser(
        prog="python -m harness.report",
        description="Draw runs and test what they show: one self-contained page, and figures in the runs' folders.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folder, finished or not")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: report.html in the run, or here for several runs)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    given = parser.parse_args(argv)
    resume = "run the same command again, from the beginning"
    return exit_code("report", lambda: _report(given.run, given.out), resume=resume, debug=given.debug)


def _report(paths: list[Path], out: Path | None) -> int:
    # imported here, so that --help needs no pandas
    from harness.report.build import check_out, evaluate, write_report
    from harness.runs import read_runs
    from harness.store import RunFolder

    out = out or (RunFolder(paths[0]).report if len(paths) == 1 else Path("report.html"))
    check_out(out, paths)
    runs = read_runs(paths)
    for remark in (line for run in runs for line in run.remarks):
        print(f"report: {remark}")
    content = evaluate(runs)
    for line in write_report(runs, content, out):
        print(f"report: {line}")
    print(f"report: {out}")
    return DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
