"""Which units a run has: every estimator in every norm that it can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attacks.estimator import NORMS, Domain, Estimator, EstimatorError, InputError, Norm
from attacks.registry import check_needs
from harness.store import Unit


def plan_units(
    estimators: Mapping[str, Estimator], norms: Sequence[Norm], domain: Domain
) -> tuple[list[Unit], list[str]]:
    """The units to measure, and a line for every estimator's norm that is skipped.

    Raises:
        InputError: no norm, or an unknown one.
        EstimatorError: no estimator, or one has none of the norms, or not the domain, or lacks a package.
    """
    if not norms or any(norm not in NORMS for norm in norms):
        raise InputError(f"expected norms of {', '.join(NORMS)}, got {', '.join(norms) or 'none'}; choose one or both")
    if not estimators:
        raise EstimatorError("expected at least one estimator, got none; name one, such as 'deepfool'")
    units, skipped = [], []
    for text, estimator in estimators.items():
        check_needs(estimator.name)
        if domain not in estimator.domains:
            raise EstimatorError(
                f"expected estimators that can do --domain {domain}, got {text} "
                f"({', '.join(sorted(estimator.domains))} only); choose another estimator or domain"
            )
        able = [norm for norm in norms if norm in estimator.norms]
        if not able:
            raise EstimatorError(
                f"expected a norm that {text} has ({', '.join(sorted(estimator.norms))}), "
                f"got {', '.join(norms)}; choose another norm or estimator"
            )
        units += [Unit(text, norm) for norm in able]
        skipped += [f"{text} has no {norm}: skipped in that norm" for norm in norms if norm not in able]
    return units, skipped


def describe(estimators: Mapping[str, Estimator]) -> list[dict[str, Any]]:
    """Manifest entries: canonical text, name and all parameters."""
    return [
        {"estimator": text, "name": estimator.name, "parameters": dataclasses.asdict(estimator)}  # type: ignore[call-overload]
        for text, estimator in estimators.items()
    ]
