"""Exact margins of affine classifiers in closed form, free or inside the box: the reference for all estimators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks.geometry import plane_crossing, row_norm
from attacks.types import Domain, Norm


def affine_margins(
    weight: Tensor,
    bias: Tensor,
    images: Tensor,
    norm: Norm,
    *,
    domain: Domain = "free",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Exact distance to the decision boundary of ``z = images.flatten(1) @ weight.T + bias``.

    Free: ``|z_k - z_l| / ||w_k - w_l||`` with the dual norm (L2 for L2, L1 for L-infinity), minimised over l
    (Moosavi-Dezfooli et al. 2016, eq. 5). In the box, pixel i can move by at most ``c_i`` in the direction of the gain:
    the nearest point moves every pixel by ``min(t, c_i)`` (L-infinity) or ``min(t |w_i|, c_i)`` (L2), and t is where
    the piecewise linear gain reaches the logit margin.

    Args:
        weight: ``(K, D)``. bias: ``(K,)``. images: ``(B, ...)`` of D pixels inside ``bounds``.

    Returns:
        ``(B,)`` float64; inf where no other class can be reached; 0 on a tie.
    """
    weight, bias, points = weight.detach().double(), bias.detach().double(), images.detach().double().flatten(1)
    limits = bounds if domain == "box" else (-math.inf, math.inf)
    logits = points @ weight.T + bias
    result = torch.full((len(points),), math.inf, dtype=torch.float64)
    for row, k in enumerate(logits.argmax(1).tolist()):
        others = torch.arange(len(weight)) != k
        start, normals = points[row].expand(len(weight) - 1, -1), weight[others] - weight[k]
        direction, length, short = plane_crossing(start, normals, logits[row, k] - logits[row, others], norm, limits)
        distance = row_norm((start + length[:, None] * direction).clamp(*limits) - start, norm)
        result[row] = torch.where(short > 0, math.inf, distance).min()
    return result
