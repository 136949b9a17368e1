"""Data classes of a report's content: tables of every run, verdicts, and images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

VERDICTS = ("supported", "not supported", "undecided", "mixed", "not tested")


@dataclass(frozen=True)
class ImageCard:
    """One image and its witness.

    Attributes:
        kind: "smallest" or "largest": the end of the run's margins that the image was taken from.
        original, witness: pixels in [0, 1], ``(H, W)`` or ``(H, W, 3)``.
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
    """One run: its tables (columns as in `harness.statistics`; any may be empty) and its manifest.

    Attributes:
        training: "standard", "pgd", "trades", "gaussian" or "" (unknown).
        correctness: split -> whether each image of the whole set is classified correctly: bool, one row per image, one
            column per epoch. Empty where there are no predictions.
        warnings: sentences for the section of warnings.
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
    """The content of the page.

    Attributes:
        headlines: observation (1, 2, 3) -> its headlines.
        warnings: warnings that are not about a single run.
        trust: sentences on the bias of each estimator and on verdicts that depend on the estimator.
        verdicts: see `harness.statistics.trust.verdicts_by_estimator`.
        biases: see `harness.statistics.trust.bias_trend`, with the run in the first column.
        warm: sentences on warm starts; empty without warm starts.
        savings: see `harness.statistics.warm.warm_savings`, with the run in the first column.
        bracketed: sentences on brackets; empty without lower bounds.
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
