"""Starting points of walks: points of other classes around images, each found by steps towards one class."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.certify.regions.faces import Task
from attacks.geometry import plane_crossing, row_norm

STEPS = 8
# overshoot of a step beyond the linearised boundary, relative to its length
OVERSHOOT = 0.2


def towards_classes(task: Task, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Step from each image to the nearest point of one class's boundary, linearised where the last step ended.

    DeepFool's linearisation (Moosavi-Dezfooli et al. 2016, https://arxiv.org/abs/1511.04599) of one class. Departs from
    it: all steps start at the image, so that they come to rest where the move is along the gradient.

    Args:
        classes: ``(B,)`` int64, other than the labels.

    Returns:
        The nearest point of any other class that was met, ``(B, C, H, W)``, and its distance ``(B,)``, inf if none was.
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
