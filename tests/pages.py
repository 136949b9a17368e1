"""Synthetic reports: all numbers differ; of any size, with any names, or empty."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from harness.report import static
from harness.report.content import Headline, ImageCard, ReportContent, RunContent
from harness.statistics.averages import summarise
from harness.store import MARGIN_COLUMNS

ESTIMATORS = ("deepfool", "fmn:steps=20")
NORMS = ("l2", "linf")
SPLITS = ("train", "test")
KEY = ["epoch", "split", "estimator", "norm"]
CLASSES = 4
HOSTILE = "</script><img src=x onerror=alert(1)>"
FIGURES = [
    *("margins", "subsets", "distributions", "flow", "ratios", "classes", "confidence"),
    *("reliability", "calibration", "boundary", "changes", "paths", "composition"),
]
# suffixes of the names of static figures that a run has several of, or none
PARTS = {"distributions": ("-l2", "-linf"), "flow": ("-train", "-test"), "brackets": ()}
# the static figures of a run without certifiers, of both norms and splits
STATIC_FIGURES = [name + part for name in static.FIGURES for part in PARTS.get(name, ("",))]


def margins(
    estimators: Sequence[str],
    norms: Sequence[str],
    splits: Sequence[str],
    epochs: Sequence[int],
    images: int,
    seed: int,
) -> pd.DataFrame:
    """Rows of margin parts and of their envelope; 3% of the images are not found by the first estimator."""
    draw = np.random.default_rng(seed)
    parts = []
    label, prediction = draw.integers(0, CLASSES, images), draw.integers(0, CLASSES, (len(epochs), images))
    for (place, epoch), split, norm in itertools.product(enumerate(epochs), splits, norms):
        distances = draw.gamma(2.0, 0.1 if norm == "l2" else 0.01, (len(estimators), images))
        distances[0, draw.random(images) < 0.03] = math.inf
        named = {**dict(zip(estimators, distances, strict=True))}
        if len(estimators) > 1:
            named["envelope"] = distances.min(axis=0)
        for estimator, distance in named.items():
            found = np.isfinite(distance)
            columns = {
                "epoch": epoch,
                "split": split,
                "image": np.arange(images),
                "label": label,
                "prediction": prediction[place],
                "correct": prediction[place] == label,
                "confidence": draw.uniform(0.25, 1.0, images),
                "logit_margin": draw.uniform(0, 5, images),
                "estimator": estimator,
                "norm": norm,
                "domain": "box",
                "distance": distance,
                "attack_distance": 1.01 * distance,
                "status": np.where(found, "found", "not_found"),
                "target": np.where(
                    found, (prediction[place] + 1 + draw.integers(0, CLASSES - 1, images)) % CLASSES, -1
                ),
                "message": "",
                "basins": np.nan,
                "noise_retries": 0,
                "forwards": 100,
                "backwards": 50,
                "seconds": 0.01,
            }
            parts.append(pd.DataFrame(columns)[list(MARGIN_COLUMNS)])
    return pd.concat(parts, ignore_index=True)


def run(
    name: str = "standard",
    *,
    estimators: Sequence[str] = ESTIMATORS,
    norms: Sequence[str] = NORMS,
    splits: Sequence[str] = SPLITS,
    epochs: Sequence[int] = range(6),
    images: int = 40,
    whole: int = 120,
    seed: int = 0,
) -> RunContent:
    """A run with all its tables; each whole set has ``whole`` images."""
    draw = np.random.default_rng(seed + 1)
    rows = margins(estimators, norms, splits, epochs, images, seed)
    found = rows[np.isfinite(rows["distance"])]
    units = rows[KEY].drop_duplicates()
    later = units[units["epoch"] > min(epochs)]
    before = dict(zip(epochs[1:], epochs, strict=False))
    return RunContent(
        name=name,
        training="standard",
        manifest={
            "config": {
                "dataset": "digits",
                "training": name,
                "epochs": max(epochs),
                "norm": list(norms),
                "resume": False,
            },
            "seeds": {"seed": 0},
            "data": {"images": "0123abcd"},
            "versions": {"python": "3.11"},
            "machine": {"cores": 2, "threads": None},
            "command": ["-m", "harness.track"],
            "estimators": [{"estimator": text, "parameters": {"steps": 50}} for text in estimators],
        },
        warnings=[f"{name}: 3 images were not found"],
        summary=summarise(rows),
        epochs=_table(itertools.product(epochs, splits), ["epoch", "split"], ["loss", "error", "seconds"], draw),
        margins=rows,
        ratios=_ratios(
            units[units["estimator"] != "envelope"].iloc[: None if len(estimators) > 1 else 0], images, draw
        ),
        classes=found.groupby([*KEY, "label"], sort=False)["distance"]
        .agg(avg="mean", se="sem", found="size", count="size")
        .reset_index(),
        boundary=found.groupby([*KEY, "prediction", "target"], sort=False).size().reset_index(name="count"),
        changes=later.assign(
            previous=later["epoch"].map(before), images=images, changed=draw.uniform(0, 0.4, len(later))
        ),
        reliability=_reliability(epochs, splits, draw),
        calibration=_table(
            itertools.product(epochs, splits), ["epoch", "split"], ["ece", "overconfidence"], draw
        ).assign(images=whole),
        paths=found[found["image"] < 12][
            ["split", "estimator", "norm", "image", "label", "epoch", "distance", "correct"]
        ]
        .assign(rank=lambda table: table["image"])
        .reset_index(drop=True),
        composition=_composition(name, later, before, draw),
        correctness={
            split: pd.DataFrame({epoch: draw.random(whole) < 0.5 + 0.1 * min(epoch, 4) for epoch in epochs})
            for split in splits
        },
        images=[_card(estimators[0], norms[0], splits[-1], image, draw) for image in range(4)],
    )


def _table(
    keys: Iterable[tuple[object, ...]], names: list[str], values: list[str], draw: np.random.Generator
) -> pd.DataFrame:
    table = pd.DataFrame(list(keys), columns=names)
    return table.assign(**{value: draw.uniform(0.01, 0.5, len(table)) for value in values})


def _ratios(units: pd.DataFrame, images: int, draw: np.random.Generator) -> pd.DataFrame:
    ratio = 1 + draw.uniform(0, 0.2, len(units))
    return units.assign(ratio=ratio, low=ratio - 0.02, high=ratio + 0.02, images=images).reset_index(drop=True)


def _reliability(epochs: Sequence[int], splits: Sequence[str], draw: np.random.Generator) -> pd.DataFrame:
    table = pd.DataFrame(list(itertools.product(epochs, splits, range(15))), columns=["epoch", "split", "bin"])
    low = table["bin"] / 15
    count = np.where(table["bin"] < 4, 0, draw.integers(1, 30, len(table)))
    blank = np.where(count > 0, 1.0, math.nan)
    return table.assign(
        low=low,
        high=low + 1 / 15,
        count=count,
        confidence=(low + 1 / 30) * blank,
        accuracy=draw.random(len(table)) * blank,
    )


def _composition(name: str, later: pd.DataFrame, before: dict[int, int], draw: np.random.Generator) -> pd.DataFrame:
    parts = []
    for subset, measure in itertools.product(("correct", "incorrect"), ("distance", "attack_distance")):
        values = draw.normal(0, 0.05, (3, len(later)))
        parts.append(
            later.assign(
                run=name,
                previous=later["epoch"].map(before),
                measure=measure,
                subset=subset,
                change=values.sum(axis=0),
                stayers=values[0],
                entrants=values[1],
                leavers=values[2],
                n_stayers=20,
                n_entrants=3,
                n_leavers=2,
                gap=draw.normal(0, 1, len(later)),
            )
        )
    return pd.concat(parts, ignore_index=True)


def _card(estimator: str, norm: str, split: str, image: int, draw: np.random.Generator) -> ImageCard:
    original = draw.random((8, 8)) if image % 2 else draw.random((8, 8, 3))
    perturbation = draw.normal(0, 0.01, original.shape)
    kind = "smallest" if image < 2 else "largest"
    shape = {"original": original, "witness": original + perturbation, "perturbation": perturbation}
    return ImageCard(split, norm, estimator, image, 1, 2, 3, 0.1234, kind, **shape)


def findings(run_names: Sequence[str], units: pd.DataFrame) -> pd.DataFrame:
    """One test per observation, run, estimator, norm and split; a third of the tests has each verdict."""
    draw = np.random.default_rng(5)
    parts = [units.assign(observation=number, run=name) for number in (1, 2, 3) for name in run_names]
    table = pd.concat(parts, ignore_index=True)
    value = draw.normal(0, 1, len(table))
    verdicts = np.array(["supported", "not supported", "undecided"])[np.arange(len(table)) % 3]
    return table.assign(
        claim="jump",
        measure="distance",
        epochs="0 → 1",
        effect="median change",
        value=value,
        low=value - 0.1,
        high=value + 0.1,
        level=0.9996,
        p=draw.random(len(table)) ** 8,
        p_holm=0.01,
        images=40,
        left_out=1,
        bound=math.nan,
        verdict=verdicts,
        reason=np.where(verdicts == "undecided", "fewer than 10 images", ""),
        detail="Wilcoxon signed rank",
    )


def report(*runs: RunContent) -> ReportContent:
    """A report with synthetic verdicts on the runs."""
    units = runs[0].summary[["estimator", "norm", "split"]].drop_duplicates() if len(runs[0].summary) else None
    names = [one.name for one in runs]
    tests = findings(names, units) if units is not None else pd.DataFrame()
    numbers = tests[tests["observation"] < 3].drop(columns=["verdict", "reason"]) if len(tests) else tests
    return ReportContent(
        title=f"Margins of {', '.join(names)}",
        created="2026-01-01 00:00 UTC",
        version="0.0",
        runs=list(runs),
        findings=tests,
        descriptions=numbers,
        headlines={
            1: [Headline(1, "supported", "Margins shrink by 0.123 (0.1 to 0.2).", ["in all tests"])],
            3: [Headline(3, "undecided", "Fewer than 10 images.", []), Headline(3, "mixed", "Some do.", [])],
        },
        warnings=["observation 3: 4 tests undecided"],
    )


def emptied(one: RunContent, *, columns: bool) -> RunContent:
    """The run with empty tables, with or without their columns."""
    tables = {
        field.name: value.iloc[:0] if columns else pd.DataFrame()
        for field in dataclasses.fields(one)
        if isinstance(value := getattr(one, field.name), pd.DataFrame)
    }
    return dataclasses.replace(one, **tables, correctness={}, images=[], warnings=[], manifest={})


def all_failed(one: RunContent) -> RunContent:
    """The run if no estimator had found a witness."""
    rows = one.margins.assign(distance=math.inf, attack_distance=math.inf, status="failed", target=-1)
    empty = emptied(one, columns=True)
    return dataclasses.replace(
        empty,
        margins=rows,
        summary=summarise(rows),
        epochs=one.epochs,
        classes=one.classes.assign(avg=math.nan, se=math.nan, found=0),
        reliability=one.reliability,
        calibration=one.calibration,
        correctness=one.correctness,
    )


def all_correct(one: RunContent) -> RunContent:
    """The run if every image were classified correctly."""
    rows = one.margins.assign(correct=True, prediction=one.margins["label"])
    return dataclasses.replace(
        one,
        margins=rows,
        summary=summarise(rows),
        paths=one.paths.assign(correct=True),
        composition=one.composition[one.composition["subset"] == "correct"],
        correctness={split: table | True for split, table in one.correctness.items()},
    )


def without_predictions(one: RunContent) -> RunContent:
    """The run as `MarginTracker` writes it in a custom training loop."""
    return dataclasses.replace(
        one,
        epochs=one.epochs.iloc[:0],
        reliability=one.reliability.iloc[:0],
        calibration=one.calibration.iloc[:0],
        correctness={},
    )


def hostile() -> ReportContent:
    """A report whose external names and texts are all scripts, with a harmless run."""
    first = run(HOSTILE, estimators=[HOSTILE, "fmn"], splits=[HOSTILE, "test"], norms=["l2"], epochs=range(3))
    first = dataclasses.replace(
        first, warnings=[HOSTILE], manifest={HOSTILE: HOSTILE, "config": {HOSTILE: {HOSTILE: HOSTILE}}}
    )
    content = report(first, run("other", epochs=range(3)))
    tests = content.findings.assign(reason=HOSTILE, claim=HOSTILE, detail=HOSTILE)
    headlines = {1: [Headline(1, "supported", HOSTILE, [HOSTILE])]}
    return dataclasses.replace(
        content, title=HOSTILE, version=HOSTILE, findings=tests, headlines=headlines, warnings=[HOSTILE]
    )
