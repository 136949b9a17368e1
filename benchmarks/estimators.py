"""Every named estimator against exact margins or the envelope: ``python -m benchmarks.estimators``.

Three problems: a ten-class affine classifier with known exact margins in the free domain; one whose images
lie at the box, where it binds; and the ``cnn`` trained on digits, where the reference is the smallest
distance that any estimator found. Makes the table of estimators in docs/estimators.md.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from attacks.estimator import Margins
from attacks.measure import measure
from attacks.registry import ESTIMATORS, WRAPPERS, create
from attacks.types import NORMS, EstimatorError, Norm
from benchmarks.problems import Problem, affine_problem, digits_problem
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment
from harness.store.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One estimator on one problem in one norm; ratios are to the exact margin or to the best distance found."""

    problem: str
    estimator: str
    norm: Norm
    found: float
    mean: float
    median: float
    p90: float
    worst: float
    within_1_percent: float
    forwards: float
    backwards: float
    milliseconds: float


def compare(problem: Problem, estimators: Sequence[str]) -> list[Row]:
    """Measure the problem with every estimator; the reference is the exact margin or the smallest distance found."""
    rows = []
    for norm in NORMS:
        able = [name for name in estimators if norm in create(name).norms]
        measured: dict[str, tuple[Margins, float]] = {}
        for name in able:
            began = time.perf_counter()
            margins = measure(problem.model, problem.images, create(name), norm, batch_size=len(problem.images))
            measured[name] = margins, time.perf_counter() - began
        if problem.exact is None:
            reference = torch.stack([margins.distance for margins, _ in measured.values()]).amin(0)
        else:
            reference = problem.exact(norm).margin
        for name, (margins, seconds) in measured.items():
            rows.append(_row(problem.name, name, norm, margins, reference, seconds))
    return rows


def _row(problem: str, name: str, norm: Norm, margins: Margins, reference: Tensor, seconds: float) -> Row:
    found = margins.distance.isfinite() & reference.isfinite()
    ratio = margins.distance[found] / reference[found]
    if not len(ratio):
        ratio = torch.full((1,), torch.nan, dtype=torch.float64)
    return Row(
        problem=problem,
        estimator=name,
        norm=norm,
        found=found.double().mean().item(),
        mean=ratio.mean().item(),
        median=ratio.median().item(),
        p90=ratio.quantile(0.9).item(),
        worst=ratio.max().item(),
        within_1_percent=torch.where(ratio.isnan(), torch.nan, (ratio <= 1.01).double()).mean().item(),
        forwards=margins.forwards.mean().item(),
        backwards=margins.backwards.mean().item(),
        milliseconds=1000 * seconds / len(reference),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| problem | estimator | norm | found | mean | median | p90 | worst | within 1% | forwards + backwards | ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.problem} | {r.estimator} | {r.norm} | {r.found:.1%} | {r.mean:.4f} | {r.median:.4f} | {r.p90:.4f} | "
            f"{r.worst:.3f} | {r.within_1_percent:.0%} | {r.forwards:.0f} + {r.backwards:.0f} | {r.milliseconds:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.estimators", description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="images a problem (default: 200)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the digits network (default: 20)")
    parser.add_argument("--estimator", action="append", help="only these, repeatable (default: all that are installed)")
    parser.add_argument("--quick", action="store_true", help="32 images, 3 epochs, without cw and bb")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    given = parser.parse_args(argv)
    if min(given.images, given.epochs, given.threads) < 1:
        parser.error("expected --images, --epochs and --threads of at least 1, got less; give larger numbers")
    torch.set_num_threads(given.threads)
    slow = ("cw", "bb") if given.quick else () if importlib.util.find_spec("numba") else ("bb",)
    names = given.estimator or [name for name in ESTIMATORS if name not in WRAPPERS and name not in slow]
    images, epochs = (32, 3) if given.quick else (given.images, given.epochs)
    try:
        for name in names:
            create(name)
    except EstimatorError as error:
        parser.error(str(error))
    if "bb" in names:
        # compilation is not part of its cost
        compare(affine_problem(2, boxed=False), ["bb"])
    problems = [affine_problem(images, boxed=False), affine_problem(images, boxed=True), digits_problem(images, epochs)]
    rows = [row for problem in problems for row in compare(problem, names)]
    print(table(rows))
    if given.out:
        facts = {"rows": [asdict(row) for row in rows], "images": images, "epochs": epochs}
        text = json.dumps(facts | environment(given.threads), indent=2) + "\n"
        write_atomically(given.out, lambda path: cast(object, path.write_text(text, encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(run_command(main))
