"""Holm's procedure and the verdicts, against hand calculation and simulated error rates of families."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.statistics.effects.effect import Student
from harness.statistics.effects.groups import CliffDelta, DetectionGain, MeanGap
from harness.statistics.effects.paired import LogMeans, MeanChange, MedianChange, Share
from harness.statistics.effects.seeds import Pooled
from harness.statistics.observations.verdicts import (
    ALPHA,
    FINDING_COLUMNS,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Trial,
    holm,
    judge,
)
from tests.simulate import is_at_most, is_rate

NAN = math.nan


class Known(Student):
    """An effect of a known estimate and a standard error of one, nearly normal."""

    name = "known"
    estimate = 0.0  # type: ignore[assignment]
    error, freedom, images, left_out = 1.0, 1e9, 1000, 0  # type: ignore[assignment]

    def __init__(self, estimate: float) -> None:
        self.estimate = float(estimate)  # type: ignore[misc]

    def resample(self, counts: np.ndarray) -> np.ndarray:
        return np.full(len(counts), self.estimate)


def trial(effect: Student | None = None, side: int = -1, bound: float = NAN, **given: object) -> Trial:
    made = Trial(1, "decline", "run", "deepfool", "l2", "test", "distance", "1 → 20", side, effect, bound)
    return replace(made, **given)  # type: ignore[arg-type]


def verdict(effect: Student, side: int = -1, bound: float = NAN) -> pd.Series:
    return judge([trial(effect, side, bound)]).iloc[0]


# Holm


def test_holm_matches_hand_calculation() -> None:
    # 0.005 <= 0.05 / 4 and 0.01 <= 0.05 / 3, but 0.03 > 0.05 / 2, so that 0.04 is not tested
    adjusted, levels = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert levels == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])


def test_holm_of_one_no_and_equal_p_values() -> None:
    adjusted, levels = holm([0.04])
    assert (adjusted.tolist(), levels.tolist()) == ([0.04], [0.05])
    assert [len(part) for part in holm([])] == [0, 0]
    adjusted, levels = holm([0.02, 0.02, 0.02])
    assert adjusted == pytest.approx([0.06] * 3)
    assert levels == pytest.approx([0.05 / 3] * 3)
    assert holm([0.9, 1.0])[0].tolist() == [1.0, 1.0]


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=12))
def test_holms_levels_and_adjusted_p_values_reject_the_same_hypotheses(p_values: list[float]) -> None:
    adjusted, levels = holm(p_values)
    ordered = sorted(p_values)
    count = len(ordered)
    running = [max(min(1, p * (count - i)) for i, p in enumerate(ordered[: rank + 1])) for rank in range(count)]
    np.testing.assert_allclose(np.sort(adjusted), running)
    clear = np.abs(adjusted - ALPHA) > 1e-9
    np.testing.assert_array_equal((np.array(p_values) <= levels)[clear], (adjusted <= ALPHA)[clear])
    assert np.all(levels <= ALPHA)
    assert np.all(levels >= ALPHA / count)


def test_holm_rejects_a_true_null_in_one_family_of_twenty() -> None:
    draw = np.random.default_rng(0)
    families = 2000
    any_wrong, uncorrected, found = 0, 0, 0
    for _ in range(families):
        # thirty true nulls and ten real effects
        z = draw.normal(size=40) + np.where(np.arange(40) < 30, 0, 5.0)
        p_values = 2 * stats.norm.sf(np.abs(z))
        adjusted, levels = holm(p_values.tolist())
        assert np.array_equal(adjusted <= ALPHA, p_values <= levels)
        any_wrong += bool((adjusted[:30] <= ALPHA).any())
        uncorrected += bool((p_values[:30] <= ALPHA).any())
        found += int((adjusted[30:] <= ALPHA).sum())
    assert is_at_most(any_wrong, ALPHA, families)
    assert found > 0.9 * 10 * families
    # control
    assert not is_at_most(uncorrected, ALPHA, families)
    # with nulls only, the rate is reached
    alone = sum(
        bool((holm((2 * stats.norm.sf(np.abs(draw.normal(size=10)))).tolist())[0] <= ALPHA).any())
        for _ in range(families)
    )
    assert is_rate(alone, 1 - 0.995**10, families)


# verdicts


@pytest.mark.parametrize(
    ("estimate", "side", "bound", "expected"),
    [
        (-3.0, -1, NAN, SUPPORTED),
        (3.0, -1, NAN, NOT_SUPPORTED),
        (3.0, 1, NAN, SUPPORTED),
        (-3.0, 1, NAN, NOT_SUPPORTED),
        (-1.0, -1, NAN, UNDECIDED),
        (1.0, 1, NAN, UNDECIDED),
        # an interval of 1.96 around it
        (-3.0, -1, 5.0, NOT_SUPPORTED),
        (-3.0, -1, 4.9, SUPPORTED),
        (0.0, -1, 2.0, NOT_SUPPORTED),
        (0.0, -1, 1.9, UNDECIDED),
        (-3.0, 0, 5.0, SUPPORTED),
        (0.0, 0, 2.0, SUPPORTED),
        (0.0, 0, 1.9, UNDECIDED),
        (-3.0, 0, 4.9, UNDECIDED),
        (-3.0, 0, 1.0, NOT_SUPPORTED),
        (3.0, 0, 1.0, NOT_SUPPORTED),
        (2.9, 0, 1.0, UNDECIDED),
    ],
)
def test_one_effect_is_judged_by_its_interval(estimate: float, side: int, bound: float, expected: str) -> None:
    row = verdict(Known(estimate), side, bound)
    assert row["verdict"] == expected
    assert (row["reason"] == "") == (expected == SUPPORTED)
    reach = stats.norm.isf(0.025)
    assert (row["low"], row["high"]) == (pytest.approx(estimate - reach), pytest.approx(estimate + reach))
    assert row["level"] == pytest.approx(0.95)
    assert row["p"] == pytest.approx(2 * stats.norm.sf(abs(estimate)))
    assert row["p_holm"] == row["p"]
    assert row["value"] == estimate


def test_a_family_has_one_ordered_row_per_trial_with_its_own_level() -> None:
    table = judge(
        [
            trial(Known(-1.0), claim="a"),
            trial(claim="b", obstacle="epoch 1 was not measured"),
            trial(Known(-5.0), claim="c"),
            trial(Known(-2.3), claim="d"),
        ]
    )
    assert list(table.columns) == list(FINDING_COLUMNS)
    assert table["claim"].tolist() == ["a", "b", "c", "d"]
    assert table["verdict"].tolist() == [UNDECIDED, UNDECIDED, SUPPORTED, SUPPORTED]
    # three were tested: at 0.05 / 3, then 0.05 / 2, then 0.05
    assert table["level"].tolist() == pytest.approx([0.95, NAN, 1 - 0.05 / 3, 0.975], nan_ok=True)
    p = 2 * stats.norm.sf(np.array([1.0, 5.0, 2.3]))
    assert table["p_holm"].tolist() == pytest.approx([p[0], NAN, 3 * p[1], 2 * p[2]], nan_ok=True)
    assert table.loc[1, "reason"] == "epoch 1 was not measured"
    assert math.isnan(table.loc[1, "value"])
    assert len(judge([])) == 0
    assert list(judge([]).columns) == list(FINDING_COLUMNS)


def test_equivalence_is_tested_at_the_strictest_level() -> None:
    # 2.2 exceeds a half-width of 1.96, but not one of 2.39, which a family of three requires
    alone = judge([trial(Known(0.0), bound=2.2)])
    family = judge([trial(Known(0.0), bound=2.2), trial(Known(-9.0)), trial(Known(-9.0))])
    assert alone["verdict"].tolist() == [NOT_SUPPORTED]
    assert family["verdict"].tolist() == [UNDECIDED, SUPPORTED, SUPPORTED]
    wide = judge([trial(Known(0.0), bound=2.4), trial(Known(-9.0)), trial(Known(-9.0))])
    assert wide["verdict"].tolist() == [NOT_SUPPORTED, SUPPORTED, SUPPORTED]
    assert wide.loc[0, ["low", "high", "level"]].tolist() == pytest.approx([-2.394, 2.394, 1 - 0.05 / 3], abs=1e-3)


@pytest.mark.slow
@given(estimates=st.lists(st.floats(-6, 6), min_size=1, max_size=8))
def test_a_directional_verdict_is_a_rejection_by_holm(estimates: list[float]) -> None:
    table = judge([trial(Known(estimate)) for estimate in estimates])
    clear = (table["p_holm"] - ALPHA).abs() > 1e-9
    rejected = table["p_holm"] <= ALPHA
    decided = table["verdict"] != UNDECIDED
    outside = (table["low"] > 0) | (table["high"] < 0)
    assert (rejected == decided)[clear].all()
    assert (rejected == outside)[clear].all()


def test_logarithms_are_shown_as_factors() -> None:
    values = np.random.default_rng(1).lognormal(sigma=0.1, size=(100, 1)) * np.array([2.0, 1.0])
    values[:, 0] *= np.random.default_rng(2).lognormal(sigma=0.01, size=100)
    row = verdict(LogMeans(values, np.array([1.0, -1.0])), side=1, bound=math.log1p(0.02))
    assert row["value"] == pytest.approx(2, rel=0.01)
    assert 1.98 < row["low"] < row["value"] < row["high"] < 2.02
    assert row["bound"] == pytest.approx(1.02)
    assert (row["verdict"], row["effect"]) == (SUPPORTED, "ratio of averages")


def test_a_negligible_effect_is_reported_as_no_effect() -> None:
    # a decline of 0.5% with a bound of 2%: significant, but negligible
    changes = np.random.default_rng(3).normal(-0.005, 0.02, size=1000)
    row = verdict(MedianChange(changes), bound=0.02)
    assert row["p"] < 1e-6
    assert row["high"] < 0
    assert (row["verdict"], row["reason"]) == (NOT_SUPPORTED, "inside the equivalence bound: as good as none")
    # without a bound it would be a decline
    assert verdict(MedianChange(changes))["verdict"] == SUPPORTED
    assert row["detail"].startswith("Wilcoxon signed rank p = ")


def test_splits_that_differ_by_less_than_the_bound_agree() -> None:
    draw = np.random.default_rng(4)
    member = np.arange(2000) < 1000
    same = MeanGap(draw.normal(1, 0.1, size=2000), member)
    assert verdict(same, side=0, bound=0.02)["verdict"] == SUPPORTED
    assert verdict(same, side=0, bound=0.002)["verdict"] == UNDECIDED
    # too few images: neither significant nor equivalent
    few = np.concatenate([np.arange(20), np.arange(1000, 1020)])
    unsure = verdict(MeanGap(same.values[few], member[few]), side=0, bound=0.02)
    assert unsure["p"] > 0.05
    assert (unsure["verdict"], unsure["reason"]) == (UNDECIDED, "the interval crosses the equivalence bound")
    apart = MeanGap(same.values + 0.1 * member, member)
    row = verdict(apart, side=0, bound=0.02)
    assert (row["verdict"], row["reason"]) == (NOT_SUPPORTED, "the interval lies beyond the equivalence bound")


def test_few_images_and_many_left_out_are_undecided() -> None:
    nine = verdict(MedianChange(np.concatenate([-np.ones(9), np.full(0, NAN)])))
    assert (nine["verdict"], nine["reason"]) == (UNDECIDED, "fewer than 10 images")
    changes = -np.arange(1.0, 101)
    for missing, expected in ((5, SUPPORTED), (6, UNDECIDED)):
        gone = changes.copy()
        gone[:missing] = NAN
        row = verdict(MedianChange(gone))
        assert row["verdict"] == expected
        assert (row["images"], row["left_out"]) == (100 - missing, missing)
    assert row["reason"] == "more than 5% of the images have no distance"
    assert math.isnan(row["p"])
    nine_wrong = CliffDelta(changes, np.arange(100) < 9)
    assert verdict(nine_wrong)["reason"] == "fewer than 10 images in a group"
    infinite = changes.copy()
    infinite[:3] = -math.inf
    assert verdict(MedianChange(infinite))["left_out"] == 3
    nothing = verdict(MedianChange(np.full(50, NAN)))
    assert (nothing["verdict"], nothing["images"], nothing["left_out"]) == (UNDECIDED, 0, 50)


def test_an_untestable_trial_is_not_in_the_family() -> None:
    blocked = [trial(MedianChange(-np.ones(5))) for _ in range(9)]
    table = judge([trial(Known(-2.0)), *blocked])
    assert table["verdict"].tolist() == [SUPPORTED] + [UNDECIDED] * 9
    assert table.loc[0, "level"] == pytest.approx(0.95)


# rates of wrong verdicts in whole families

FAMILIES = 400


def rate(estimates: np.ndarray, side: int, bound: float, wrong: set[str]) -> int:
    """The number of families (rows) with a wrong verdict."""
    found = 0
    for own in estimates:
        table = judge([trial(Known(value), side=side, bound=bound) for value in own])
        found += bool(table["verdict"].isin(wrong).any())
    return found


@pytest.mark.slow
def test_noise_gets_no_verdict() -> None:
    noise = np.random.default_rng(5).normal(size=(FAMILIES, 6))
    decided = rate(noise, -1, NAN, {SUPPORTED, NOT_SUPPORTED})
    assert is_rate(decided, 1 - (1 - ALPHA / 6) ** 6, FAMILIES)
    # control: standard errors that are too small by a third
    assert not is_at_most(rate(1.5 * noise, -1, NAN, {SUPPORTED, NOT_SUPPORTED}), ALPHA, FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("side", [-1, 0])
def test_effects_of_the_size_of_the_bound_are_seldom_called_negligible(side: int) -> None:
    inside, uncorrected = 0, 0
    for own in np.random.default_rng(6).normal(-4, 1, size=(FAMILIES, 6)):
        table = judge([trial(Known(value), side=side, bound=4.0) for value in own])
        called = table["verdict"] == SUPPORTED if side == 0 else table["reason"].str.startswith("inside")
        inside += bool(called.any())
        uncorrected += bool((np.abs(own) < 4 - stats.norm.isf(0.05)).any())
    # one end of the interval can be wrong, so half the level is used
    assert is_rate(inside, 1 - (1 - ALPHA / 12) ** 6, FAMILIES)
    # control: two one-sided tests at 5% each, over six effects
    assert not is_at_most(uncorrected, ALPHA, FAMILIES)


def test_a_large_family_of_real_declines_is_found() -> None:
    draw = np.random.default_rng(7)
    table = judge([trial(MedianChange(draw.normal(-0.5, 1, size=1000)), bound=0.02) for _ in range(60)])
    assert (table["verdict"] == SUPPORTED).all()
    assert (table["level"].min(), table["level"].max()) == (pytest.approx(0.95), pytest.approx(1 - 0.05 / 60))


# no verdict without variance


@pytest.mark.parametrize(
    "effect",
    [
        # two scores that both separate ten images perfectly
        DetectionGain(
            2 * (np.arange(300) < 10) + np.linspace(0, 1, 300),
            3 * (np.arange(300) < 10) + np.linspace(1, 0, 300) ** 2,
            np.arange(300) < 10,
        ),
        MeanChange(np.full(10, 0.5)),
        Pooled((Share(np.where(np.arange(1000) < 10, 1.0, NAN)),) * 5),
        CliffDelta(np.full(2000, 0.3), np.arange(2000) < 1000),
    ],
    ids=["areas", "average", "pooled", "ties"],
)
def test_zero_variance_gives_no_verdict(effect: Student) -> None:
    for side in (-1, 1):
        row = verdict(effect, side=side, bound=0.02)
        assert row["verdict"] == UNDECIDED or (row["p"] == 1.0 and row["low"] <= 0 <= row["high"])
    assert verdict(effect, side=1, bound=0.02)["verdict"] == UNDECIDED


def test_an_undefined_p_value_rejects_nothing() -> None:
    adjusted, levels = holm([NAN, 0.001, 0.5])
    assert adjusted[0] == 1.0
    assert levels[2] == pytest.approx(0.025)
