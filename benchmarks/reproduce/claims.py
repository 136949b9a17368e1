"""Claims of the paper, tested against the stored tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.reproduce.numbers import Number
from benchmarks.reproduce.stored import NORMS, SPLITS, Stored, number, span
from benchmarks.reproduce.study import Group

SHOWN = {"l2": "L2", "linf": "L∞"}
USUAL = 40  # epochs of the paper's figures


@dataclass(frozen=True)
class Row:
    """The result of one claim for one estimator and group."""

    group: str
    estimator: str
    measured: str
    verdict: str
    images: int
    seeds: int


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper.

    Attributes:
        key: short name for the CSV.
        place: location in the paper.
        sentence: the claim in our words.
        measured: the measured quantity and the criterion for support.
        rows: function from the stored tables to the results.
    """

    key: str
    observation: int
    place: str
    sentence: str
    measured: str
    rows: Callable[[Stored], list[Row]]


def pairs(stored: Stored, dataset: str = "") -> Iterator[Group]:
    """The collected pairs of standard and adversarial runs over the usual epochs, optionally of one data set."""
    for group in stored.groups():
        options = stored.options(group.runs[0])
        both = stored.of_training(group, "standard") and stored.of_training(group, "pgd")
        if both and options["epochs"] <= USUAL and dataset in ("", options["dataset"]):
            yield group


def by_test(name: str, training: str = "", dataset: str = "") -> Callable[[Stored], list[Row]]:
    """Rows of a claim of `harness.statistics`: the joint verdict of its tests, and the final effects on test images.

    Args:
        training: only tests of runs with this training.
    """

    def rows(stored: Stored) -> list[Row]:
        found = []
        for group in pairs(stored, dataset):
            own = stored.group(group.name, "observations")
            own = own[own["claim"] == name]
            if training:
                # a pool is named after its first run
                first = stored.of_training(group, training)[0]
                own = own[own["run"].str.split(" of ").str[-1] == first]
            by_estimator = own.groupby("estimator", sort=False, dropna=False)
            for estimator, tests in sorted(by_estimator, key=lambda item: item[0] != "deepfool"):
                who = "" if pd.isna(estimator) else str(estimator)
                if who in ("", "deepfool", "cascade", "envelope"):
                    found.append(_tested_row(group, who, tests))
        return found

    return rows


def _tested_row(group: Group, estimator: str, tests: pd.DataFrame) -> Row:
    made = tests[tests["effect"].notna()]
    counts = made["verdict"].value_counts()
    verdict = "not tested" if made.empty else str(counts.index[0]) if len(counts) == 1 else "mixed: "
    if len(counts) > 1:
        verdict += ", ".join(f"{count} {name}" for name, count in counts.items())
    shown = []
    at_end = made[made["split"].isin(["test", "train - test"])]
    for norm, rows in at_end.groupby("norm", sort=False, dropna=False):
        last = rows.iloc[-1]
        label = "" if pd.isna(norm) else f"{SHOWN[str(norm)]} "
        shown.append(f"{label}{number(last['value'])} ({number(last['low'])} to {number(last['high'])})")
    effects = ", ".join(dict.fromkeys(made["effect"]))
    seeds = len(group.runs) // 2 if made["run"].str.contains(" seeds of ").any() else 1
    images = int(made["images"].max()) if len(made) else 0
    return Row(group.name, estimator, f"{effects}: {'; '.join(shown)}" if shown else "–", verdict, images, seeds)


def read_off(
    value: Number,
    holds: Callable[[float], bool],
    training: str,
    *,
    dataset: str = "",
    norms: Sequence[str] = NORMS,
    splits: Sequence[str] = SPLITS,
    by_estimator: bool = True,
    groups: Callable[[Stored], Iterator[Group]] | None = None,
) -> Callable[[Stored], list[Row]]:
    """Rows of a claim decided by a number, one per run, norm and split; without a test it covers only these runs.

    Args:
        holds: whether a number supports the claim.
        by_estimator: whether the number depends on estimator and norm.
        groups: groups other than the pairs.
    """

    def rows(stored: Stored) -> list[Row]:
        found = []
        for group in groups(stored) if groups else pairs(stored, dataset):
            runs = stored.of_training(group, training)
            estimators = stored.estimators(runs[0]) if by_estimator else [""]
            found += [
                _read_row(stored, group, runs, estimator)
                for estimator in estimators
                if not estimator or all(estimator in stored.estimators(run) for run in runs)
            ]
        return [row for row in found if row.verdict]

    def _read_row(stored: Stored, group: Group, runs: Sequence[str], estimator: str) -> Row:
        shown, held = [], []
        for norm in norms if by_estimator else ("",):
            numbers = [value(stored, run, estimator, norm, split) for run in runs for split in splits]
            known = [x for x in numbers if np.isfinite(x)]
            held += [holds(x) for x in known]
            shown.append(f"{SHOWN[norm]} {span(known)}" if norm else span(known))
        return Row(group.name, estimator, "; ".join(shown), _verdict(held), _images(stored, runs[0]), len(runs))

    return rows


def _verdict(held: Sequence[bool]) -> str:
    if not held:
        return ""
    if all(held) or not any(held):
        return "supported" if held[0] else "not supported"
    return f"mixed: {sum(held)} of {len(held)}"


def _images(stored: Stored, run: str) -> int:
    return int(stored.run(run, "summary")["count"].max())
