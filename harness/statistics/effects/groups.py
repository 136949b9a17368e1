"""Effects between two groups of images: Cliff's delta, averages, variances, and detection by a score.

``member`` gives the group of each image: True for the first (misclassified, or training images), False
for the second. Values are NaN for images that are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy import stats

from harness.statistics.effects.effect import LEAST_IMAGES, Effect, Student


class _Grouped(Effect):
    """What effects of a value and a group share."""

    values: np.ndarray
    member: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """Values of the first group."""
        return np.asarray(self.values[self.member & np.isfinite(self.values)])

    @cached_property
    def second(self) -> np.ndarray:
        """Values of the second group."""
        return np.asarray(self.values[~self.member & np.isfinite(self.values)])

    @property
    def images(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def left_out(self) -> int:
        return len(self.values) - self.images

    @property
    def smaller_group(self) -> int:
        return min(len(self.first), len(self.second))

    def obstacle(self) -> str:
        return few_in_a_group(self)


def few_in_a_group(effect: Effect) -> str:
    """Why a comparison of groups is none; empty where it is one."""
    return f"fewer than {LEAST_IMAGES} images in a group" if effect.smaller_group < LEAST_IMAGES else ""


def placements(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each value of one group, share of the other below it less share above it; both means are delta."""

    def place(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        ordered = np.sort(other)
        below, at_most = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        return np.asarray((below + at_most - len(ordered)) / len(ordered))

    return place(first, second), -place(second, first)


def _spread(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Standard error of a sum of two independent averages, and Welch's degrees of freedom."""
    parts = one.var(ddof=1) / len(one), other.var(ddof=1) / len(other)
    total = parts[0] + parts[1]
    if total == 0:
        return 0.0, float(len(one) + len(other) - 2)
    freedom = total**2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    return math.sqrt(total), float(freedom)


@dataclass(frozen=True, eq=False)
class CliffDelta(_Grouped):
    """``P(first > second) - P(first < second)``: -1 where all of the first group lie below the second.

    The variance is DeLong's (1988) of the placements; the interval Cliff's (1996), which stays in
    [-1, 1], with Welch's t. At -1 or 1 the variance is 0; then the bound is ``(n - t^2) / (n + t^2)`` for the
    smaller group's n (Feng & Cliff 2004). A group of n images decides nothing below the level ``2^(1 - n)``, where
    normal theory would promise too much.
    """

    name: ClassVar[str] = "Cliff's delta"
    limits: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    values: np.ndarray
    member: np.ndarray

    @cached_property
    def _moments(self) -> tuple[float, float, float]:
        one, other = placements(self.first, self.second)
        return float(one.mean()), *_spread(one, other)

    @property
    def estimate(self) -> float:
        return self._moments[0]

    @property
    def p(self) -> float:
        delta, error, freedom = self._moments
        if error == 0 and delta == 0:
            return 1.0
        few = self.smaller_group
        least = 2.0 ** (1 - few)  # all of a group on one side of the other's median
        if error == 0:
            return max(least, float(2 * stats.t.sf(math.sqrt(few), freedom)))
        inner = 1 - delta**2
        square = (math.sqrt(inner**4 + 4 * delta**2 * inner**2) - inner**2) / 2
        return max(least, float(2 * stats.t.sf(math.sqrt(square) / error, freedom)))

    def interval(self, alpha: float) -> tuple[float, float]:
        delta, error, freedom = self._moments
        t = float(stats.t.isf(alpha / 2, freedom))
        few = self.smaller_group
        if alpha < 2.0 ** (1 - few) or (error == 0 and delta == 0):
            return -1.0, 1.0
        if error == 0:
            bound = (few - t**2) / (few + t**2)
            return (bound, 1.0) if delta > 0 else (-1.0, -bound)
        inner, reach = 1 - delta**2, t * error
        half = reach * math.sqrt(inner**2 + reach**2)
        middle, scale = delta - delta**3, inner + reach**2
        return max(-1.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def resample(self, counts: np.ndarray) -> np.ndarray:
        found = np.isfinite(self.values)
        one, other = counts[:, self.member & found], counts[:, ~self.member & found]
        signs = np.sign(self.first[:, None] - self.second[None, :])
        pairs = one.sum(axis=1) * other.sum(axis=1)
        return np.asarray(((one @ signs) * other).sum(axis=1) / np.maximum(pairs, 1))

    def classical(self) -> str:
        test = stats.mannwhitneyu(self.first, self.second, method="asymptotic")
        return f"Mann-Whitney U = {test.statistic:.6g}, p = {test.pvalue:.3g}"


@dataclass(frozen=True, eq=False)
class MeanGap(_Grouped, Student):
    """Average of the first group less that of the second; Welch's interval."""

    name: ClassVar[str] = "difference of averages"
    values: np.ndarray
    member: np.ndarray

    @property
    def estimate(self) -> float:
        return float(self.first.mean() - self.second.mean())

    @property
    def error(self) -> float:
        return _spread(self.first, self.second)[0]

    @property
    def freedom(self) -> float:
        return _spread(self.first, self.second)[1]

    def resample(self, counts: np.ndarray) -> np.ndarray:
        found = np.isfinite(self.values)
        averages = []
        for group, values in ((self.member & found, self.first), (~self.member & found, self.second)):
            averages.append((counts[:, group] @ values) / np.maximum(counts[:, group].sum(axis=1), 1))
        return np.asarray(averages[0] - averages[1])


def variance_ratio(values: np.ndarray, member: np.ndarray) -> float:
    """Variance of the first group over that of the second, without the bias of small groups.

    NaN if a group has fewer than `LEAST_IMAGES` images, or no spread without one of them.
    """
    found = np.isfinite(values)
    return math.exp(_log_variance(values[member & found]) - _log_variance(values[~member & found]))


def _log_variance(values: np.ndarray) -> float:
    """Jackknife estimate of the logarithm of the variance (Miller 1968)."""
    n = len(values)
    if n < LEAST_IMAGES:
        return math.nan
    squares = np.square(values - values.mean())
    # sums of squared deviations without each value
    without = squares.sum() - squares * n / (n - 1)
    if without.min() <= 1e-9 * values.var() * n:
        return math.nan
    return float((n * math.log(values.var(ddof=1)) - (n - 1) * np.log(without / (n - 2))).mean())


@dataclass(frozen=True, eq=False)
class DetectionGain(Student):
    """Difference of the areas under two scores' ROC curves on the same images (DeLong et al. 1988).

    Attributes:
        score, other: ``(N,)`` larger for images that look misclassified; NaN for images without one.
        member: ``(N,)`` True for misclassified images.
    """

    name: ClassVar[str] = "difference of areas under the ROC curve"
    score: np.ndarray
    other: np.ndarray
    member: np.ndarray

    @cached_property
    def _found(self) -> np.ndarray:
        return np.asarray(np.isfinite(self.score) & np.isfinite(self.other))

    @cached_property
    def _placements(self) -> tuple[np.ndarray, np.ndarray]:
        wrong, right = self.member & self._found, ~self.member & self._found
        mine, theirs = (placements(score[wrong], score[right]) for score in (self.score, self.other))
        # delta is twice the area less one
        return (mine[0] - theirs[0]) / 2, (mine[1] - theirs[1]) / 2

    @property
    def estimate(self) -> float:
        return float(self._placements[0].mean())

    @property
    def error(self) -> float:
        return _spread(*self._placements)[0]

    @property
    def freedom(self) -> float:
        return _spread(*self._placements)[1]

    @property
    def images(self) -> int:
        return int(self._found.sum())

    @property
    def left_out(self) -> int:
        return len(self.score) - self.images

    @property
    def smaller_group(self) -> int:
        return int(min((self.member & self._found).sum(), (~self.member & self._found).sum()))

    def obstacle(self) -> str:
        return few_in_a_group(self)

    def resample(self, counts: np.ndarray) -> np.ndarray:
        wrong, right = self.member & self._found, ~self.member & self._found
        kernel = np.sign(self.score[wrong][:, None] - self.score[right]) - np.sign(
            self.other[wrong][:, None] - self.other[right]
        )
        pairs = counts[:, wrong].sum(axis=1) * counts[:, right].sum(axis=1)
        return np.asarray(((counts[:, wrong] @ kernel) * counts[:, right]).sum(axis=1) / (2 * np.maximum(pairs, 1)))


def area(score: np.ndarray, member: np.ndarray) -> float:
    """Area under the ROC curve of telling members by a score; NaN where a group is empty."""
    found = np.isfinite(score)
    wrong, right = score[member & found], score[~member & found]
    return float((placements(wrong, right)[0].mean() + 1) / 2) if len(wrong) and len(right) else math.nan
