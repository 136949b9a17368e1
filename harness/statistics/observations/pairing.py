"""Grouping of runs: seeds of one set-up, and pairs of standard and adversarial training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.config.run_config import ADVERSARIAL
from harness.runs import PGD_OPTIONS, Run
from harness.statistics.effects.seeds import LEAST_SEEDS, Pooled
from harness.statistics.observations.verdicts import Trial
from harness.statistics.panels import Panel


@dataclass(frozen=True)
class Measured:
    """One run with the tables that are derived from its rows.

    Attributes:
        margins: the run's rows and those of the envelope.
        summary: `harness.statistics.summarise` of ``margins``.
        panels: one per split, estimator, norm and measure.
        correctness: split -> ``(image x epoch)`` bool of the whole sets.
        reliability, calibration: see `harness.statistics.calibration`.

    Where no predictions were kept, ``correctness``, ``reliability`` and ``calibration`` are of the probe images.
    """

    run: Run
    margins: pd.DataFrame
    summary: pd.DataFrame
    panels: list[Panel]
    correctness: dict[str, pd.DataFrame]
    reliability: pd.DataFrame
    calibration: pd.DataFrame


def seed_groups(measured: Iterable[Measured]) -> list[list[Measured]]:
    """Groups of runs that differ by seed only, each seed once; a run without options is a group of its own."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        alike = one.run.alike(but=("seed",)) or f"alone: {one.run.name}"
        groups.setdefault(alike, []).append(one)
    distinct = []
    for group in groups.values():
        by_seed: dict[int | None, Measured] = {}
        for one in group:
            by_seed.setdefault(one.run.seed, one)
        distinct.append(list(by_seed.values()))
    return distinct


def pool_name(group: list[Measured]) -> str:
    """The name of a group of seeds in the tables."""
    return f"{len(group)} seeds of {group[0].run.name}"


def find_pairs(groups: list[list[Measured]]) -> list[tuple[list[Measured], list[Measured]]]:
    """Pairs of a standard and an adversarial group that differ in the options of training (and seed) only."""

    def key(group: list[Measured]) -> str:
        return group[0].run.alike(but=("seed", "training", *PGD_OPTIONS))

    standard = [group for group in groups if group[0].run.training == "standard"]
    adversarial = [group for group in groups if group[0].run.training in ADVERSARIAL]
    return [(one, other) for one in standard for other in adversarial if key(one) and key(one) == key(other)]


def couples(standard: list[Measured], adversarial: list[Measured]) -> list[tuple[Measured, Measured]]:
    """Pairs of runs with equal seeds; two single runs are a pair also with different seeds."""
    if len(standard) == len(adversarial) == 1:
        return [(standard[0], adversarial[0])]
    others = {one.run.seed: one for one in adversarial}
    return [(one, others[one.run.seed]) for one in standard if one.run.seed in others]


def notes(
    measured: list[Measured], groups: list[list[Measured]], pairs: list[tuple[list[Measured], list[Measured]]]
) -> list[str]:
    """Sentences on how runs were grouped and paired, for the warnings of the report."""
    lines = [
        f"{pool_name(group)}: {', '.join(one.run.name for one in group)}"
        for group in groups
        if len(group) >= LEAST_SEEDS
    ]
    kept = {id(one) for group in groups for one in group}
    lines += [
        f"{one.run.name} is left out of the tests: another run is the same network (options and seed are equal)"
        for one in measured
        if id(one) not in kept
    ]
    lines += [
        f"{one[0].run.name} and {other[0].run.name} are compared although their seeds differ"
        for one, other in pairs
        if len(one) == len(other) == 1 and one[0].run.seed != other[0].run.seed
    ]
    domains = {str(domain) for one in measured for domain in one.margins["domain"].unique()}
    if len(domains) > 1:
        lines.append(f"runs of different domains ({', '.join(sorted(domains))}) are not compared with each other")
    if len(measured) > 1 and not any(couples(*pair) for pair in pairs):
        lines.append("no two runs differ in their training only, with the same seed: observation 2 is not tested")
    return lines


def refuse_unequal(trial: Trial, together: list[Measured]) -> Trial:
    """The trial, without its effect where the runs measured its estimator with different parameters.

    Equal texts of an estimator may hide this: they leave out defaults, which may change between versions.
    """
    parameters = {one.run.parameters.get(trial.estimator) for one in together} - {None}
    if len(parameters) > 1:
        return replace(trial, effect=None, obstacle="the runs measured it with other parameters")
    return trial


def pool(each: list[list[Trial]], together: list[Measured], name: str) -> list[Trial]:
    """The trials unchanged for fewer than five seeds; otherwise one pooled trial per question.

    Args:
        each: the trials of each seed.
        together: the runs of all seeds.
        name: the name of the pooled runs in the tables.
    """
    if len(each) < LEAST_SEEDS:
        return [trial for trials in each for trial in trials]
    questions: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in (trial for trials in each for trial in trials):
        checked = refuse_unequal(trial, together).checked()
        asked = (checked.claim, checked.estimator, checked.norm, checked.split, checked.measure, checked.epochs)
        questions.setdefault(asked, []).append(checked)
    return [_pool_one(trials, len(each), name) for trials in questions.values()]


def _pool_one(trials: list[Trial], seeds: int, name: str) -> Trial:
    effects = [trial.effect for trial in trials if trial.effect is not None]
    pooled = replace(trials[0], run=name, effect=None)
    if len(effects) < seeds or len({effect.size for effect in effects}) > 1:
        reasons = [trial.obstacle for trial in trials if trial.obstacle] or ["it measured other epochs or images"]
        return replace(pooled, obstacle=f"not all of {seeds} seeds can be tested: {reasons[0]}")
    bound = float(np.mean([trial.bound for trial in trials]))
    return replace(pooled, effect=Pooled(tuple(effects)), bound=bound, obstacle="")
