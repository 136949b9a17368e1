"""Margin estimators: (model, images) -> verified upper bounds on the distance to the decision boundary.

Names load on first use, so that ``import attacks`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.affine import affine_margins
    from attacks.estimator import Domain, Estimator, EstimatorError, InputError, Margins, Norm, Status
    from attacks.isolation import Classifier
    from attacks.registry import create, known, text_form

_HOME = {
    "Classifier": "attacks.isolation.view",
    "Domain": "attacks.estimator",
    "Estimator": "attacks.estimator",
    "EstimatorError": "attacks.estimator",
    "InputError": "attacks.estimator",
    "Margins": "attacks.estimator",
    "Norm": "attacks.estimator",
    "Status": "attacks.estimator",
    "affine_margins": "attacks.affine",
    "create": "attacks.registry",
    "known": "attacks.registry",
    "text_form": "attacks.registry",
}

__all__ = [
    "Classifier",
    "Domain",
    "Estimator",
    "EstimatorError",
    "InputError",
    "Margins",
    "Norm",
    "Status",
    "affine_margins",
    "create",
    "known",
    "text_form",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
