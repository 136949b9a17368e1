"""Free margins and random directions around a run's images: ``python -m benchmarks.reproduce.around RUN``.

Two questions on the paper's setting. Does clipping attacks to the pixel range matter (``free.csv``)? Is the boundary
near in few directions only, so that random directions do not reach it (``directions.csv``; section 2.1)?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.measure import measure
from attacks.registry import create
from attacks.seeds import derive_seed
from attacks.types import NORMS, Norm
from benchmarks.problems import Problem, run_problems
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.models.build import eval_mode
from harness.runs import Run, read_run
from harness.store.identity import StoreError
from harness.store.tables import write_csv
from harness.tracking.finished_run import options_of

ESTIMATOR = "deepfool"
FREE_COLUMNS = ("epoch", "split", "norm", "images", "box", "free", "ratio", "nearer", "box_unfound", "free_unfound")
DIRECTION_COLUMNS = ("epoch", "split", "norm", "images", "directions", "times", "crossed")
# multiples of the margin: the largest one that random directions are followed to, and the reported ones
FARTHEST, REPORTED = 100.0, (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
POINTS = 28  # number of points per direction, at equal ratios
DIRECTIONS, IMAGES = 10, 200


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(
        prog="python -m benchmarks.reproduce.around",
        description="Free margins and random directions at a run's checkpoints, into RUN.around/.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of harness.track, measured with deepfool")
    parser.add_argument("--epoch", type=int, nargs="+", required=True, help="epochs that the run has measured")
    given: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        run = read_run(given.run)
        free, directions = tables(run, given.epoch)
    except ValueError as error:
        parser.exit(1, f"around: error: {' '.join(str(error).split())}\n")
    folder = around(given.run)
    folder.mkdir(exist_ok=True)
    write_csv(folder / "free.csv", free)
    write_csv(folder / "directions.csv", directions)
    return 0


def around(run: Path) -> Path:
    """The folder of a run's tables: next to the run, whose own folder is not changed."""
    return run.with_name(f"{run.name}.around")


def tables(run: Run, epochs: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, over the probe images of the run.

    Raises:
        StoreError: epochs without a checkpoint, or without DeepFool's margins.
    """
    free, directions = [], []
    for problem in run_problems(run, epochs, ("train", "test"), options_of(run)["probe"]):
        for norm in NORMS:
            box = box_margins(run, problem, norm)
            free.append(_where(problem, norm) | free_against_box(problem, norm, box))
            if problem.split == "test":
                found = crossings(problem, norm, box)
                directions += [_where(problem, norm) | row for row in found]
    return pd.DataFrame(free, columns=list(FREE_COLUMNS)), pd.DataFrame(directions, columns=list(DIRECTION_COLUMNS))


def _where(problem: Problem, norm: Norm) -> dict[str, object]:
    return {"epoch": problem.epoch, "split": problem.split, "norm": norm}


def box_margins(run: Run, problem: Problem, norm: Norm) -> np.ndarray:
    """``(N,)`` DeepFool distances of the problem's images from the run, infinite for images not found.

    Raises:
        StoreError: the run has no DeepFool margins there.
    """
    rows = run.margins
    own = rows[
        (rows["epoch"] == problem.epoch)
        & (rows["split"] == problem.split)
        & (rows["norm"] == norm)
        & (rows["estimator"] == ESTIMATOR)
    ]
    if own.empty:
        raise StoreError(
            f"expected {norm} margins by {ESTIMATOR} at epoch {problem.epoch} of {run.name}, got none; measure them"
        )
    found = own.set_index("image")["distance"].reindex(problem.probe.ids.numpy())
    return np.asarray(found.to_numpy(dtype=float))


def free_against_box(problem: Problem, norm: Norm, box: np.ndarray) -> dict[str, object]:
    """Ratio of DeepFool's margins in the free domain to those in the box.

    ``ratio`` is that of the averages over the images found in both; ``nearer`` is the share of them whose free margin
    is smaller by more than 1%.
    """
    margins = measure(
        problem.model,
        problem.images,
        create(ESTIMATOR),
        norm,
        domain="free",
        noise_retries=problem.noise_retries,
        batch_size=problem.batch_size,
        seeds=problem.seeds(ESTIMATOR, norm),
    )
    free = margins.distance.numpy()
    both = np.isfinite(free) & np.isfinite(box)
    averages = float(box[both].mean()), float(free[both].mean())
    return {
        "images": int(both.sum()),
        "box": averages[0],
        "free": averages[1],
        "ratio": averages[1] / averages[0],
        "nearer": float((free[both] < 0.99 * box[both]).mean()),
        "box_unfound": int((~np.isfinite(box)).sum()),
        "free_unfound": int((~np.isfinite(free)).sum()),
    }


def crossings(problem: Problem, norm: Norm, margins: np.ndarray) -> list[dict[str, object]]:
    """The share of random directions along which the class changes within a multiple of the image's margin.

    Directions are uniform on the sphere (L2) or corners of the cube (Linf), and are not clipped to the pixel range.
    Only the first `IMAGES` images with a margin are used. A class that changes and changes back between two of `POINTS`
    points is not detected.
    """
    known = np.flatnonzero(np.isfinite(margins))[:IMAGES]
    images, radius = problem.images[known], torch.tensor(margins[known], dtype=problem.images.dtype)
    draws = torch.Generator().manual_seed(derive_seed("directions", problem.epoch, problem.split, norm))
    first = torch.stack([_first(problem.model, images, radius, norm, draws) for _ in range(DIRECTIONS)])
    row = {"images": len(known), "directions": DIRECTIONS}
    return [row | {"times": times, "crossed": float((first <= times).float().mean())} for times in REPORTED]


@torch.no_grad()
def _first(model: nn.Module, images: Tensor, radius: Tensor, norm: Norm, draws: torch.Generator) -> Tensor:
    """``(N,)`` the first multiple of the radius at which a random direction reaches another class, or infinity."""
    noise = torch.randn(images.shape, generator=draws)
    unit = noise.sign() if norm == "linf" else noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    first = torch.full_like(radius, torch.inf)
    with eval_mode(model):
        own = model(images).argmax(1)
        for times in sorted({*np.geomspace(1.0, FARTHEST, POINTS).tolist(), *REPORTED}):
            points = images + (times * radius).view(-1, 1, 1, 1) * unit
            first[(model(points).argmax(1) != own) & first.isinf()] = times
    return first


if __name__ == "__main__":
    sys.exit(run_command(main))
