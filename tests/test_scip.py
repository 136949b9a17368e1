"""Exact L2 margins against SCIP, which shares only the reading of the network with the search.

Tjeng et al. 2019, https://arxiv.org/abs/1711.07356, with interval bounds and one quadratic constraint. Skipped without
``pyscipopt``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attacks.certify.branch_and_bound.relu_network import ReluNetwork, read_network
from attacks.certify.certifiers import Crown
from attacks.certify.exact import exact_margins
from tests.brute_force import brute_force, tiny

scip = pytest.importorskip("pyscipopt")


def scip_margin(network: ReluNetwork, image: np.ndarray, reach: float) -> float:
    """The smallest L2 distance inside ``[0, 1]``, up to ``reach``, at which another class has the largest logit."""
    predicted = int(network.logits(image).argmax())
    return min(
        _to_class(network, image, predicted, other, reach) for other in range(network.classes) if other != predicted
    )


def _to_class(network: ReluNetwork, image: np.ndarray, own: int, other: int, reach: float) -> float:
    model = scip.Model()
    model.hideOutput()
    model.setParam("limits/gap", 1e-7)
    low, high = np.maximum(image - reach, 0.0), np.minimum(image + reach, 1.0)
    values: list[Any] = [model.addVar(lb=float(a), ub=float(b)) for a, b in zip(low, high, strict=True)]
    moves = [value - float(pixel) for value, pixel in zip(values, image, strict=True)]
    for weight, bias in zip(network.weights[:-1], network.biases[:-1], strict=True):
        least = np.maximum(weight, 0) @ low + np.minimum(weight, 0) @ high + bias
        most = np.maximum(weight, 0) @ high + np.minimum(weight, 0) @ low + bias
        units = []
        for row, offset, a, b in zip(weight, bias, least, most, strict=True):
            before = scip.quicksum(float(w) * value for w, value in zip(row, values, strict=True)) + float(offset)
            after = model.addVar(lb=0.0, ub=max(float(b), 0.0))
            model.addCons(after >= before)
            if b > 0:
                on = model.addVar(vtype="B", lb=float(a >= 0))
                model.addCons(after <= before - min(float(a), 0.0) * (1 - on))
                model.addCons(after <= float(b) * on)
            units.append(after)
        values, low, high = units, np.maximum(least, 0), np.maximum(most, 0)
    lead = network.lead(other, own)
    row, offset = lead @ network.weights[-1], float(lead @ network.biases[-1])
    model.addCons(scip.quicksum(float(w) * value for w, value in zip(row, values, strict=True)) + offset >= 0)
    square = model.addVar(lb=0.0, ub=reach * reach)
    model.addCons(scip.quicksum(move * move for move in moves) <= square)
    model.setObjective(square)
    model.optimize()
    return math.sqrt(max(model.getObjVal(), 0.0)) if model.getStatus() in ("optimal", "gaplimit") else math.inf


def test_exact_margins_of_digits_match_scip() -> None:
    from tests.test_exact import trained

    model = trained((12, 8))
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[1500:1502] / 16, dtype=torch.float64)[:, None]
    solved = exact_margins(model, images, "l2")
    assert solved.solved.all()
    network = read_network(model, (1, 8, 8))
    lower = Crown(rounds=6, cuts=4).certify(model, images, "l2", domain="box", upper=solved.upper).lower
    for image, margin, bound in zip(images, solved.margin.tolist(), lower.tolist(), strict=True):
        expected = scip_margin(network, image.flatten().numpy(), 1.05 * margin)
        assert margin == pytest.approx(expected, rel=1e-4)
        assert bound <= expected * (1 + 1e-4)


def test_scip_agrees_with_the_enumeration_of_all_patterns() -> None:
    for seed in range(3):
        model: nn.Module = tiny(seed, 3, 5, 3)
        image = torch.rand(1, 1, 1, 3, generator=torch.Generator().manual_seed(seed)).double()
        point = image.flatten().numpy()
        expected = brute_force(model, point, "l2", -point, 1 - point)
        solution = scip_margin(read_network(model, (1, 1, 3)), point, 2.0)
        assert solution == pytest.approx(expected, rel=1e-4, abs=2e-5)
