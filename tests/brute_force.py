"""Exact margins of tiny ReLU networks by trying every activation pattern: a slow but simple reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import nn

from attacks.certify.branch_and_bound.relaxation import Lines, upper_lines
from attacks.types import Norm

FREE = 50.0


def layers(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of a `Sequential` of `Linear` layers and ReLUs, in float64."""
    return [
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy())
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]


def tiny(seed: int, *widths: int) -> nn.Sequential:
    """A random network of these widths, pixels first and classes last; the biases put nonlinearities inside the box."""
    draw = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=draw))
            layer.bias.copy_(-0.5 * layer.weight.sum(1) + 0.3 * torch.randn(outputs, generator=draw))
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def brute_force(model: nn.Module, image: np.ndarray, norm: Norm, low: np.ndarray, high: np.ndarray) -> float:
    """The margin of a flattened image over all perturbations in ``[low, high]``, all patterns and all other classes."""
    *hidden, (last, offset) = layers(model)
    point = image
    for weight, bias in hidden:
        point = np.maximum(weight @ point + bias, 0.0)
    predicted = int((last @ point + offset).argmax())
    best = math.inf
    for pattern in itertools.product((0.0, 1.0), repeat=sum(len(bias) for _, bias in hidden)):
        # the network is ``a @ move + c`` where its units are active as in the pattern
        a, c, rows, gaps, first = np.eye(len(image)), image.copy(), [], [], 0
        for weight, bias in hidden:
            on = np.array(pattern[first : first + len(bias)])
            first += len(bias)
            a, c = weight @ a, weight @ c + bias
            rows.append((2 * on - 1)[:, None] * a)
            gaps.append(-(2 * on - 1) * c)
            a, c = on[:, None] * a, on * c
        a, c = last @ a, last @ c + offset
        for other in set(range(len(c))) - {predicted}:
            constraints = np.vstack([*rows, (a[other] - a[predicted])[None]])
            missing = np.concatenate([*gaps, [c[predicted] - c[other]]])
            best = min(best, _shortest(constraints, missing, low, high, norm, best))
    return best


def _shortest(rows: np.ndarray, gaps: np.ndarray, low: np.ndarray, high: np.ndarray, norm: Norm, best: float) -> float:
    """Least norm of ``d`` with ``rows @ d >= gaps`` and ``low <= d <= high``, where it is below ``best``."""
    n = len(low)
    sides = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
    linear = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=np.vstack([np.hstack([-rows, np.zeros((len(rows), 1))]), sides]),
        b_ub=np.concatenate([-gaps, np.zeros(2 * n)]),
        bounds=[*zip(low, high, strict=True), (0.0, None)],
    )
    # the L2 norm is at least the L-infinity norm
    if linear.status == 2 or linear.fun >= best:
        return math.inf
    assert linear.status == 0
    if norm == "linf":
        return float(linear.fun)
    result = minimize(
        lambda d: d @ d,
        linear.x[:n],
        jac=lambda d: 2 * d,
        bounds=list(zip(low, high, strict=True)),
        constraints=[LinearConstraint(rows, lb=gaps)],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return float(np.linalg.norm(result.x))


def lines_of_low_chords(*args: Any, **options: Any) -> Lines:
    """A planted defect: `upper_lines` whose chords are 5% too low, so that they are no upper bounds."""
    lines = upper_lines(*args, **options)
    offsets = lines.offsets.copy()
    for slack in lines.slack:
        offsets[: len(slack)] -= 0.05 * slack.sum(1)
    return replace(lines, offsets=offsets)
