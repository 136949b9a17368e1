"""Points of other classes around images, each reached by walking towards one class."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.certify.cells import cells_at
from attacks.certify.piecewise import PiecewiseNetwork
from attacks.estimator import Norm
from attacks.geometry import plane_crossing, row_norm

STEPS = 8
# how far beyond a linearised boundary a step goes, as a part of its length
OVERSHOOT = 0.02


def towards_classes(
    network: PiecewiseNetwork, images: Tensor, labels: Tensor, classes: Tensor, norm: Norm, limits: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Each step goes from the image to the nearest point of the boundary as linearised where the last one ended.

    DeepFool's linearisation (Moosavi-Dezfooli et al. 2016, https://arxiv.org/abs/1511.04599) of one class; departs from
    it in that steps set out from the image, so that they end where the way to the image is along the gradient.

    Args:
        images: ``(P, C, H, W)`` float64. labels: ``(P,)``, theirs. classes: ``(P,)``, others.

    Returns:
        The nearest point of another class that was met, ``(P, C, H, W)``; its distance ``(P,)``, inf where none was.
    """
    points, best = images, images.clone()
    least = torch.full(labels.shape, torch.inf, dtype=images.dtype, device=images.device)
    owners = torch.arange(len(images), device=images.device)
    for step in range(STEPS + 1):
        cells = cells_at(network, points, labels)
        leads = cells.values(points)[:, cells.units :]
        length = row_norm(points - images, norm)
        nearer = (leads.amax(1) > 0) & (length < least)
        best[nearer], least[nearer] = points[nearer], length[nearer]
        if step == STEPS:
            break
        normal = cells.rows(owners, cells.units + classes).view_as(images)
        gained = (normal * (points - images)).flatten(1).sum(1)
        gap = gained - leads.gather(1, classes[:, None])[:, 0]
        direction, far, _ = plane_crossing(images, normal, gap, norm, limits)
        points = (images + ((1 + OVERSHOOT) * far).view(-1, 1, 1, 1) * direction).clamp(*limits)
    return best, least
