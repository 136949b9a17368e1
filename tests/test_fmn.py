"""Fast minimum-norm beyond the checks of `tests/test_conformance.py`: runs towards given classes."""

from __future__ import annotations

import pytest
import torch

from attacks.estimators.fmn import FMN
from attacks.measure import measure
from attacks.types import NORMS, Norm
from benchmarks.problems import affine_problem
from tests import oracles


@pytest.mark.parametrize("norm", NORMS)
def test_runs_towards_every_class_find_the_nearest_class(norm: Norm) -> None:
    """On classes whose weights differ in length, where the runner-up is not always the nearest."""
    problem = affine_problem(64, boxed=False)
    assert problem.exact is not None
    any_class = measure(problem.model, problem.images, FMN(steps=50), norm)
    each = measure(problem.model, problem.images, FMN(steps=50, targets=9), norm)
    assert (each.distance / problem.exact(norm).margin).quantile(0.9) <= 1.002
    assert (any_class.distance / problem.exact(norm).margin).quantile(0.9) >= 1.05
    # walks end when they no longer improve: with one per image early, with nine per image not all of them
    assert (any_class.backwards <= 50).all()
    assert (each.backwards <= 9 * 50).all()
    assert each.backwards.mean() > 8 * any_class.backwards.mean()


def test_there_are_no_more_runs_than_other_classes() -> None:
    truth = oracles.affine(3)
    few, many = (measure(truth.model, truth.images, FMN(steps=20, targets=n), "l2") for n in (2, 50))
    torch.testing.assert_close(few.distance, many.distance, rtol=0, atol=0)
    assert (few.backwards == many.backwards).all()
