"""Exact margins of affine classifiers against scipy's solvers and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import Tensor

from attacks.affine import affine_margins
from attacks.types import DOMAINS, NORMS, Domain, Norm

BOUNDS = {"unit": (0.0, 1.0), "pixels": (0.0, 255.0), "symmetric": (-1.0, 1.0)}


def problem(seed: int, classes: int, pixels: int, bounds: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and one image with pixels at both bounds and between; the boundary is near the box."""
    draw = torch.Generator().manual_seed(seed)
    low, high = bounds
    weight = torch.randn(classes, pixels, generator=draw, dtype=torch.float64)
    weight[torch.rand(classes, pixels, generator=draw) < 0.1] = 0.0  # pixels with zero weight for a class
    image = (2.0 * torch.rand(pixels, generator=draw, dtype=torch.float64) - 0.5).clamp(0.0, 1.0) * (high - low) + low
    bias = (high - low) * torch.randn(classes, generator=draw, dtype=torch.float64) - weight @ image
    return weight, bias, image.view(1, 1, 1, pixels)


def solved(
    weight: Tensor, bias: Tensor, image: Tensor, norm: Norm, domain: Domain, bounds: tuple[float, float]
) -> float:
    """The smallest norm over the other classes, each by a linear or quadratic program."""
    x = image.flatten().numpy()
    logits = weight.numpy() @ x + bias.numpy()
    predicted = int(logits.argmax())
    low, high = (bounds[0] - x, bounds[1] - x) if domain == "box" else (np.full_like(x, -1e6), np.full_like(x, 1e6))
    return min(
        program(weight.numpy()[other] - weight.numpy()[predicted], logits[predicted] - logits[other], low, high, norm)
        for other in range(len(weight))
        if other != predicted
    )


def program(slope: np.ndarray, gap: float, low: np.ndarray, high: np.ndarray, norm: Norm) -> float:
    """Smallest norm of ``d`` with ``slope @ d >= gap`` and ``low <= d <= high``."""
    n = len(slope)
    # the L-infinity program decides feasibility and gives the starting point
    sides = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
    linear = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=np.vstack([np.append(-slope, 0.0), sides]),
        b_ub=np.append(-gap, np.zeros(2 * n)),
        bounds=[*zip(low, high, strict=True), (0.0, None)],
    )
    if linear.status == 2:
        return math.inf
    assert linear.status == 0
    if norm == "linf":
        return float(linear.fun)
    result = minimize(
        lambda d: d @ d / gap**2,
        linear.x[:n],
        jac=lambda d: 2 * d / gap**2,
        bounds=list(zip(low, high, strict=True)),
        constraints=[LinearConstraint(slope / gap, lb=1.0)],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return float(np.linalg.norm(result.x))


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_margins_match_numerical_solvers(norm: Norm, domain: Domain, bounds: tuple[float, float]) -> None:
    unreachable = 0
    for seed in range(25):
        weight, bias, image = problem(seed, classes=2 + seed % 4, pixels=3 + seed % 10, bounds=bounds)
        exact = affine_margins(weight, bias, image, norm, domain=domain, bounds=bounds).item()
        expected = solved(weight, bias, image, norm, domain, bounds)
        assert exact == pytest.approx(expected, rel=1e-5)
        unreachable += math.isinf(expected)
    # some of the random problems are infeasible in the box, and some are feasible
    assert 2 <= unreachable <= 20 if domain == "box" else unreachable == 0


def margins(weight: list[list[float]], bias: list[float], image: list[float], norm: Norm, domain: Domain) -> float:
    images = torch.tensor(image, dtype=torch.float64).view(1, 1, 1, -1)
    return affine_margins(
        torch.tensor(weight, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64), images, norm, domain=domain
    ).item()


@pytest.mark.parametrize(
    ("norm", "domain", "expected"),
    [
        # z0 - z1 = 3 a + 4 b - 2 at (0.5, 0.75) is 2.5; slope (3, 4): norms 5 and 7
        ("l2", "free", 0.5),
        ("linf", "free", 2.5 / 7),
        ("l2", "box", 0.5),  # moves (0.3, 0.4), both within reach
        ("linf", "box", 2.5 / 7),
    ],
)
def test_a_margin_inside_the_box_matches_hand_calculation(norm: Norm, domain: Domain, expected: float) -> None:
    assert margins([[3.0, 4.0], [0.0, 0.0]], [-2.0, 0.0], [0.5, 0.75], norm, domain) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        # z0 - z1 = 3 a + 4 b - 2 at (1, 0.125) is 1.5; b can give 0.5, a must give 1: moves (1/3, 1/8)
        ("l2", math.hypot(1 / 3, 1 / 8)),
        ("linf", 1 / 3),
    ],
)
def test_by_hand_with_one_pixel_at_its_bound(norm: Norm, expected: float) -> None:
    assert margins([[3.0, 4.0], [0.0, 0.0]], [-2.0, 0.0], [1.0, 0.125], norm, "box") == pytest.approx(expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_class_need_not_be_the_runner_up(norm: Norm) -> None:
    # class 1 lies 1 behind at slope 1, class 2 lies 2 behind at slope 10
    assert margins([[0.0], [1.0], [10.0]], [0.0, -1.5, -7.0], [0.5], norm, "free") == pytest.approx(0.2)


@pytest.mark.parametrize("norm", NORMS)
def test_a_boundary_outside_the_box_has_infinite_margin(norm: Norm) -> None:
    # z0 - z1 = 3 - a - b never falls below 1 in the box
    assert margins([[0.0, 0.0], [1.0, 1.0]], [3.0, 0.0], [0.5, 0.5], norm, "box") == math.inf
    assert margins([[0.0, 0.0], [1.0, 1.0]], [3.0, 0.0], [0.5, 0.5], norm, "free") < math.inf
    # one corner of the box lies on the boundary
    corner = {"l2": math.sqrt(0.5), "linf": 0.5}[norm]
    assert margins([[0.0, 0.0], [1.0, 1.0]], [2.0, 0.0], [0.5, 0.5], norm, "box") == pytest.approx(corner)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_parallel_classes_have_infinite_margin(norm: Norm, domain: Domain) -> None:
    assert margins([[1.0, 2.0], [1.0, 2.0]], [0.5, 0.0], [0.5, 0.5], norm, domain) == math.inf


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_ties(norm: Norm, domain: Domain) -> None:
    assert margins([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], [0.5, 0.5], norm, domain) == 0.0
    # a tie everywhere
    assert margins([[1.0, 2.0], [1.0, 2.0]], [0.0, 0.0], [0.5, 0.5], norm, domain) == 0.0
    # a tie for second place does not count
    assert margins([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0.5, 0.0, 0.0], [0.5, 0.5], norm, domain) > 0.0


def test_free_margins_never_exceed_margins_in_the_box() -> None:
    smaller = 0
    for seed in range(20):
        weight, bias, image = problem(seed, classes=5, pixels=12, bounds=(0.0, 1.0))
        for norm in NORMS:
            free, box = (affine_margins(weight, bias, image, norm, domain=domain).item() for domain in DOMAINS[::-1])
            assert free <= box * (1 + 1e-12)
            smaller += free < 0.99 * box
    assert smaller > 20
