"""Exact margins of affine classifiers, free or inside the box: the judge of every estimator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks.estimator import Domain, Norm


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

    Free: ``|z_k - z_l| / ||w_k - w_l||`` with the dual norm (L2 for L2, L1 for L-infinity), the least
    over l (Moosavi-Dezfooli et al. 2016, eq. 5). In the box, pixel i moves at most ``c_i`` in the
    helpful direction: the nearest point moves every pixel by ``min(t, c_i)`` (L-infinity) or
    ``min(t |w_i|, c_i)`` (L2), and t is where the piecewise linear gain meets the logit margin.

    Args:
        weight: ``(K, D)``. bias: ``(K,)``. images: ``(B, ...)`` of D pixels inside ``bounds``.

    Returns:
        ``(B,)`` float64; inf where no other class can be reached; 0 on a tie.
    """
    weight, bias, points = (
        weight.detach().double(),
        bias.detach().double(),
        images.detach().double().flatten(1),
    )
    logits = points @ weight.T + bias
    predicted = logits.argmax(1)
    result = torch.full((len(points),), math.inf, dtype=torch.float64)
    for row, k in enumerate(predicted.tolist()):
        others = torch.arange(len(weight)) != k
        normals = weight[others] - weight[k]
        gaps = logits[row, k] - logits[row, others]
        if domain == "free":
            lengths = normals.abs().sum(1) if norm == "linf" else normals.norm(dim=1)
            # parallel rows of the weight never meet, unless they are tied everywhere
            ratio = torch.where(lengths > 0, gaps / lengths, torch.where(gaps > 0, math.inf, 0.0))
            result[row] = ratio.min()
        else:
            low, high = bounds
            room = torch.where(normals > 0, high - points[row], points[row] - low)
            result[row] = min(_boxed(n.abs(), c, float(g), norm) for n, c, g in zip(normals, room, gaps, strict=True))
    return result


def _boxed(slope: Tensor, room: Tensor, gap: float, norm: Norm) -> float:
    """Least norm of moves ``0 <= d <= room`` with ``slope @ d >= gap``."""
    if gap <= 0:
        return 0.0
    useful = slope > 0
    slope, room = slope[useful], room[useful]
    if float(slope @ room) < gap:
        return math.inf
    rate = slope if norm == "linf" else slope.square()  # gain per unit of t while a pixel is not at its limit
    limit = room if norm == "linf" else room / slope  # the t at which it is
    order = limit.argsort()
    rate, limit, capped = rate[order], limit[order], (slope * room)[order]
    done = torch.cat([capped.new_zeros(1), capped.cumsum(0)])[:-1]
    left = rate.flip(0).cumsum(0).flip(0)
    # gain(limit[i]) = done[i] + left[i] * limit[i]; find the piece in which it reaches the gap
    piece = int(torch.searchsorted(done + left * limit, gap).clamp_max(len(limit) - 1))
    t = float((gap - done[piece]) / left[piece])
    return t if norm == "linf" else float(torch.minimum(t * slope, room).norm())
