"""Effects over images, each with an interval at any level and a p-value that belongs to the interval.

A test of hundreds may need an interval at 99.99%, where drawn bootstraps run out of draws. So every
interval here has a closed form: the median's bootstrap distribution is binomial, the bootstrap
standard error of a mean is the paper's own formula, and the rest is asymptotic. Values are aligned
with the probe's images and NaN where an image takes no part, so that runs that measured the same
images can be resampled together (`harness.statistics.effects.seeds`).
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
        name: what it is, for the tables.
        limits: between which it lies.
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
        """How many images it is over."""

    @property
    @abstractmethod
    def left_out(self) -> int:
        """How many could not take part, for want of a distance."""

    @property
    def size(self) -> int:
        """How many images it is aligned with, those included that take no part."""
        return self.images + self.left_out

    @property
    def smaller_group(self) -> int:
        """Images in the smaller of the groups it compares, which decide more than all; all of them where it has one."""
        return self.images

    @property
    @abstractmethod
    def p(self) -> float:
        """Two-sided: the smallest ``alpha`` whose interval leaves out 0."""

    @abstractmethod
    def interval(self, alpha: float) -> tuple[float, float]:
        """The interval of coverage ``1 - alpha``."""

    @abstractmethod
    def resample(self, counts: np.ndarray) -> np.ndarray:
        """``(B,)`` the effect where image ``i`` counts ``counts[b, i]`` times; ``counts`` is ``(B, N)``."""

    def obstacle(self) -> str:
        """Why there is nothing to test; empty where there is."""
        if self.images < LEAST_IMAGES:
            return f"fewer than {LEAST_IMAGES} images"
        return ""

    def show(self, value: float) -> float:
        """A value on the effect's scale as it is told: logarithms as factors, for example."""
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
        """Degrees of freedom of t."""

    def interval(self, alpha: float) -> tuple[float, float]:
        reach = float(stats.t.isf(alpha / 2, self.freedom)) * self.error
        return self.estimate - reach, self.estimate + reach

    @property
    def p(self) -> float:
        if self.error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.estimate) / self.error, self.freedom))


def is_sound(effect: Effect) -> bool:
    """Whether the estimate and a 95% interval are finite, and an error that it is built from is not nothing."""
    if isinstance(effect, Student) and not effect.error > 0:
        return False
    return all(map(math.isfinite, (effect.estimate, *effect.interval(0.05))))
