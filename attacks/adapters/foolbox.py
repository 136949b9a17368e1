"""How Foolbox is imported and called; import it from here only.

Foolbox 3.3.4 is wrapped, not believed: its results are candidates that `attacks.measure` judges.
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
    # foolbox.zoo imports GitPython, which raises where there is no git executable
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import foolbox
    from foolbox import attacks as library

__all__ = ["foolbox", "library", "quiet", "run"]


@contextmanager
def quiet() -> Iterator[None]:
    """Foolbox logs through the root logger, which installs a handler there, and warns on every call."""
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
    """Call a Foolbox attack without its own check of the result, on ``view`` and ``bounds`` (default: the model's)."""
    goal = foolbox.criteria.Misclassification(labels)
    with quiet():
        # the device is given since Foolbox would take cuda:0 and move the model there
        wrapped = foolbox.PyTorchModel(view or model, bounds=bounds or model.bounds, device=images.device)
        result: Tensor = attack.run(wrapped, images, goal, **options)
    return result
