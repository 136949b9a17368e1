"""Margin estimators and certifiers: (model, images) -> verified upper and lower bounds of the margin.

Names are loaded on first use, so that ``import attacks`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.affine import affine_margins as affine_margins
    from attacks.certifier import Certificates as Certificates
    from attacks.certifier import Certifier as Certifier
    from attacks.certify.certifiers import IBP as IBP
    from attacks.certify.certifiers import Crown as Crown
    from attacks.certify.certifiers import Exact as Exact
    from attacks.certify.exact import ExactMargins as ExactMargins
    from attacks.certify.exact import exact_margins as exact_margins
    from attacks.certify.lower import Effort as Effort
    from attacks.checks import ModelWarning as ModelWarning
    from attacks.estimator import Estimator as Estimator
    from attacks.estimator import Margins as Margins
    from attacks.estimator import Settings as Settings
    from attacks.estimator import Status as Status
    from attacks.estimator import setting as setting
    from attacks.isolation import Classifier as Classifier
    from attacks.registry import create as create
    from attacks.registry import create_certifier as create_certifier
    from attacks.registry import known as known
    from attacks.registry import text_form as text_form
    from attacks.trace import Trace as Trace
    from attacks.types import Domain as Domain
    from attacks.types import EstimatorError as EstimatorError
    from attacks.types import InputError as InputError
    from attacks.types import Norm as Norm
    from attacks.types import UnsoundError as UnsoundError

_HOME = {
    "Certificates": "attacks.certifier",
    "Certifier": "attacks.certifier",
    "Classifier": "attacks.isolation",
    "Crown": "attacks.certify.certifiers",
    "Domain": "attacks.types",
    "Effort": "attacks.certify.lower",
    "Estimator": "attacks.estimator",
    "EstimatorError": "attacks.types",
    "Exact": "attacks.certify.certifiers",
    "ExactMargins": "attacks.certify.exact",
    "IBP": "attacks.certify.certifiers",
    "InputError": "attacks.types",
    "Margins": "attacks.estimator",
    "ModelWarning": "attacks.checks",
    "Norm": "attacks.types",
    "Settings": "attacks.estimator",
    "Status": "attacks.estimator",
    "Trace": "attacks.trace",
    "UnsoundError": "attacks.types",
    "affine_margins": "attacks.affine",
    "create": "attacks.registry",
    "create_certifier": "attacks.registry",
    "exact_margins": "attacks.certify.exact",
    "known": "attacks.registry",
    "setting": "attacks.estimator",
    "text_form": "attacks.registry",
}

__all__ = [
    "IBP",
    "Certificates",
    "Certifier",
    "Classifier",
    "Crown",
    "Domain",
    "Effort",
    "Estimator",
    "EstimatorError",
    "Exact",
    "ExactMargins",
    "InputError",
    "Margins",
    "ModelWarning",
    "Norm",
    "Settings",
    "Status",
    "Trace",
    "UnsoundError",
    "affine_margins",
    "create",
    "create_certifier",
    "exact_margins",
    "known",
    "setting",
    "text_form",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attacks' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
