"""Points of other classes around images, each reached by a walk towards one class."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.certify.regions.faces import Task
from attacks.geometry import plane_crossing, row_norm

STEPS = 8
# how far beyond a linearised boundary a step goes, as a part of its length
OVERSHOOT = 0.2


def towards_classes(task: Task, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Every step goes from the image to the nearest point of the boundary as linearised where the last step ended.

    DeepFool's linearisation (Moosavi-Dezfooli et al. 2016, https://arxiv.org/abs/1511.04599), of one class; departs
    from it in that all steps set out from the image, and rest where the way back is along the gradient.

    Args:
        classes: ``(B,)`` int64, other than the labels.

    Returns:
        The nearest point of any other class that was met, ``(B, C, H, W)``; its distance ``(B,)``, inf where none was.
    """
    images, every = task.images, torch.arange(len(classes), device=classes.device)
    points, best = images, images.clone()
    least = images.new_full((len(images),), torch.inf)
    for step in range(STEPS + 1):
        cells = task.cells(points)
        leads = cells.values(points)[:, cells.units :]
        length = row_norm(points - images, task.norm)
        nearer = (leads.amax(1) > 0) & (length < least)
        best[nearer], least[nearer] = points[nearer], length[nearer]
        if step == STEPS:
            break
        normal = cells.rows(every, cells.units + classes).view_as(images)
        gap = (normal * (points - images)).flatten(1).sum(1) - leads.gather(1, classes[:, None])[:, 0]
        direction, far, _ = plane_crossing(images, normal, gap, task.norm, task.limits)
        points = (images + ((1 + OVERSHOOT) * far).view(-1, 1, 1, 1) * direction).clamp(*task.limits)
    return best, least
