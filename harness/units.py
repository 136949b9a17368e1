"""Which units a run has: every estimator in every norm that it can do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from attacks.certify.certifiers import Certifier
from attacks.estimator import NORMS, Domain, Estimator, EstimatorError, InputError, Norm, revision_of
from attacks.registry import check_needs, text_form
from harness.options import ConfigError
from harness.store import Unit

# of a unit's name in bytes: file systems end at 255, and temporary names are longer than the file's
LONGEST = 200


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


def starts_warm(estimator: Estimator) -> bool:
    """Whether the estimator wants the witnesses of the epoch before."""
    return bool(getattr(estimator, "warm", 0))


def warm_starts(estimators: Mapping[str, Estimator]) -> tuple[dict[str, Estimator], set[str], list[str]]:
    """Every estimator that has a setting ``warm`` in its warm form, its cold form beside it, the others as they are.

    Returns:
        The estimators by text; the texts of cold forms, which are there to be compared with; a line for each estimator
        that has no warm start.

    Raises:
        ConfigError: none has a warm start.
    """
    able = {text: e for text, e in estimators.items() if hasattr(e, "warm")}
    if not able:
        raise ConfigError(
            "expected an estimator that can start from witnesses (fmn) with --warm-start, "
            f"got {', '.join(estimators)}; add one, or leave --warm-start out"
        )
    found: dict[str, Estimator] = {}
    cold: set[str] = set()
    for text, estimator in estimators.items():
        if text not in able:
            found[text] = estimator
            continue
        given: Any = estimator
        warm = given if given.warm else dataclasses.replace(given, warm=given.WARM)
        control = dataclasses.replace(given, warm=0)
        found |= {text_form(warm): warm, text_form(control): control}
        cold.add(text_form(control))
    lines = [f"{text} has no warm start: measured cold" for text in estimators if text not in able]
    return found, cold, lines


def describe(estimators: Mapping[str, Estimator] | Mapping[str, Certifier], **options: int) -> list[dict[str, Any]]:
    """Manifest entries: canonical text, name, revision and all parameters, as they come back from JSON.

    Args:
        options: what else is to be said of each, as how often it is asked.

    Raises:
        EstimatorError: a text that is too long for the name of a file.
    """
    for text in estimators:
        length = len(Unit(text, NORMS[-1]).filename)
        if length > LONGEST:
            raise EstimatorError(
                f"expected an estimator whose text names a file, at most {LONGEST} bytes, got {length} for "
                f"{text[:40]}...; give fewer parameters or members"
            )
    entries = [
        {
            "estimator": text,
            "name": estimator.name,
            "revision": revision_of(estimator),
            "parameters": dataclasses.asdict(estimator),  # type: ignore[call-overload]
            **options,
        }
        for text, estimator in estimators.items()
    ]
    return cast("list[dict[str, Any]]", json.loads(json.dumps(entries)))
