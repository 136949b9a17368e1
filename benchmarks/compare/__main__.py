"""Margin estimators side by side on your own checkpoints: ``python -m benchmarks.compare RUN --epoch 10``.

For each: its excess over the envelope (per image, the smallest verified distance of all), its cost, its distances as
passes increase, and a warning if it should not be used. Also on problems with known margins: ``--problem affine``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attacks.registry import check_name, check_needs, create, text_form
from attacks.types import NORMS
from harness.command import DONE, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser

if TYPE_CHECKING:
    from attacks.estimator import Estimator
    from benchmarks.problems import Problem

DEFAULT = ("deepfool", "fmn", "ddn", "pgd", "apgd", "fab")
SEARCHED = ("relu", "relu-deep", "relu-conv", "relu-conv-pgd", "relu-pool", "relu-pool-pgd")
PROBLEMS = ("affine", "affine-box", "affine-free", "slab", "digits", *SEARCHED)
# computing exact margins that are not in the cache takes seconds per image
IMAGES, EXACT_IMAGES = 200, 100


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _parser().parse_args(argv)
    return exit_code("compare", lambda: _compare(given), resume="nothing was written", debug=given.debug)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.compare",
        description="Compare margin estimators on the checkpoints of runs or on built-in problems: how far each lies "
        "above the smallest distance that any of them found, at what cost, and which should not be used.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
        allow_abbrev=False,
    )
    names = "NAME[:key=value,...]"
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="run folder that harness.track wrote")
    add = parser.add_argument
    add("--problem", action="append", default=[], choices=PROBLEMS, help="built-in problem, repeatable")
    add("--epoch", action="append", default=[], type=int, help="checkpoint of a RUN, repeatable (default: the last)")
    add("--split", action="append", metavar="NAME", help="probe images of a RUN, repeatable (default: test)")
    more = f"default: {IMAGES}; {EXACT_IMAGES} of relu networks"
    add("--images", type=int, help=f"images a problem at most ({more})")
    add("--estimator", action="append", metavar="NAME", help=f"{names}, repeatable (default: {' '.join(DEFAULT)})")
    add("--reference", action="append", default=[], metavar="NAME", help="estimator for the envelope only, repeatable")
    add(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="also the envelope without this one (a bare name: in all its settings), repeatable",
    )
    add("--norm", action="append", choices=NORMS, help="l2 or linf, repeatable (default: both)")
    add(
        "--budget",
        type=int,
        help="hold every estimator to this many forwards + backwards per image (default: no limit)",
    )
    add("--repeats", type=int, default=1, help="rounds; from two on, times are medians without the first (default: 1)")
    add("--threads", type=int, default=1, help="torch threads (default: 1)")
    add("--device", default="cpu", help="auto, cpu or cuda[:i] (default: cpu)")
    add("--out", type=Path, default=Path("comparison"), metavar="DIR", help="tables, figures (default: comparison)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuse invalid comparisons before any work."""
    if not given.run and not given.problem:
        raise ConfigError("expected a run folder or --problem, got neither; name at least one")
    if not given.run and (given.epoch or given.split):
        raise ConfigError("expected a run folder with --epoch and --split, got none; name one")
    for name in ("images", "repeats", "threads", "budget"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"expected --{name} of at least 1, got {value}; give a larger number")
    if given.out.exists() and not given.out.is_dir():
        raise ConfigError(f"expected a folder or a new name for --out, got the file {given.out}; choose another")
    given.estimator = given.estimator or list(DEFAULT)
    for text in (*given.estimator, *given.reference, *given.without):
        check_needs(check_name(text))


def _compare(given: argparse.Namespace) -> int:
    # here, so that --help needs neither torch nor pandas
    import torch

    from benchmarks.compare.measuring import join, measure_problem
    from benchmarks.compare.results import evaluate
    from benchmarks.compare.showing import Screen
    from benchmarks.compare.writing import write
    from harness.config.devices import choose_device

    _check(given)
    device = choose_device(given.device)
    torch.set_num_threads(given.threads)
    estimators, references = _create(given.estimator), _create(given.reference)
    everything = estimators | references
    leaving = list(_create(given.without))
    strangers = [
        text for text in leaving if text not in everything and all(e.name != text for e in everything.values())
    ]
    if strangers:
        raise ConfigError(
            f"expected --without to name what is measured ({', '.join(everything)}), got {strangers[0]}; choose one"
        )
    screen = Screen()
    parts = []
    for problem in _problems(given):
        screen.begin(problem)
        here = problem.on(device)
        norms = given.norm or NORMS
        parts.append(
            measure_problem(here, everything, norms, repeats=given.repeats, on_unit=screen.unit, on_truth=screen.truth)
        )
    measured = join(parts)
    results = evaluate(measured, [text for text in references if text not in estimators], leaving, given.budget)
    screen.show(results, measured.skipped)
    options = {key: value for key, value in vars(given).items() if key != "debug"}
    screen.say(f"written to {given.out}: {', '.join(write(given.out, results, options, everything))}")
    return DONE


def _create(texts: Sequence[str]) -> dict[str, Estimator]:
    return {text_form(estimator): estimator for estimator in map(create, texts)}


def _problems(given: argparse.Namespace) -> Iterator[Problem]:
    from benchmarks.problems import BUILT_IN, run_problems
    from harness.runs import read_runs

    # all are checked before the first is measured
    splits, images = given.split or ["test"], given.images or IMAGES
    runs = [list(run_problems(run, given.epoch, splits, images)) for run in read_runs(given.run)]
    for problems in runs:
        yield from problems
    for name in given.problem:
        yield BUILT_IN[name](given.images or (EXACT_IMAGES if name in SEARCHED else IMAGES))


if __name__ == "__main__":
    sys.exit(run_command(main))
