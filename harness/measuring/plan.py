"""Plan a run: the units to measure, every estimator in every norm that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from attacks.arguments import check_choice, several, shown, whole
from attacks.certifier import Certifier
from attacks.estimator import Estimator
from attacks.measure import MeasureOptions
from attacks.registry import check_needs, create, create_certifier, text_form
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, InputError, Norm
from harness.config.options import ConfigError
from harness.config.run_config import RunConfig
from harness.store import Unit

Made = TypeVar("Made", Estimator, Certifier)
# rows keep epochs in 32 bits
LAST_EPOCH = 2**31 - 1
# of a unit's name in bytes: file systems end at 255, and temporary names are longer than the file's
LONGEST = 200


def made_estimators(given: str | Estimator | Iterable[str | Estimator]) -> dict[str, Estimator]:
    """Estimators of texts and objects, by canonical text; a text or an object alone is one.

    Raises:
        EstimatorError: an unknown text, or something else.
    """
    return _made(given, create, "perturb", "estimators as texts or objects")


def made_certifiers(given: str | Certifier | Iterable[str | Certifier]) -> dict[str, Certifier]:
    """The same of certifiers.

    Raises:
        EstimatorError: an unknown text, or something else.
    """
    return _made(given, create_certifier, "certify", "certifiers as texts or objects")


def _made(given: object, make: Callable[[str], Made], method: str, what: str) -> dict[str, Made]:
    made: dict[str, Made] = {}
    for item in several(given):
        one = make(item) if isinstance(item, str) else item
        # a class has the method too
        if isinstance(one, type) or not callable(getattr(one, method, None)):
            raise EstimatorError(f"expected {what}, got {shown(item)}; name one, or make an object of its class")
        made[text_form(one)] = one
    return made


def plain_norms(given: Norm | Iterable[Norm]) -> list[Norm]:
    """Norms, each once; a text alone is one.

    Raises:
        InputError: none, or an unknown one.
    """
    norms = several(given)
    if not norms or any(norm not in NORMS for norm in norms):
        got = ", ".join(map(shown, norms)) or "none"
        raise InputError(f"expected norms of {', '.join(NORMS)}, got {got}; choose one or both")
    return list(dict.fromkeys(norms))


def plain_epoch(epoch: int) -> int:
    """``epoch`` as an integer of Python.

    Raises:
        InputError: no whole number of at least 0, which is before the first update.
    """
    return whole("an epoch", epoch, 0, LAST_EPOCH)


def measure_options(config: RunConfig) -> MeasureOptions:
    """How a run measures its images, whose pixels are in ``[0, 1]``; ``config`` has a batch size (see `sized`)."""
    return MeasureOptions(
        domain=cast(Domain, config.domain),
        noise_retries=config.noise_retries,
        batch_size=config.measure_batch or MeasureOptions.batch_size,
        expect_over=config.expect_over,
        binary=config.binary,
    )


@dataclass(frozen=True)
class Plan:
    """What a run measures at every epoch.

    Attributes:
        estimators: by canonical text; of those that start warm, both forms.
        units: every estimator in every norm that it has.
        cold: texts of the cold forms, which are measured at some epochs only.
        lines: one for each norm of an estimator that is skipped, and for each estimator without a warm start.
    """

    estimators: Mapping[str, Estimator]
    units: Sequence[Unit] = ()
    cold: frozenset[str] = frozenset()
    lines: Sequence[str] = ()


def make_plan(
    estimators: Mapping[str, Estimator], norms: Sequence[Norm], domain: Domain, *, warm_start: bool = False
) -> Plan:
    """Plan a run; without estimators there is nothing to measure.

    Raises:
        InputError, EstimatorError: see `plan_units`.
        ConfigError: see `warm_starts`.
    """
    cold, lines = set[str](), list[str]()
    if warm_start:
        estimators, cold, lines = warm_starts(estimators)
    if not estimators:
        return Plan({})
    units, skipped = plan_units(estimators, norms, domain)
    return Plan(estimators, units, frozenset(cold), lines + skipped)


def plan_units(
    estimators: Mapping[str, Estimator], norms: Sequence[Norm], domain: Domain
) -> tuple[list[Unit], list[str]]:
    """The units to measure, and a line for every estimator's norm that is skipped.

    Raises:
        InputError: no norm, or an unknown one or domain.
        EstimatorError: no estimator, or one has none of the norms, or not the domain, or lacks a package.
    """
    norms = plain_norms(norms)
    check_choice("domain", domain, DOMAINS)
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
    """Every estimator that has a setting ``warm`` in its warm form, its cold form next to it, the others as they are.

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
    planned: dict[str, Estimator] = {}
    cold: set[str] = set()
    for text, estimator in estimators.items():
        if text not in able:
            planned[text] = estimator
            continue
        base: Any = estimator
        warm = base if base.warm else dataclasses.replace(base, warm=base.WARM)
        control = dataclasses.replace(base, warm=0)
        planned |= {text_form(warm): warm, text_form(control): control}
        cold.add(text_form(control))
    lines = [f"{text} has no warm start: measured cold" for text in estimators if text not in able]
    return planned, cold, lines
