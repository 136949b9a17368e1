"""Reproduce the paper: ``python -m benchmarks.reproduce`` runs the study, stores its summaries and writes the page.

``--page`` only regenerates the page's tables from the stored summaries, without runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduce.running import run_study
from benchmarks.reproduce.study import Study, read_study
from harness.command import DONE, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser

STUDY = Path(__file__).parents[1] / "reproduce.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _parser().parse_args(argv)
    return exit_code("reproduce", lambda: _reproduce(given), resume="to resume, run the same command again")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.reproduce",
        description="Run the study of a file, but for what is finished; then keep its summaries and write the page.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (the same command resumes).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--study", type=Path, default=STUDY, metavar="FILE.toml", help="default: benchmarks/reproduce.toml")
    add("--stage", type=int, metavar="N", help="only the stages up to N (default: all)")
    add("--only", nargs="+", metavar="RUN", help="run these only, and write nothing")
    add("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="run folders (runs/reproduce)")
    add("--data-root", default="data", help="folder of the data, in torchvision's layout (default: data)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, each of one thread (default: 1)")
    add("--out", type=Path, default=Path("docs/reproduction"), metavar="DIR", help="default: docs/reproduction")
    add("--page", action="store_true", help="run nothing: make the page from the summaries in --out")
    return parser


def _reproduce(given: argparse.Namespace) -> int:
    if given.jobs < 1:
        raise ConfigError(f"expected --jobs of at least 1, got {given.jobs}; give a larger number")
    whole = read_study(given.study)
    study = whole.upto(given.stage)
    if not study.groups:
        raise ConfigError(f"expected a --stage that {given.study} has, got {given.stage}; give a larger number")
    if not given.page:
        run_study(_only(study, given.only), given.runs, given.data_root, given.jobs, _say)
    if given.only is None:
        _write(whole, study, given)
    return DONE


def _write(whole: Study, study: Study, given: argparse.Namespace) -> None:
    """Collect the groups that were run, unless only the page is asked for, and write it next to the tables."""
    # here, so that --help needs no torch
    from benchmarks.reproduce.collecting import collect
    from benchmarks.reproduce.page import write_page
    from benchmarks.reproduce.stored import Stored

    for group in () if given.page else study.groups:
        _say(f"collecting {group.name}")
        collect(whole, group, given.runs, given.out)
    page = given.out.with_suffix(".md")
    write_page(Stored(whole, given.out), page)
    _say(f"{page}")


def _only(study: Study, names: Sequence[str] | None) -> Study:
    if names is None:
        return study
    unknown = sorted(set(names) - set(study.runs))
    if unknown:
        raise ConfigError(f"expected --only of {', '.join(study.runs)}, got {', '.join(unknown)}; choose of them")
    return Study(study.groups, {name: study.runs[name] for name in names})


def _say(line: str) -> None:
    print(f"reproduce: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
