"""``python -m harness.compare``: measure the checkpoints of finished runs with more estimators and compare them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attacks.registry import check_certifier, check_name
from attacks.types import NORMS
from harness.command import DONE, FAILED, exit_code, print_error, run_command
from harness.config.options import ConfigError, OneLineParser
from harness.config.registry import ENGINES

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.console import Console

    from harness.report.content import ReportContent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    resume = "to resume, run the same command again"
    return exit_code("compare", lambda: _compare(options), resume=resume, debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.compare",
        description="Measure the checkpoints of finished runs with more estimators, add the margins to the runs, and "
        "report by how much each estimator over-estimates and whether an observation's verdict depends on it.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (the same command resumes).",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folder that harness.track wrote")
    parser.add_argument(
        "--estimator", action="append", default=[], metavar="NAME", help="NAME[:key=value,...] to add, repeatable"
    )
    parser.add_argument(
        "--certify", action="append", default=[], metavar="NAME", help="NAME[:key=value,...] of a certifier, repeatable"
    )
    parser.add_argument(
        "--certify-probe", type=int, default=100, metavar="N", help="images of each split (default: 100)"
    )
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


def _check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used, before any work."""
    for text in options.estimator:
        check_name(text)
    for text in options.certify:
        check_certifier(text)
    if options.workers < 0 or not 0 <= options.gpus_per_worker < float("inf"):
        raise ConfigError(
            f"expected --workers and --gpus-per-worker of at least 0, got {options.workers} and "
            f"{options.gpus_per_worker:g}; raise them"
        )
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"expected --threads of at least 1, got {options.threads}; raise it")
    if options.unit_timeout is not None and not 0 < options.unit_timeout < float("inf"):
        raise ConfigError(f"expected --unit-timeout above 0, got {options.unit_timeout:g}; give another number")
    if options.certify_probe < 1:
        raise ConfigError(f"expected --certify-probe of at least 1, got {options.certify_probe}; raise it")


def _compare(options: argparse.Namespace) -> int:
    _check(options)
    # here, so that --help needs neither torch nor pandas
    import torch

    from harness.config.devices import choose_device
    from harness.report.build import check_out, evaluate, write_report
    from harness.runs import read_runs
    from harness.store import RunFolder
    from harness.tracking.terminal import open_console

    device = choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = open_console()
    out = options.out or (RunFolder(options.run[0]).report if len(options.run) == 1 else Path("report.html"))
    check_out(out, options.run)
    failures = _measure(options, device, console)
    runs = read_runs(options.run)
    content = evaluate(runs)
    _print_comparison(console, content)
    for line in write_report(runs, content, out):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out}", markup=False, highlight=False, soft_wrap=True)
    for line in failures:
        print_error("compare", line)
    return FAILED if failures else DONE


def _measure(options: argparse.Namespace, device: torch.device, console: Console) -> list[str]:
    """Add the missing margins and bounds to the runs; returns one line per failure."""
    from harness.engines import create_engine
    from harness.runs import read_runs
    from harness.tracking.finished_run import remeasure
    from harness.tracking.terminal import Terminal

    runs = read_runs(options.run)
    if not options.estimator and not options.certify:
        for remark in (line for run in runs for line in run.remarks):
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
        return []
    engine = create_engine(
        options.engine,
        options.workers,
        device,
        gpus=options.gpus_per_worker,
        threads=options.threads,
        unit_timeout=options.unit_timeout,
    )
    failures = []
    try:
        for run in runs:
            with Terminal(console, int(run.margins["epoch"].max()) if len(run.margins) else 0) as terminal:
                terminal.say(
                    f"{run.name}: measuring its checkpoints with {', '.join(options.estimator + options.certify)}"
                )
                failed = remeasure(
                    run,
                    options.estimator,
                    options.norm,
                    options.epoch,
                    device,
                    terminal,
                    options.certify,
                    options.certify_probe,
                    engine,
                )
            failures += [f"{run.name}: {line}" for line in failed]
    finally:
        engine.close()
    return failures


def _print_comparison(console: Console, content: ReportContent) -> None:
    """Print each estimator's average over the envelope's, per epoch, and which verdicts depend on the estimator."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from harness.tracking.terminal import print_table

    for run in content.runs:
        for (norm, split), rows in run.ratios.groupby(["norm", "split"], sort=False):
            if split not in (("test",) if (run.ratios["split"] == "test").any() else (split,)):
                continue
            # printed, as a title of the table would wrap at its width
            title = f"{run.name}, {norm}, {split}: average distance / average of the envelope (95% interval)"
            console.print(title, markup=False, highlight=False, soft_wrap=True)
            table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            table.add_column("epoch", justify="right")
            estimators = [str(name) for name in rows["estimator"].unique()]
            for name in estimators:
                table.add_column(escape(name), justify="right", overflow="fold", min_width=len("1.000 (1.000-1.000)"))
            for epoch, rows_of_epoch in rows.groupby("epoch"):
                cells = {str(row["estimator"]): _ratio(row) for _, row in rows_of_epoch.iterrows()}
                table.add_row(str(epoch), *(cells.get(name, "") for name in estimators))
            print_table(console, table)
    for sentence in (*content.trust, *content.warm):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _ratio(row: pd.Series) -> str:
    return f"{row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"


if __name__ == "__main__":
    sys.exit(run_command(main))
