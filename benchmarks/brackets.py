"""How tight certified lower bounds are, what they cost, and whether any point contradicts them.

``python -m benchmarks.brackets`` takes generated networks (``--problem``) and checkpoints of runs, and bounds the
margins of their images with each certifier. The bounds are compared with distances of witnesses, with known exact
margins, and with points of every certified ball, both random and driven towards another class.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks.certifier import Certificates
from attacks.certify.network.tracing import evaluation_copy
from attacks.geometry import project
from attacks.measure import measure
from attacks.registry import create, create_certifier, text_form
from attacks.types import NORMS, Domain, Norm
from benchmarks.problems import BUILT_IN, Problem, run_problems
from harness.command import DONE, FAILED, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser
from harness.runs import read_runs
from harness.statistics.brackets import TIGHT
from harness.store import environment, now
from harness.store.files import write_atomically

# share of the points that are driven towards another class, and the number of their steps
DRIVEN, CLIMBING = 0.1, 20


@dataclass(frozen=True)
class Row:
    """One certifier on one problem in one norm.

    Attributes:
        tightness: mean lower / upper. least: smallest lower / upper. tight: share of at least `TIGHT`.
        to_exact, exact_images: mean lower / exact margin, of the images whose margin is known; NaN if there are none.
        above_exact, above_upper: images whose bound is above the value; must be 0.
        points: classified points of the certified balls; violations: those of another class, must be 0.
    """

    problem: str
    certifier: str
    norm: Norm
    domain: Domain
    images: int
    lower: float
    upper: float
    tightness: float
    least: float
    tight: float
    solved: float
    to_exact: float
    exact_images: int
    above_exact: int
    above_upper: int
    points: int
    violations: int
    milliseconds: float


def compare(problem: Problem, norm: Norm, estimator: str, certifiers: Sequence[str], points: int) -> Iterator[Row]:
    """Return one row per certifier.

    Args:
        estimator: gives the upper bounds. points: number per image's ball.
    """
    seeds = problem.seeds(text_form(create(estimator)), norm)
    upper = measure(problem.model, problem.images, create(estimator), norm, domain=problem.domain, seeds=seeds).distance
    exact = problem.exact(norm).margin if problem.exact is not None else torch.full_like(upper, torch.nan)
    for text in certifiers:
        began = time.perf_counter()
        found = create_certifier(text).certify(problem.model, problem.images, norm, domain=problem.domain, upper=upper)
        seconds = time.perf_counter() - began
        yield _row(problem, text, norm, found, upper, exact, points, seconds)


def _row(
    problem: Problem,
    text: str,
    norm: Norm,
    found: Certificates,
    upper: Tensor,
    exact: Tensor,
    points: int,
    seconds: float,
) -> Row:
    lower = found.lower
    share = torch.where(upper > 0, lower / upper, 1.0)[upper.isfinite()]
    known = exact.isfinite()
    tried, wrong = contradictions(problem, norm, found, points)
    return Row(
        problem=problem.name,
        certifier=text,
        norm=norm,
        domain=problem.domain,
        images=len(lower),
        lower=float(lower[upper.isfinite()].mean()),
        upper=float(upper[upper.isfinite()].mean()),
        tightness=float(share.mean()),
        least=float(share.min()),
        tight=float((share >= TIGHT).double().mean()),
        solved=float(found.solved.double().mean()),
        to_exact=float((lower / exact)[known & (exact > 0)].mean()),
        exact_images=int(known.sum()),
        above_exact=int((lower > exact * (1 + 1e-9))[known].sum()),
        above_upper=int((lower > upper * (1 + 1e-6)).sum()),
        points=tried,
        violations=wrong,
        milliseconds=1000 * seconds / len(lower),
    )


def contradictions(problem: Problem, norm: Norm, found: Certificates, points: int) -> tuple[int, int]:
    """Return points of the certified balls and the number of them with another class, by the model in float64.

    Most points are random, half of them on the surface of the ball; a share of `DRIVEN` is driven from random starts
    towards one other class each, by signed or normalised gradients of the logit gap.
    """
    model = evaluation_copy(problem.model)
    draw = torch.Generator().manual_seed(0)
    limits = (0.0, 1.0) if problem.domain == "box" else (-torch.inf, torch.inf)
    wrong = tried = 0
    for image, label, radius in zip(problem.images.double(), found.label.tolist(), found.lower.tolist(), strict=True):
        driven_ones = round(DRIVEN * points)
        random = _random_points(image, radius, norm, points - driven_ones, draw).clamp(*limits)
        started = _random_points(image, radius, norm, driven_ones, draw).clamp(*limits)
        driven = _driven(model, image, label, radius, norm, started, limits)
        for batch in (random, driven):
            with torch.no_grad():
                logits = model(batch)
            # a point on the boundary does not count as another class
            other = logits.clone()
            other[:, label] = -torch.inf
            wrong += int((other.amax(1) > logits[:, label]).sum())
            tried += len(batch)
    return tried, wrong


def _random_points(image: Tensor, radius: float, norm: Norm, count: int, draw: torch.Generator) -> Tensor:
    move = torch.randn(count, *image.shape, generator=draw, dtype=torch.float64)
    if norm == "linf":
        move = torch.where(torch.rand(count, 1, 1, 1, generator=draw) < 0.5, move.sign(), move.clamp(-1, 1))
    else:
        length = move.flatten(1).norm(dim=1)
        part = torch.rand(count, generator=draw, dtype=torch.float64).mul(2).clamp_max(1)
        move = move * (part / length).view(-1, 1, 1, 1)
    return image + radius * move


def _driven(
    model: torch.nn.Module,
    image: Tensor,
    label: int,
    radius: float,
    norm: Norm,
    start: Tensor,
    limits: tuple[float, float],
) -> Tensor:
    if not len(start):
        return start
    classes = model(image[None]).shape[1]
    towards = torch.arange(len(start)) % (classes - 1)
    towards = towards + (towards >= label)
    move, limit = start - image, torch.full((len(start),), radius, dtype=torch.float64)
    for step in range(CLIMBING):
        points = (image + move).requires_grad_()
        logits = model(points)
        lead = logits.gather(1, towards[:, None])[:, 0] - logits[:, label]
        (gradient,) = torch.autograd.grad(lead.sum(), points)
        size = radius * (1 - step / CLIMBING)
        if norm == "linf":
            push = gradient.sign()
        else:
            push = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
        move = project(move + size * push, limit, norm)
        move = (image + move).clamp(*limits) - image
    return image + move


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | norm | certifier | images | lower / distance | least | tighter than 10% | lower / exact | "
        "solved | points, violations | ms per image |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        exact = f"{r.to_exact:.3f} of {r.exact_images}" if r.exact_images else ""
        lines.append(
            f"| {r.problem} | {r.norm} | `{r.certifier}` | {r.images} | {r.tightness:.3f} | {r.least:.3f} | "
            f"{r.tight:.0%} | {exact} | {r.solved:.0%} | {r.points:,}, {r.violations} | {r.milliseconds:.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a bound is contradicted."""
    given = _parser().parse_args(argv)
    return exit_code("brackets", lambda: _bound(given), resume="nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m benchmarks.brackets", description=__doc__)
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--problem", action="append", choices=list(BUILT_IN), help="networks made here, repeatable")
    parser.add_argument(
        "--epoch", action="append", type=int, help="checkpoints of runs, repeatable (default: the last)"
    )
    parser.add_argument("--split", default="test", help="of the runs' probe images (default: test)")
    parser.add_argument("--images", type=int, default=100, help="a problem or split (default: 100)")
    parser.add_argument("--norm", action="append", choices=NORMS, help="repeatable (default: both)")
    parser.add_argument("--certifier", action="append", help="NAME[:key=value,...], repeatable (default: crown, ibp)")
    parser.add_argument("--estimator", default="cascade", help="of the upper bounds (default: cascade)")
    parser.add_argument("--points", type=int, default=1000, help="of each image's ball (default: 1000)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON, and the table as FILE.md")
    return parser


def _bound(given: argparse.Namespace) -> int:
    if min(given.images, given.threads) < 1 or given.points < 0:
        raise ConfigError("expected --images and --threads of at least 1, got less; give larger numbers")
    torch.set_num_threads(given.threads)
    certifiers = given.certifier or ["crown", "ibp"]
    for text in certifiers:
        create_certifier(text)
    create(given.estimator)
    problems = [BUILT_IN[name](given.images) for name in given.problem or ()]
    for run in read_runs(given.run):
        problems += run_problems(run, given.epoch or (), [given.split], given.images)
    if not problems:
        raise ConfigError("expected a RUN or --problem, got none; name what to bound")
    rows = []
    for problem in problems:
        for norm in given.norm or NORMS:
            for row in compare(problem, norm, given.estimator, certifiers, given.points):
                rows.append(row)
                print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if given.out:
        facts = {"created": now(), "rows": [asdict(row) for row in rows], **environment(given.threads)}
        text = json.dumps(facts, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(
            given.out.with_suffix(".md"), lambda path: path.write_text(table(rows) + "\n", encoding="utf-8")
        )
    return FAILED if any(row.violations or row.above_exact or row.above_upper for row in rows) else DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
