"""Adapter to Foolbox 3.3.4; import Foolbox from here only.

Its results are candidates, which `attacks.judging` verifies.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attacks.isolation import Classifier
from attacks.types import Bounds

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
    # foolbox.zoo imports GitPython, which raises an error without a git executable
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import foolbox
    from foolbox import attacks as library

__all__ = ["foolbox", "library", "quiet", "run"]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Foolbox's warnings, and remove the handler that its logging installs on the root logger."""
    handlers = list(logging.root.handlers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers


def run(
    attack: Any,
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    view: nn.Module | None = None,
    bounds: Bounds | None = None,
    **options: Any,
) -> Tensor:
    """Call a Foolbox attack without its own check of the result.

    Args:
        images, labels: ``(B, ...)`` and ``(B,)``.
        view, bounds: the network and bounds that the attack gets; default those of ``model``.
        options: arguments of the attack's ``run``.

    Returns:
        ``(B, ...)`` candidates.
    """
    goal = foolbox.criteria.Misclassification(labels)
    with quiet():
        # without a device, Foolbox would choose cuda:0 and move the model there
        wrapped = foolbox.PyTorchModel(view or model, bounds=bounds or model.bounds, device=images.device)
        result: Tensor = attack.run(wrapped, images, goal, **options)
    return result
