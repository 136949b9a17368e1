"""Speed of our estimators against the libraries on the same images: ``python -m benchmarks.speed --images 100``.

Networks are trained in seconds on digits that come with scikit-learn, or are a run's checkpoints (RUN). Sides
alternate. Margins are compared before times, and time ratios with different margins are marked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attacks.registry import check_name, check_needs, create
from attacks.types import NORMS
from harness.command import DONE, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser

if TYPE_CHECKING:
    from benchmarks.speed.problems import Problem
    from benchmarks.speed.sides import Side

PROBLEMS = ("dense-digits", "cnn-digits", "dense-fashion", "cnn-fashion", "resnet18-cifar10", "resnet50-224")
PEER_NAMES = ("foolbox", "torchattacks", "adv-lib", "art")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _parser().parse_args(argv)
    return exit_code("speed", lambda: _time(given), resume="finished tables are in --out", debug=given.debug)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.speed",
        description="Time margin estimators against the libraries' attacks on the same images, margins compared first.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", nargs="*", type=Path, metavar="RUN", help="run folder that harness.track wrote; give it first")
    add("--epoch", action="append", default=[], type=int, help="checkpoint of a RUN, repeatable (default: the last)")
    add("--problem", nargs="+", default=[], choices=PROBLEMS, help="built-in networks (default: cnn-fashion)")
    add("--classes", nargs="+", type=int, default=[10], choices=(10, 100), help="of built-in networks (default: 10)")
    add("--images", nargs="+", type=int, default=[100], metavar="N", help="images, several numbers (default: 100)")
    add("--unreachable", action="store_true", help="the first image of each batch cannot be moved")
    add("--estimator", nargs="+", default=["deepfool"], metavar="NAME", help="ours (default: deepfool)")
    add("--norm", nargs="+", default=list(NORMS), choices=NORMS, help="l2, linf (default: both)")
    add("--peer", nargs="*", choices=PEER_NAMES, help="libraries (default: all that are installed)")
    add("--batch", type=int, default=100, help="images a call, for every side (default: 100)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--threads", type=int, default=1, help="torch threads, for every side (default: 1)")
    add("--device", default="cpu", help="auto, cpu or cuda[:i] (default: cpu)")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory (default: yes)")
    add("--out", type=Path, default=Path("speed"), metavar="DIR", help="for speed.json and speed.md (default: speed)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuse options that cannot be timed, before any work."""
    if not given.run and given.epoch:
        raise ConfigError("expected a run folder with --epoch, got none; name one")
    for name in ("batch", "repeats", "threads"):
        if getattr(given, name) < 1:
            raise ConfigError(f"expected --{name} of at least 1, got {getattr(given, name)}; give a larger number")
    if min(given.images) < 1:
        raise ConfigError(f"expected --images of at least 1, got {min(given.images)}; give larger numbers")
    if given.out.exists() and not given.out.is_dir():
        raise ConfigError(f"expected a folder or a new name for --out, got the file {given.out}; choose another")
    for text in given.estimator:
        check_needs(check_name(text))
        lacking = [norm for norm in given.norm if norm not in create(text).norms]
        if len(lacking) == len(given.norm):
            raise ConfigError(f"expected a norm that {text} has, got {', '.join(lacking)}; choose another")
    given.problem = given.problem or ([] if given.run else ["cnn-fashion"])


def _time(given: argparse.Namespace) -> int:
    # here, so that --help needs no torch
    import torch

    from benchmarks.speed.comparing import compare
    from benchmarks.speed.report import LEGEND, lines, write
    from harness.config.devices import choose_device

    _check(given)
    device = choose_device(given.device)
    torch.set_num_threads(given.threads)
    installed = _installed(given)
    options = {key: value for key, value in vars(given).items() if key != "debug"}
    tables = []
    for problem in _problems(given):
        here = problem.on(device)
        for text in given.estimator:
            for norm in (norm for norm in given.norm if norm in create(text).norms):
                for images in given.images:
                    sides = _sides(text, norm, installed)
                    table = compare(here, text, norm, sides, images=images, repeats=given.repeats, memory=given.memory)
                    tables.append(table)
                    print(*lines(table), "", sep="\n", flush=True)
                    # written after each problem, so that a failure of a later one loses nothing
                    write(given.out, tables, options, device)
    print(*LEGEND, f"written to {given.out}: speed.json, speed.md", sep="\n")
    return DONE


def _installed(given: argparse.Namespace) -> list[str]:
    from benchmarks.speed.peers import missing

    names = PEER_NAMES if given.peer is None else given.peer
    for name in names:
        if missing(name):
            print(missing(name))
    return [name for name in names if not missing(name)]


def _sides(text: str, norm: str, installed: Sequence[str]) -> list[Side]:
    from benchmarks.speed.sides import sides_against

    every = sides_against(create(text).name)
    return [side for side in every if side.library in installed and norm in side.norms]


def _problems(given: argparse.Namespace) -> Iterator[Problem]:
    from benchmarks.speed.problems import built_in, of_run, with_unreachable
    from harness.runs import read_runs

    images = max(given.images)
    for run in read_runs(given.run):
        for problem in of_run(run, given.epoch, images, given.batch):
            yield with_unreachable(problem) if given.unreachable else problem
    for name in given.problem:
        for classes in given.classes:
            problem = built_in(name, classes, images, given.batch)
            yield with_unreachable(problem) if given.unreachable else problem


if __name__ == "__main__":
    sys.exit(run_command(main))
