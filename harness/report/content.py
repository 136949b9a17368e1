"""What a report is made of: the tables of every run, the verdicts, and a few images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

VERDICTS = ("supported", "not supported", "undecided", "mixed", "not tested")


@dataclass(frozen=True)
class ImageCard:
    """One image beside its witness.

    Attributes:
        kind: "smallest" or "largest": the end of the run's margins that the image was taken from.
        original: pixels, (H, W) or (H, W, 3), in [0, 1]; so is ``witness``.
        perturbation: witness - original, signed.
    """

    split: str
    norm: str
    estimator: str
    image: int
    label: int
    prediction: int
    target: int
    distance: float
    kind: str
    original: NDArray[np.floating[Any]]
    witness: NDArray[np.floating[Any]]
    perturbation: NDArray[np.floating[Any]]


@dataclass(frozen=True)
class RunContent:
    """One run: its tables (columns as `harness.statistics` gives them; any may be empty) and what it was.

    Attributes:
        training: "standard", "pgd" or "" (unknown).
        correctness: split -> whether each image of the whole set is classified correctly: bool, one row an
            image, one column an epoch. Empty where there are no predictions.
        warnings: plain sentences.
        warm: see `harness.statistics.warm.warm_ratios`.
        brackets: see `harness.statistics.brackets.bracket_table`; empty where nothing was certified.
    """

    name: str
    training: str
    manifest: dict[str, Any]
    warnings: list[str]
    summary: pd.DataFrame
    epochs: pd.DataFrame
    margins: pd.DataFrame
    ratios: pd.DataFrame
    classes: pd.DataFrame
    boundary: pd.DataFrame
    changes: pd.DataFrame
    reliability: pd.DataFrame
    calibration: pd.DataFrame
    paths: pd.DataFrame
    composition: pd.DataFrame
    correctness: dict[str, pd.DataFrame]
    images: list[ImageCard]
    warm: pd.DataFrame = field(default_factory=pd.DataFrame)
    brackets: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass(frozen=True)
class Headline:
    """One statement on an observation: its verdict (one of `VERDICTS`) and a sentence with the numbers."""

    observation: int
    verdict: str
    sentence: str
    details: list[str]


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page.

    Attributes:
        headlines: by observation (1, 2, 3).
        warnings: those of no single run.
        trust: which estimator can be trusted, in sentences.
        verdicts: see `harness.statistics.trust.verdicts_by_estimator`.
        biases: see `harness.statistics.trust.bias_trend`, with the run first.
        warm: what warm starts saved and did, in sentences; none where there are none.
        savings: see `harness.statistics.warm.warm_savings`, with the run first.
        bracketed: what lower bounds say, in sentences; none where there are none.
        proofs: see `harness.statistics.brackets.proved`.
        side_by_side: see `harness.statistics.side_by_side.side_by_side`; empty for a single run.
    """

    title: str
    created: str
    version: str
    runs: list[RunContent]
    findings: pd.DataFrame
    descriptions: pd.DataFrame
    headlines: dict[int, list[Headline]]
    warnings: list[str]
    trust: list[str] = field(default_factory=list)
    verdicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    biases: pd.DataFrame = field(default_factory=pd.DataFrame)
    warm: list[str] = field(default_factory=list)
    savings: pd.DataFrame = field(default_factory=pd.DataFrame)
    bracketed: list[str] = field(default_factory=list)
    proofs: pd.DataFrame = field(default_factory=pd.DataFrame)
    side_by_side: pd.DataFrame = field(default_factory=pd.DataFrame)
