"""Base classes of effects over images: an estimate, an interval at any level, and the p-value of that interval.

With hundreds of tests, Holm's correction may need an interval at 99.99%, for which a drawn bootstrap has too few draws.
Every interval here therefore has a closed form: the bootstrap distribution of a median is binomial, the bootstrap
standard error of a mean is the paper's own formula, and the others are asymptotic. Values are aligned with the probe's
images, with NaN for images that take no part. Runs that measured the same images can therefore be resampled together
(`harness.statistics.effects.seeds`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from scipy import stats

LEAST_IMAGES = 10


class Effect(ABC):
    """One number about images, on a scale where 0 means no effect.

    Attributes:
        name: its name in the tables.
        limits: the smallest and the largest possible value.
    """

    name: ClassVar[str]
    limits: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @property
    @abstractmethod
    def estimate(self) -> float:
        """The effect."""

    @property
    @abstractmethod
    def images(self) -> int:
        """The number of images that the effect is computed over."""

    @property
    @abstractmethod
    def left_out(self) -> int:
        """The number of images left out because they have no distance."""

    @property
    def size(self) -> int:
        """The number of images that the values are aligned with, including those that take no part."""
        return self.images + self.left_out

    @property
    def smaller_group(self) -> int:
        """The number of images in the smaller of the compared groups; all images where there is one group."""
        return self.images

    @property
    @abstractmethod
    def p(self) -> float:
        """Two-sided p-value: the smallest ``alpha`` whose interval excludes 0."""

    @abstractmethod
    def interval(self, alpha: float) -> tuple[float, float]:
        """The interval of coverage ``1 - alpha``."""

    @abstractmethod
    def resample(self, counts: np.ndarray) -> np.ndarray:
        """``(B,)`` the effect where image ``i`` counts ``counts[b, i]`` times; ``counts`` is ``(B, N)``."""

    def obstacle(self) -> str:
        """The reason why the effect cannot be tested; empty where it can be."""
        if self.images < LEAST_IMAGES:
            return f"fewer than {LEAST_IMAGES} images"
        return ""

    def show(self, value: float) -> float:
        """A value converted from the effect's scale to the one reported, for example a logarithm to a factor."""
        return value

    def classical(self) -> str:
        """The textbook test of the same question, with its uncorrected p-value; may be empty."""
        return ""


class Student(Effect):
    """An effect whose interval is ``estimate ± t * error``."""

    @property
    @abstractmethod
    def error(self) -> float:
        """The standard error."""

    @property
    @abstractmethod
    def freedom(self) -> float:
        """Degrees of freedom of the t distribution."""

    def interval(self, alpha: float) -> tuple[float, float]:
        reach = float(stats.t.isf(alpha / 2, self.freedom)) * self.error
        return self.estimate - reach, self.estimate + reach

    @property
    def p(self) -> float:
        if self.error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.estimate) / self.error, self.freedom))


def is_sound(effect: Effect) -> bool:
    """Whether the estimate and its 95% interval are finite and, for a `Student` effect, the error is above 0."""
    if isinstance(effect, Student) and not effect.error > 0:
        return False
    return all(map(math.isfinite, (effect.estimate, *effect.interval(0.05))))
