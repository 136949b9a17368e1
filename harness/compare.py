"""``python -m harness.compare``: measure a run's checkpoints again with other estimators, and say whom to trust."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attacks.registry import check_certifier, check_name
from attacks.types import NORMS, EstimatorError, UnsoundError
from harness.command import run_command, terminated_is_interrupted
from harness.config.options import ConfigError, OneLineParser
from harness.config.registry import ENGINES

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.console import Console

    from harness.report.content import ReportContent

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        for text in given.estimator:
            check_name(text)
        for text in given.certify:
            check_certifier(text)
        if given.workers < 0 or not 0 <= given.gpus_per_worker < float("inf"):
            raise ConfigError(
                f"expected --workers and --gpus-per-worker of at least 0, got {given.workers} and "
                f"{given.gpus_per_worker:g}; raise them"
            )
        if given.threads is not None and given.threads < 1:
            raise ConfigError(f"expected --threads of at least 1, got {given.threads}; raise it")
        if given.unit_timeout is not None and not 0 < given.unit_timeout < float("inf"):
            raise ConfigError(f"expected --unit-timeout above 0, got {given.unit_timeout:g}; give another number")
        if given.certify_probe < 1:
            raise ConfigError(f"expected --certify-probe of at least 1, got {given.certify_probe}; raise it")
        with terminated_is_interrupted():
            return _compare(given)
    except (ConfigError, EstimatorError) as error:
        return _say_error(error, USAGE, given.debug)
    except (ValueError, OSError, UnsoundError) as error:
        return _say_error(error, FAILED, given.debug)
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.compare",
        description="Measure the checkpoints of finished runs with more estimators, add them to the runs, and say by "
        "how much each over-estimates and whether an observation's verdict depends on the estimator.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (the same command goes on).",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folder that harness.track wrote")
    parser.add_argument(
        "--estimator", action="append", default=[], metavar="NAME", help="NAME[:key=value,...] to add, repeatable"
    )
    parser.add_argument(
        "--certify", action="append", default=[], metavar="NAME", help="NAME[:key=value,...] of a certifier, repeatable"
    )
    parser.add_argument("--certify-probe", type=int, default=100, metavar="N", help="of each split (default: 100)")
    parser.add_argument("--norm", action="append", choices=NORMS, help="l2 or linf, repeatable (default: the run's)")
    parser.add_argument(
        "--epoch", action="append", type=int, help="only this epoch, repeatable (default: all measured)"
    )
    parser.add_argument("--device", default="cpu", help="where to measure: auto, cpu or cuda[:i] (default: cpu)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="local", help="where attacks run (default: local)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="see harness.track (default: 0)")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="X", help="on Ray (default: 0)")
    parser.add_argument("--unit-timeout", type=float, metavar="S", help="see harness.track (default: no limit)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: report.html in the run, or here for several runs)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _say_error(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    print(f"compare: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _compare(given: argparse.Namespace) -> int:
    # here, so that --help needs neither torch nor pandas
    import torch

    from harness.config.devices import choose_device
    from harness.report.build import check_out, evaluate, write_report
    from harness.runs import read_runs
    from harness.store import RunFolder
    from harness.tracking.terminal import open_console

    device = choose_device(given.device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    console = open_console()
    out = given.out or (RunFolder(given.run[0]).report if len(given.run) == 1 else Path("report.html"))
    check_out(out, given.run)
    failures = _measure(given, device, console)
    runs = read_runs(given.run)
    content = evaluate(runs)
    _print_comparison(console, content)
    for line in write_report(runs, content, out):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out}", markup=False, highlight=False, soft_wrap=True)
    for line in failures:
        print(f"compare: error: {line}", file=sys.stderr)
    return FAILED if failures else DONE


def _measure(given: argparse.Namespace, device: torch.device, console: Console) -> list[str]:
    """Add to the runs what they do not have of what is asked for; returns a line for what failed."""
    from harness.engines import create_engine
    from harness.runs import read_runs
    from harness.tracking.finished_run import remeasure
    from harness.tracking.terminal import Terminal

    runs = read_runs(given.run)
    if not given.estimator and not given.certify:
        for remark in (line for run in runs for line in run.remarks):
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
        return []
    engine = create_engine(
        given.engine,
        given.workers,
        device,
        gpus=given.gpus_per_worker,
        threads=given.threads,
        unit_timeout=given.unit_timeout,
    )
    failures = []
    try:
        for run in runs:
            with Terminal(console, int(run.margins["epoch"].max()) if len(run.margins) else 0) as terminal:
                terminal.say(f"{run.name}: measuring its checkpoints with {', '.join(given.estimator + given.certify)}")
                failed = remeasure(
                    run,
                    given.estimator,
                    given.norm,
                    given.epoch,
                    device,
                    terminal,
                    given.certify,
                    given.certify_probe,
                    engine,
                )
            failures += [f"{run.name}: {line}" for line in failed]
    finally:
        engine.close()
    return failures


def _print_comparison(console: Console, content: ReportContent) -> None:
    """Each estimator over the envelope at every epoch, with 95% intervals; then whom the verdicts depend on."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from harness.tracking.terminal import print_table

    for run in content.runs:
        for (norm, split), rows in run.ratios.groupby(["norm", "split"], sort=False):
            if split not in (("test",) if (run.ratios["split"] == "test").any() else (split,)):
                continue
            # no title of the table, which would wrap at its width
            title = f"{run.name}, {norm}, {split}: average distance / average of the envelope (95% interval)"
            console.print(title, markup=False, highlight=False, soft_wrap=True)
            table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            table.add_column("epoch", justify="right")
            estimators = [str(name) for name in rows["estimator"].unique()]
            for name in estimators:
                table.add_column(escape(name), justify="right", overflow="fold", min_width=len("1.000 (1.000-1.000)"))
            for epoch, here in rows.groupby("epoch"):
                cells = {str(row["estimator"]): _ratio(row) for _, row in here.iterrows()}
                table.add_row(str(epoch), *(cells.get(name, "") for name in estimators))
            print_table(console, table)
    for sentence in (*content.trust, *content.warm):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _ratio(row: pd.Series) -> str:
    return f"{row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"


if __name__ == "__main__":
    sys.exit(run_command(main))
