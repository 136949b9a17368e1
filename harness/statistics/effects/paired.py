"""Effects over one group of images: paired changes, averages, ratios of averages, shares.

Values are NaN for images that take no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy import stats

from harness.statistics.effects.effect import Effect, Student


@dataclass(frozen=True, eq=False)
class MedianChange(Effect):
    """Median of paired changes with its percentile bootstrap interval in closed form; also Wilcoxon's signed rank test.

    The bootstrap's r-th smallest value is at most the sample's k-th with the probability that a binomial variable of
    n draws with probability k/n is at least r (Efron 1979, section 3), so no resampling is needed. With few images
    and strict levels this interval is too narrow. It is therefore widened to at least the sign test's interval, which
    is exact and may be infinite.

    Attributes:
        changes: ``(N,)``, NaN for images without a pair.
    """

    name: ClassVar[str] = "median change"
    changes: np.ndarray

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(self.changes[np.isfinite(self.changes)])

    @property
    def estimate(self) -> float:
        return float(np.median(self._sorted))

    @property
    def images(self) -> int:
        return len(self._sorted)

    @property
    def left_out(self) -> int:
        return len(self.changes) - self.images

    def interval(self, alpha: float) -> tuple[float, float]:
        # rank, from either end, of the ends of the sign test's interval
        outer = int(stats.binom.ppf(alpha / 2, self.images, 0.5))
        if outer == 0:
            return -math.inf, math.inf
        low = min(int(np.argmax(self._reach(self._ranks[0]) >= alpha / 2)), outer - 1)
        high = max(int(np.argmax(self._reach(self._ranks[1]) >= 1 - alpha / 2)), self.images - outer)
        return float(self._sorted[low]), float(self._sorted[high])

    @property
    def p(self) -> float:
        n = self.images
        at_most, below = (self._sorted <= 0).sum(), (self._sorted < 0).sum()
        low, high = self._ranks
        from_above = stats.binom.sf(low - 1, n, at_most / n)
        from_below = stats.binom.cdf(high - 1, n, below / n)
        sign = stats.binom.cdf([at_most, n - below], n, 0.5).min()
        return float(min(1.0, 2 * max(sign, min(from_above, from_below))))

    @property
    def _ranks(self) -> tuple[int, int]:
        """Ranks of the lower and the upper median, counted from 1."""
        return (self.images + 1) // 2, self.images // 2 + 1

    def _reach(self, rank: int) -> np.ndarray:
        """``(n,)`` probability that the bootstrap's value of this rank is at most each of the sorted values."""
        n = self.images
        return np.asarray(stats.binom.sf(rank - 1, n, np.arange(1, n + 1) / n))

    def resample(self, counts: np.ndarray) -> np.ndarray:
        kept = np.flatnonzero(np.isfinite(self.changes))
        order = kept[np.argsort(self.changes[kept], kind="stable")]
        total = np.cumsum(counts[:, order], axis=1)
        return np.asarray(self._sorted[np.argmax(2 * total >= total[:, -1:], axis=1)])

    def classical(self) -> str:
        if not np.any(self._sorted):
            return "Wilcoxon signed rank: no image changed"
        p = stats.wilcoxon(self._sorted, method="asymptotic").pvalue
        return f"Wilcoxon signed rank p = {p:.3g}"


@dataclass(frozen=True, eq=False)
class MeanChange(Student):
    """Average of one value per image, with Student's interval.

    The error is the bootstrap's times ``sqrt(n / (n - 1))``. For an average the bootstrap's error has a closed form,
    the paper's formula. Without the factor a test with 10 images rejects too often.

    Attributes:
        values: ``(N,)``, NaN for images that take no part.
    """

    name: ClassVar[str] = "average difference"
    values: np.ndarray

    @cached_property
    def _kept(self) -> np.ndarray:
        return np.asarray(self.values[np.isfinite(self.values)])

    @property
    def estimate(self) -> float:
        return float(self._kept.mean())

    @property
    def error(self) -> float:
        return float(self._kept.std(ddof=1) / math.sqrt(self.images))

    @property
    def freedom(self) -> float:
        return self.images - 1

    @property
    def images(self) -> int:
        return len(self._kept)

    @property
    def left_out(self) -> int:
        return len(self.values) - self.images

    def resample(self, counts: np.ndarray) -> np.ndarray:
        kept = np.isfinite(self.values)
        return np.asarray((counts[:, kept] @ self._kept) / counts[:, kept].sum(axis=1))


class SlopeDifference(MeanChange):
    """`MeanChange` of the slopes of the single images."""

    name = "difference of slopes, an epoch"


@dataclass(frozen=True, eq=False)
class LogMeans(Student):
    """``sum_k sign_k log(average of value k)`` over the same images, with an error by the delta method.

    With signs ``+1, -1`` it is the logarithm of the ratio of two averages. With four values it is the logarithm of the
    ratio of two such ratios.

    Attributes:
        values: ``(N, K)`` positive; NaN where an image has no value. Rows with a NaN take no part.
        signs: ``(K,)``.
    """

    name: ClassVar[str] = "ratio of averages"
    values: np.ndarray
    signs: np.ndarray

    @cached_property
    def _kept(self) -> np.ndarray:
        return np.asarray(self.values[np.isfinite(self.values).all(axis=1)])

    @property
    def estimate(self) -> float:
        return float(self.signs @ np.log(self._kept.mean(axis=0)))

    @property
    def error(self) -> float:
        influence = (self._kept / self._kept.mean(axis=0) - 1) @ self.signs
        return float(np.sqrt(np.square(influence).sum() / (self.images - 1) / self.images))

    @property
    def freedom(self) -> float:
        return self.images - 1

    @property
    def images(self) -> int:
        return len(self._kept)

    @property
    def left_out(self) -> int:
        return len(self.values) - self.images

    def show(self, value: float) -> float:
        return math.exp(value)

    def resample(self, counts: np.ndarray) -> np.ndarray:
        kept = np.isfinite(self.values).all(axis=1)
        averages = (counts[:, kept] @ self._kept) / counts[:, kept].sum(axis=1, keepdims=True)
        return np.asarray(np.log(averages) @ self.signs)


class KeptShares(LogMeans):
    """`LogMeans` of four values: the ratio of the shares of an earlier average that two runs kept."""

    name = "ratio of the shares kept"


@dataclass(frozen=True, eq=False)
class Share(Effect):
    """Share of hits minus one half, with the exact interval of Clopper and Pearson.

    Attributes:
        hits: ``(N,)`` 1 for a hit, 0 for no hit, NaN for images to which the question does not apply.
    """

    name: ClassVar[str] = "share"
    limits: ClassVar[tuple[float, float]] = (-0.5, 0.5)
    hits: np.ndarray

    @cached_property
    def _counts(self) -> tuple[int, int]:
        asked = self.hits[np.isfinite(self.hits)]
        return int(asked.sum()), len(asked)

    @property
    def estimate(self) -> float:
        hits, asked = self._counts
        return hits / asked - 0.5

    @property
    def images(self) -> int:
        return self._counts[1]

    @property
    def left_out(self) -> int:
        return 0  # images to which the question does not apply are not missing

    @property
    def size(self) -> int:
        return len(self.hits)

    def show(self, value: float) -> float:
        return value + 0.5

    @property
    def p(self) -> float:
        return float(stats.binomtest(*self._counts).pvalue)

    def interval(self, alpha: float) -> tuple[float, float]:
        hits, asked = self._counts
        low = stats.beta.ppf(alpha / 2, hits, asked - hits + 1) if hits else 0.0
        high = stats.beta.isf(alpha / 2, hits + 1, asked - hits) if hits < asked else 1.0
        return float(low) - 0.5, float(high) - 0.5

    def resample(self, counts: np.ndarray) -> np.ndarray:
        asked = np.isfinite(self.hits)
        return np.asarray((counts[:, asked] @ self.hits[asked]) / np.maximum(counts[:, asked].sum(axis=1), 1) - 0.5)
