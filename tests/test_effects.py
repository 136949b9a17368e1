"""Effects against scipy, brute force and simulations with known answers; planted wrong intervals must fail."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.statistics import standard_error
from harness.statistics.composition import NewcomerGap
from harness.statistics.effects.effect import Effect, is_sound
from harness.statistics.effects.groups import CliffDelta, DetectionGain, MeanGap, area, placements, variance_ratio
from harness.statistics.effects.paired import LogMeans, MeanChange, MedianChange, Share
from harness.statistics.effects.seeds import Pooled
from tests.simulate import band, is_at_most, is_rate

NAN = math.nan
RATIO = np.array([1.0, -1.0])


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def halves(count: int, first: int) -> np.ndarray:
    return np.arange(count) < first


def lists(low: int, high: int, *, least: int = 12, most: int = 30) -> Any:
    return st.lists(st.integers(low, high), min_size=least, max_size=most).map(lambda own: np.array(own, dtype=float))


# the tolerance of all rates below


def test_the_band_of_a_rate_holds_999_of_1000_counts() -> None:
    low, high = band(0.05, 600)
    assert (low, high) == (14, 49)
    counts = generator(0).binomial(600, 0.05, size=100_000)
    assert 0.9985 < np.mean((counts >= low) & (counts <= high)) < 0.9999
    # a rate of 9% is mostly distinguished from 5%, and one of 12% always
    assert np.mean(generator(1).binomial(600, 0.12, size=10_000) > high) > 0.99


# the median of paired changes


def bootstrap_ranks(effect: MedianChange, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper medians of resampled changes."""
    changes = effect.changes[np.isfinite(effect.changes)]
    n = len(changes)
    drawn = np.sort(generator(seed).choice(changes, size=(draws, n)), axis=1)
    return drawn[:, (n - 1) // 2], drawn[:, n // 2]


@pytest.mark.parametrize("count", [25, 40, 101])
@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_of_the_median_matches_the_percentile_bootstrap(count: int, ties: bool) -> None:
    changes = np.sort(generator(count).gamma(2, size=count) - 1.5)
    changes = changes.round(1) if ties else changes
    effect = MedianChange(changes)
    below, above = bootstrap_ranks(effect, 40_000, seed=1)
    for alpha in (0.2, 0.05, 0.01):
        low, high = effect.interval(alpha)
        # four standard errors of the simulated tail
        error = 4 * math.sqrt(alpha / 2 / 40_000)
        assert np.mean(below < low) <= alpha / 2 + error
        assert np.mean(above > high) <= alpha / 2 + error
        # and at most one image wider at each end
        inner = changes[np.searchsorted(changes, low, "right")], changes[np.searchsorted(changes, high) - 1]
        assert np.mean(below <= inner[0]) >= alpha / 2 - error
        assert np.mean(above >= inner[1]) >= alpha / 2 - error


@pytest.mark.parametrize("count", [100, 101, 400, 1000])
@pytest.mark.parametrize(("alpha", "most"), [(0.05, 1.0), (0.001, 1.4), (5e-5, 1.7)])
def test_the_interval_of_the_median_has_its_stated_coverage(count: int, alpha: float, most: float) -> None:
    # for values 1 to n the interval equals its ranks, and its coverage is binomial
    low, high = MedianChange(np.arange(1.0, count + 1)).interval(alpha)
    missed = stats.binom.cdf(int(low) - 1, count, 0.5) + stats.binom.sf(int(high) - 1, count, 0.5)
    assert 0.4 < missed / alpha < most
    # control: an interval of half the ranks
    middle, reach = (low + high) / 2, (high - low) / 4
    missed = stats.binom.cdf(math.floor(middle - reach) - 1, count, 0.5)
    assert missed / alpha > most


def test_the_median_of_odd_even_and_missing_changes() -> None:
    effect = MedianChange(np.array([3.0, NAN, 1.0, 2.0, NAN]))
    assert (effect.estimate, effect.images, effect.left_out, effect.size) == (2.0, 3, 2, 5)
    assert MedianChange(np.array([1.0, 2.0, 4.0, 9.0])).estimate == 3.0
    assert MedianChange(np.zeros(20)).interval(0.001) == (0.0, 0.0)
    assert MedianChange(np.zeros(20)).p == 1.0


def test_wilcoxon_matches_scipy_and_reports_unchanged_images() -> None:
    changes = generator(3).normal(0.2, 1, size=60)
    p = stats.wilcoxon(changes, method="asymptotic").pvalue
    assert MedianChange(changes).classical() == f"Wilcoxon signed rank p = {p:.3g}"
    assert MedianChange(np.zeros(20)).classical() == "Wilcoxon signed rank: no image changed"
    one = np.zeros(12)
    one[0] = -1
    assert MedianChange(one).classical() == "Wilcoxon signed rank p = 0.317"


# averages and ratios


def test_the_standard_error_of_an_average_matches_the_paper_and_the_bootstrap() -> None:
    values = generator(4).gamma(2, size=300)
    effect = MeanChange(np.append(values, NAN))
    assert effect.estimate == pytest.approx(values.mean(), rel=1e-14)
    assert effect.error == pytest.approx(standard_error(values), rel=0.003)
    drawn = generator(5).choice(values, size=(20_000, 300)).mean(axis=1)
    assert effect.error == pytest.approx(drawn.std(), rel=0.03)
    test = stats.ttest_1samp(values - 1.9, 0)
    assert MeanChange(values - 1.9).p == pytest.approx(test.pvalue, rel=0.02)
    assert MeanChange(values).interval(0.01) == pytest.approx(
        tuple(stats.ttest_1samp(values, 0).confidence_interval(0.99)), rel=0.001
    )
    assert (effect.images, effect.left_out, effect.freedom) == (300, 1, 299)


@pytest.mark.parametrize("columns", [2, 4])
def test_the_standard_error_of_a_log_ratio_matches_the_bootstrap(columns: int) -> None:
    draw = generator(6)
    base = draw.lognormal(size=(400, 1))
    values = base * draw.lognormal(sigma=0.4, size=(400, columns)) * np.array([2.0, 1.0, 1.5, 3.0])[:columns]
    values[7, 1] = NAN
    signs = np.array([1.0, -1.0, -1.0, 1.0])[:columns]
    effect = LogMeans(values, signs)
    kept = np.delete(values, 7, axis=0)
    assert effect.estimate == pytest.approx(math.log(math.prod(kept.mean(axis=0) ** signs)), rel=1e-12)
    assert (effect.images, effect.left_out) == (399, 1)
    drawn = np.log(kept[draw.integers(399, size=(10_000, 399))].mean(axis=1)) @ signs
    assert effect.error == pytest.approx(drawn.std(), rel=0.05)
    # unpaired, the variation between images would enter
    unpaired = math.sqrt(sum(np.var(kept[:, k]) / kept[:, k].mean() ** 2 for k in range(columns)) / 399)
    assert unpaired > 1.3 * effect.error


@pytest.mark.slow
@given(hits=st.integers(0, 40), misses=st.integers(0, 40))
def test_the_interval_of_a_share_matches_clopper_pearson(hits: int, misses: int) -> None:
    assume(hits + misses > 0)
    effect = Share(np.array([1.0] * hits + [0.0] * misses + [NAN] * 5))
    test = stats.binomtest(hits, hits + misses)
    assert effect.p == pytest.approx(test.pvalue, rel=1e-9)
    assert effect.estimate == pytest.approx(hits / (hits + misses) - 0.5)
    for alpha in (0.05, 0.001):
        exact = test.proportion_ci(1 - alpha, method="exact")
        assert effect.interval(alpha) == pytest.approx((exact.low - 0.5, exact.high - 0.5), abs=1e-9)
    assert (effect.images, effect.left_out, effect.size) == (hits + misses, 0, hits + misses + 5)


# two groups


def dominance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.array([[float(a > b) - float(a < b) for b in second] for a in first])


def cliff_by_loops(first: np.ndarray, second: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """Delta and its interval by double loops."""
    table, (m, n) = dominance(first, second), (len(first), len(second))
    d = table.mean()
    one = sum((table[i].mean() - d) ** 2 for i in range(m)) / (m - 1) / m
    other = sum((table[:, j].mean() - d) ** 2 for j in range(n)) / (n - 1) / n
    variance = one + other
    freedom = variance**2 / (one**2 / (m - 1) + other**2 / (n - 1))
    t = stats.t.isf(alpha / 2, freedom)
    root = t * math.sqrt(variance) * math.sqrt((1 - d**2) ** 2 + t**2 * variance)
    scale = 1 - d**2 + t**2 * variance
    return d, (d - d**3 - root) / scale, (d - d**3 + root) / scale


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("first", "second", "shift"), [(12, 40, -0.5), (30, 25, 0.0), (11, 60, 1.2)])
def test_cliffs_delta_matches_double_loops(first: int, second: int, shift: float, ties: bool) -> None:
    draw = generator(first)
    values = draw.normal(size=first + second) + shift * halves(first + second, first)
    values = values.round(0 if ties else 9)
    effect = CliffDelta(values, halves(len(values), first))
    for alpha in (0.05, 0.001):
        d, low, high = cliff_by_loops(values[:first], values[first:], alpha)
        assert effect.estimate == pytest.approx(d, abs=1e-12)
        assert effect.interval(alpha) == pytest.approx((max(-1, low), min(1, high)), abs=1e-9)
    u = stats.mannwhitneyu(values[:first], values[first:], method="asymptotic")
    assert effect.estimate == pytest.approx(2 * u.statistic / first / second - 1, abs=1e-12)
    assert effect.classical() == f"Mann-Whitney U = {u.statistic:.6g}, p = {u.pvalue:.3g}"


def test_delta_takes_the_sign_of_the_first_group_and_leaves_images_without_distance_out() -> None:
    values = np.concatenate([np.full(10, NAN), np.arange(12.0), np.arange(100.0, 120.0)])
    effect = CliffDelta(values, halves(42, 22))
    assert (effect.estimate, effect.images, effect.left_out) == (-1.0, 32, 10)
    # Feng and Cliff's bound, n = 12
    t = stats.t.isf(0.025, 30)
    low, high = effect.interval(0.05)
    assert (low, high) == (-1.0, pytest.approx(-(12 - t**2) / (12 + t**2)))
    assert CliffDelta(-values, halves(42, 22)).interval(0.05) == pytest.approx((-high, 1.0))
    assert 0.0001 < effect.p < 0.01


def test_welch_matches_scipy() -> None:
    draw = generator(7)
    values = np.concatenate([draw.normal(1, 3, size=15), draw.normal(0, 1, size=80), [NAN, NAN]])
    effect = MeanGap(values, halves(97, 15))
    test = stats.ttest_ind(values[:15], values[15:95], equal_var=False)
    assert effect.p == pytest.approx(test.pvalue, rel=1e-9)
    for alpha in (0.05, 0.001):
        assert effect.interval(alpha) == pytest.approx(tuple(test.confidence_interval(1 - alpha)), rel=1e-9)
    assert (effect.images, effect.left_out) == (95, 2)


def test_the_ratio_of_variances_matches_the_jackknife() -> None:
    values = np.append(generator(8).gamma(3, size=70), NAN)
    logs = []
    for group in (values[:14], values[14:70]):
        n, whole = len(group), math.log(group.var(ddof=1))
        left = [math.log(np.delete(group, i).var(ddof=1)) for i in range(n)]
        logs.append(n * whole - (n - 1) * np.mean(left))
    assert variance_ratio(values, halves(71, 14)) == pytest.approx(math.exp(logs[0] - logs[1]), rel=1e-9)
    plain = values[:14].var(ddof=1) / values[14:70].var(ddof=1)
    assert variance_ratio(values, halves(71, 14)) == pytest.approx(plain, rel=0.3)


def test_small_groups_and_groups_without_spread_have_no_ratio_of_variances() -> None:
    values = np.arange(40.0)
    assert math.isnan(variance_ratio(values, halves(40, 9)))
    assert math.isnan(variance_ratio(values, halves(40, 31)))
    assert variance_ratio(values, halves(40, 10)) < 0.2
    assert math.isnan(variance_ratio(np.where(halves(40, 15), 1.0, values), halves(40, 15)))
    # without the largest value the others hardly vary, and a difference of sums of squares is lost to rounding
    draw = generator(43)
    for _ in range(20):
        values = np.concatenate([0.1 + 1e-9 * draw.random(11), [1.0], draw.random(100)])
        assert math.isnan(variance_ratio(values, halves(112, 12)))


def test_delongs_difference_matches_double_loops() -> None:
    draw = generator(9)
    member = halves(90, 20)
    base = draw.normal(size=90) + member
    score, other = base + draw.normal(size=90), (base + 0.5 * draw.normal(size=90)).round(1)
    score[3] = other[40] = NAN
    effect = DetectionGain(score, other, member)
    kept = np.isfinite(score) & np.isfinite(other)
    ten, one, areas = [], [], []
    for own in (score, other):
        wins = (dominance(own[member & kept], own[~member & kept]) + 1) / 2
        ten.append(wins.mean(axis=1))
        one.append(wins.mean(axis=0))
        areas.append(wins.mean())
    contrast = np.array([1.0, -1.0])
    covariance = np.cov(ten) / len(ten[0]) + np.cov(one) / len(one[0])
    assert effect.estimate == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert effect.error == pytest.approx(math.sqrt(contrast @ covariance @ contrast), rel=1e-9)
    assert (effect.images, effect.left_out) == (88, 2)
    assert area(score, member) == pytest.approx((dominance(score[:20][kept[:20]], score[20:]).mean() + 1) / 2, abs=0.02)
    found = np.isfinite(score)
    assert area(score, member) == pytest.approx(
        stats.mannwhitneyu(score[member & found], score[~member & found]).statistic / (19 * 70)
    )
    assert math.isnan(area(score, np.zeros(90, dtype=bool)))


@given(first=lists(0, 5, least=1, most=12), second=lists(0, 5, least=1, most=12))
def test_placements_are_the_averages_of_the_dominance_table(first: np.ndarray, second: np.ndarray) -> None:
    one, other = placements(first, second)
    table = dominance(first, second)
    np.testing.assert_allclose(one, table.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(other, table.mean(axis=0), atol=1e-12)


# newcomers


def newcomers(draw: np.random.Generator, count: int = 120, epochs: int = 6, gap: float = 0.0) -> NewcomerGap:
    """Images of different difficulty; each is a newcomer at some epochs and a stayer at others."""
    level = draw.normal(5, 1, size=(count, 1))
    state = draw.random((count, epochs))
    new, stayed = state < 0.15, state > 0.4
    values = level + draw.normal(size=(count, epochs)) + gap * new
    values[draw.random((count, epochs)) < 0.02] = NAN
    return NewcomerGap(values, new, stayed)


def gap_by_loops(values: np.ndarray, new: np.ndarray, stayed: np.ndarray) -> float:
    total, count = 0.0, 0
    for t in range(values.shape[1]):
        own = values[:, t]
        entrants, stayers = own[new[:, t] & np.isfinite(own)], own[stayed[:, t] & np.isfinite(own)]
        if len(entrants) and len(stayers):
            total += (entrants - stayers.mean()).sum()
            count += len(entrants)
    return total / count


def test_the_newcomers_gap_and_its_bootstrap_over_images() -> None:
    draw = generator(10)
    effect = newcomers(draw, gap=-0.7)
    whole = effect.values, effect.new, effect.stayed
    assert effect.estimate == pytest.approx(gap_by_loops(*whole), rel=1e-12)
    drawn = [gap_by_loops(*(own[places] for own in whole)) for places in draw.integers(120, size=(1500, 120))]
    assert effect.error == pytest.approx(np.std(drawn), rel=0.09)
    # rows taken as independent images would give too narrow an interval: each image is a newcomer four times
    level = np.repeat(draw.normal(size=(60, 1)), 4, axis=1)
    new, stayed = np.zeros((60, 4), dtype=bool), np.zeros((60, 4), dtype=bool)
    new[:20], stayed[20:] = True, True
    clustered = NewcomerGap(level, new, stayed)
    by_rows = math.sqrt(level[:20].var() / 80 + level[20:].var() / 160)
    by_images = math.sqrt(level[:20, 0].var() / 20 + level[20:, 0].var() / 40)
    assert clustered.error == pytest.approx(by_images, rel=0.04)
    assert by_rows == pytest.approx(by_images / 2, rel=1e-9)


def test_newcomers_need_stayers_and_enough_images() -> None:
    values = np.ones((30, 2))
    new, stayed = np.zeros((30, 2), dtype=bool), np.zeros((30, 2), dtype=bool)
    new[:12, 0], new[:5, 1], stayed[12:, 1] = True, True, True
    effect = NewcomerGap(values, new, stayed)
    assert effect.freedom == 5 - 1  # the first epoch has no stayers to compare with
    assert effect.images == 30
    assert effect.obstacle() == "fewer than 10 images became correct"
    assert NewcomerGap(values, stayed, new).obstacle() == ""


# weighting an image by a count is repeating it


def effects(draw: np.random.Generator, count: int = 61) -> Iterator[tuple[Effect, Callable[[np.ndarray], float]]]:
    """Each effect with the plain statistic of chosen images."""
    values, other = draw.normal(3, 1, size=count), draw.normal(3, 1, size=count)
    values[5] = NAN
    member = halves(count, 20)

    def found(places: np.ndarray) -> np.ndarray:
        return np.asarray(places[np.isfinite(values[places])])

    def groups(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = found(places)
        return values[own[member[own]]], values[own[~member[own]]]

    yield MedianChange(values), lambda k: float(np.quantile(values[found(k)], 0.5, method="inverted_cdf"))
    yield MeanChange(values), lambda k: float(values[found(k)].mean())
    pairs = np.stack([values, other], axis=1)
    yield LogMeans(pairs, RATIO), lambda k: math.log(values[found(k)].mean() / other[found(k)].mean())
    hits = np.where(np.isfinite(values), values > 3, NAN)
    yield Share(hits), lambda k: float(hits[found(k)].mean() - 0.5)
    yield CliffDelta(values, member), lambda k: float(dominance(*groups(k)).mean())
    yield MeanGap(values, member), lambda k: float(groups(k)[0].mean() - groups(k)[1].mean())
    yield (
        DetectionGain(values, other, member),
        lambda k: area(values[found(k)], member[found(k)]) - area(other[found(k)], member[found(k)]),
    )
    gap = newcomers(draw, count)
    yield gap, lambda k: gap_by_loops(gap.values[k], gap.new[k], gap.stayed[k])


def test_resampling_equals_repeating_images() -> None:
    draw = generator(11)
    for effect, statistic in effects(draw):
        counts = draw.multinomial(effect.size, np.full(effect.size, 1 / effect.size), size=6).astype(float)
        expected = [statistic(np.repeat(np.arange(effect.size), own.astype(int))) for own in counts]
        np.testing.assert_allclose(effect.resample(counts), expected, rtol=1e-9, atol=1e-12, err_msg=effect.name)


def test_counting_every_image_once_is_the_estimate() -> None:
    for effect, _ in effects(generator(12)):
        once = effect.resample(np.ones((1, effect.size)))[0]
        # the lower of two middle values is a median too
        loose = isinstance(effect, MedianChange)
        assert once == pytest.approx(effect.estimate, abs=0.1 if loose else 1e-12), effect.name


# p-values agree with intervals


def agrees(effect: Effect, alpha: float) -> bool:
    """Whether p is below alpha exactly if the interval excludes 0; at alpha itself both are allowed."""
    low, high = effect.interval(alpha)
    return abs(effect.p - alpha) <= 1e-9 * alpha or (effect.p < alpha) == (low > 0 or high < 0)


LEVELS = (0.3, 0.05, 0.01, 1e-3, 1e-4, 1e-6)


@settings(max_examples=60, deadline=None)
@given(changes=lists(-6, 4))
@example(changes=np.array([-1.0] * 6 + [0.0] * 6))
@example(changes=np.array([-1.0] * 12 + [0.0]))
@example(changes=np.array([-2.0, -1.0] * 6 + [1.0] * 6))
def test_the_p_value_of_the_median_agrees_with_its_interval(changes: np.ndarray) -> None:
    for alpha in LEVELS:
        assert agrees(MedianChange(changes), alpha)
        assert agrees(MedianChange(-changes), alpha)


@settings(max_examples=60, deadline=None)
@given(values=lists(0, 6, least=24), first=st.integers(10, 14), shift=st.integers(-6, 6))
@example(values=np.arange(24.0), first=12, shift=-100)
def test_the_p_value_of_two_groups_agrees_with_the_interval(values: np.ndarray, first: int, shift: int) -> None:
    assume(len(np.unique(values[:first])) > 2)
    assume(len(np.unique(values[first:])) > 2)
    member = halves(len(values), first)
    moved = values + shift * member
    for effect in (
        CliffDelta(moved, member),
        MeanGap(moved, member),
        DetectionGain(moved, values, member),
    ):
        for alpha in LEVELS:
            assert agrees(effect, alpha), effect.name


@settings(max_examples=60, deadline=None)
@given(values=lists(1, 9), other=lists(1, 9), level=st.sampled_from(LEVELS))
def test_p_values_of_averages_and_shares_agree_with_the_interval(
    values: np.ndarray, other: np.ndarray, level: float
) -> None:
    size = min(len(values), len(other))
    pairs = np.stack([values[:size], other[:size]], axis=1)
    assert agrees(MeanChange(pairs[:, 0] - pairs[:, 1]), level)
    assert agrees(LogMeans(pairs, RATIO), level)
    assert agrees(Share((pairs[:, 0] > pairs[:, 1]).astype(float)), level)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), gap=st.floats(-2, 2), level=st.sampled_from(LEVELS))
def test_p_values_of_newcomers_and_pooled_seeds_agree_with_the_interval(seed: int, gap: float, level: float) -> None:
    draw = generator(seed)
    assert agrees(newcomers(draw, 60, gap=gap), level)
    assert agrees(Pooled(tuple(MeanChange(gap + draw.normal(size=20)) for _ in range(5))), level)


# coverage and rejections


@dataclass(frozen=True)
class Narrow:
    """The control: another effect's interval, shrunk by a factor."""

    effect: Effect
    factor: float = 0.6

    def interval(self, alpha: float) -> tuple[float, float]:
        low, high = self.effect.interval(alpha)
        middle = self.effect.estimate
        return middle + self.factor * (low - middle), middle + self.factor * (high - middle)


def misses(intervals: list[tuple[float, float]], truth: float) -> int:
    return sum(not low <= truth <= high for low, high in intervals)


REPEATS = 600
Maker = Callable[[np.random.Generator], tuple[Effect, float]]


def make_median(draw: np.random.Generator) -> tuple[Effect, float]:
    # skewed, with median -0.2
    return MedianChange(draw.exponential(size=151) - math.log(2) - 0.2), -0.2


def make_mean(draw: np.random.Generator) -> tuple[Effect, float]:
    return MeanChange(draw.gamma(9, size=200) - 7), 2.0


def make_log_means(draw: np.random.Generator) -> tuple[Effect, float]:
    values = draw.lognormal(size=(250, 1), sigma=0.7) * draw.lognormal(sigma=0.3, size=(250, 2)) * np.array([1.9, 1.0])
    return LogMeans(values, RATIO), math.log(1.9)


def make_cliff(draw: np.random.Generator) -> tuple[Effect, float]:
    # P(X < Y) of normal values whose means differ by one standard deviation
    member = halves(250, 50)
    truth = 1 - 2 * stats.norm.cdf(1 / math.sqrt(2))
    return CliffDelta(draw.normal(size=250) - member, member), truth


def make_small_cliff(draw: np.random.Generator) -> tuple[Effect, float]:
    member = halves(312, 12)
    return CliffDelta(draw.normal(size=312) * np.where(member, 0.5, 1), member), 0.0


def make_gap(draw: np.random.Generator) -> tuple[Effect, float]:
    member = halves(200, 30)
    return MeanGap(draw.normal(size=200) * np.where(member, 3, 1) + 0.5 * member, member), 0.5


def make_gain(draw: np.random.Generator) -> tuple[Effect, float]:
    # two equally good scores that share half of their noise
    member = halves(240, 40)
    common = draw.normal(size=240) + 1.5 * member
    return DetectionGain(common + draw.normal(size=240), common + draw.normal(size=240), member), 0.0


def make_newcomers(draw: np.random.Generator) -> tuple[Effect, float]:
    return newcomers(draw, 200, gap=-0.5), -0.5


EXACT_AT_95: dict[str, Maker] = {
    "mean": make_mean,
    "log means": make_log_means,
    "Cliff's delta": make_cliff,
    "difference of averages": make_gap,
    "newcomers": make_newcomers,
}
BELOW: dict[str, Maker] = {"median": make_median, "Cliff's delta of 12 images": make_small_cliff, "areas": make_gain}


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "log means" else pytest.param(kind, marks=pytest.mark.slow) for kind in [*EXACT_AT_95, *BELOW]],
)
def test_intervals_have_their_stated_coverage_and_narrower_ones_do_not(kind: str) -> None:
    draw = generator(20)
    made = [(EXACT_AT_95 | BELOW)[kind](draw) for _ in range(REPEATS)]
    truth = made[0][1]
    for alpha in (0.05, 0.001):
        missed = misses([effect.interval(alpha) for effect, _ in made], truth)
        assert is_at_most(missed, alpha, REPEATS)
        narrow = misses([Narrow(effect).interval(alpha) for effect, _ in made], truth)
        assert not is_at_most(narrow, alpha, REPEATS)
    if kind in EXACT_AT_95:
        assert is_rate(misses([effect.interval(0.05) for effect, _ in made], truth), 0.05, REPEATS)
        # a too wide interval is detected too
        wide = misses([Narrow(effect, 1.6).interval(0.05) for effect, _ in made], truth)
        assert not is_rate(wide, 0.05, REPEATS)


def test_existing_effects_are_found() -> None:
    draw = generator(21)
    found = {
        "median": [MedianChange(draw.normal(-0.6, 1, size=150)).p for _ in range(200)],
        "delta": [CliffDelta(draw.normal(size=200) - halves(200, 40), halves(200, 40)).p for _ in range(200)],
        "newcomers": [newcomers(draw, gap=-1.0).p for _ in range(200)],
    }
    for name, p_values in found.items():
        assert np.mean(np.array(p_values) < 0.001) > 0.85, name


def test_changes_of_the_same_images_are_paired() -> None:
    # margins differ between images much more than they change, so an unpaired interval would miss the change
    draw = generator(22)
    paired, unpaired = 0, 0
    for _ in range(REPEATS):
        before = draw.gamma(2, size=150)
        after = before + 0.2 * draw.normal(size=150)
        paired += MeanChange(after - before).p < 0.05
        unpaired += MeanGap(np.concatenate([after, before]), halves(300, 150)).p < 0.05
    assert is_rate(paired, 0.05, REPEATS)
    assert unpaired == 0
    assert not is_rate(unpaired, 0.05, REPEATS)


# several seeds


def two_ways(
    draw: np.random.Generator, count: int, images: int, *, seed: float, image: float, noise: float
) -> np.ndarray:
    """``(S, N)`` values with components of variance of the seeds, the images and both together."""
    return (
        seed * draw.normal(size=(count, 1))
        + image * draw.normal(size=(1, images))
        + noise * draw.normal(size=(count, images))
    )


def pigeonhole(values: np.ndarray) -> float:
    """Exact variance of the average when seeds and images are resampled independently."""
    count, images = values.shape
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    rest = values - rows - columns + values.mean()
    drawn = rows.var() / count + columns.var() / images + np.square(rest).mean() / (count * images)
    return float(drawn)


@pytest.mark.parametrize(("seed", "image"), [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_the_pooled_error_matches_the_pigeonhole_bootstrap(seed: float, image: float) -> None:
    values = two_ways(generator(30), 5, 60, seed=seed, image=image, noise=1.0)
    pooled = Pooled(tuple(MeanChange(own) for own in values))
    assert pooled.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert pooled.error == pytest.approx(math.sqrt(pigeonhole(values) * 5 / 4), rel=0.07)
    assert (pooled.freedom, pooled.images, pooled.left_out, pooled.size) == (4, 60, 0, 60)
    assert pooled.name == "average difference, average of 5 seeds"


@pytest.mark.parametrize(
    ("count", "seed", "image", "noise"), [(5, 1.0, 0.5, 0.5), (5, 0.2, 1.0, 1.0), (8, 0.5, 0.5, 2.0)]
)
def test_the_pooled_error_matches_the_variance_components(count: int, seed: float, image: float, noise: float) -> None:
    draw = generator(31)
    squares = []
    for _ in range(250):
        values = two_ways(draw, count, 30, seed=seed, image=image, noise=noise)
        squares.append(Pooled(tuple(MeanChange(own) for own in values)).error ** 2)
    truth = seed**2 / count + image**2 / 30 + noise**2 / (count * 30)
    # never too small: the image part is widened with the seeds, and the residual is counted three times
    assert 0.9 * truth < np.mean(squares) < count / (count - 1) * truth + 3 * noise**2 / (count * 30)


def test_five_seeds_cover_the_truth_and_one_does_not() -> None:
    draw = generator(32)
    pooled, images_only, single = 0, 0, 0
    strict = 0
    for _ in range(REPEATS):
        values = two_ways(draw, 5, 40, seed=1.0, image=0.5, noise=0.5)
        each = tuple(MeanChange(own) for own in values)
        together = Pooled(each)
        pooled += together.p < 0.05
        strict += together.p < 0.001
        images_only += MeanChange(values.mean(axis=0)).p < 0.05
        single += each[0].p < 0.05
    assert is_at_most(pooled, 0.05, REPEATS)
    assert pooled > 5
    assert is_at_most(strict, 0.001, REPEATS)
    # controls: seeds treated as fixed, and one network treated as representative
    for wrong in (images_only, single):
        assert not is_at_most(wrong, 0.05, REPEATS)
    assert single > 0.6 * REPEATS


@pytest.mark.slow
def test_a_random_walk_of_each_seed_is_no_decline() -> None:
    draw = generator(33)
    pooled, single = 0, 0
    for _ in range(REPEATS):
        # all images of a seed share the same twenty steps and have individual ones
        walks = draw.normal(size=(5, 1, 20)).sum(axis=2) + draw.normal(size=(5, 40))
        each = tuple(MedianChange(own) for own in walks)
        pooled += Pooled(each).p < 0.05
        single += each[0].p < 0.05
    assert is_rate(pooled, 0.05, REPEATS)
    # control: a single run nearly always detects the random walk of its own network
    assert single > 0.7 * REPEATS


# whether a test is possible


def test_few_images_and_small_groups_are_obstacles() -> None:
    few, few_in_a_group = "fewer than 10 images", "fewer than 10 images in a group"
    assert MedianChange(np.ones(9)).obstacle() == few
    assert MedianChange(np.ones(10)).obstacle() == ""
    assert Share(np.array([1.0] * 9 + [NAN] * 50)).obstacle() == few
    values = np.arange(40.0)
    for kind in (CliffDelta, MeanGap):
        assert kind(values, halves(40, 9)).obstacle() == few_in_a_group
        assert kind(values, halves(40, 31)).obstacle() == few_in_a_group
        assert kind(values, halves(40, 10)).obstacle() == ""
    assert DetectionGain(values, values, halves(40, 9)).obstacle() == few_in_a_group
    nothing = np.full(20, NAN)
    assert MedianChange(nothing).obstacle() == few
    assert CliffDelta(nothing, halves(20, 10)).obstacle() == few_in_a_group
    assert Pooled((MeanChange(np.ones(20)), MeanChange(np.ones(9)))).obstacle() == few


def test_soundness_is_a_finite_interval() -> None:
    assert is_sound(MeanChange(generator(0).normal(size=30)))

    class Unbounded(MeanChange):
        def interval(self, alpha: float) -> tuple[float, float]:
            return -math.inf, 1.0

    assert not is_sound(Unbounded(np.arange(20.0)))


# small or degenerate samples, including defects found in review


@pytest.mark.parametrize("count", [10, 12, 20])
def test_the_sign_of_few_changes_is_no_surer_than_coin_flips(count: int) -> None:
    # if the median is 0, all n changes have the same sign with probability 2^(1 - n)
    effect = MedianChange(-np.arange(1.0, count + 1))
    assert effect.p >= 2.0 ** (1 - count) * (1 - 1e-9)
    assert agrees(effect, 2.0 ** (-count))


def test_ten_nearly_separated_images_are_no_surer_than_ten_separated_ones() -> None:
    values = np.concatenate([np.arange(10.0), np.arange(100.0, 500.0)])
    apart = CliffDelta(values, halves(410, 10))
    values[9] = 100.5  # larger than one of the 400
    almost = CliffDelta(values, halves(410, 10))
    assert -1 < almost.estimate < -0.999
    assert almost.p >= 2.0**-9
    assert almost.p >= 0.9 * apart.p


def test_images_that_all_have_one_distance_do_not_differ() -> None:
    effect = CliffDelta(np.full(2000, 0.3), halves(2000, 1000))
    assert (effect.estimate, effect.p) == (0.0, 1.0)
    low, high = effect.interval(0.05)
    assert low <= 0 <= high


def test_an_average_of_ten_images_has_students_interval() -> None:
    values = generator(40).normal(0.7, 1, size=10)
    assert MeanChange(values).p >= stats.ttest_1samp(values, 0).pvalue * (1 - 1e-9)


def test_a_resample_without_a_required_image_is_no_error() -> None:
    none_asked = (~halves(40, 10)).astype(float)[None]
    assert np.isfinite(Share(np.where(halves(40, 10), 1.0, NAN)).resample(none_asked)).all()


def test_stayers_without_a_distance_are_left_out_too() -> None:
    draw = generator(44)
    values, new, stayed = draw.random((60, 3)), np.zeros((60, 3), dtype=bool), np.zeros((60, 3), dtype=bool)
    new[:15, 0], stayed[20:] = True, True
    values[40:] = NAN
    effect = NewcomerGap(values, new, stayed)
    assert effect.left_out >= 15
