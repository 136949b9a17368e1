"""The three observations on simulated runs with known answers, individually and in a report."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.runs import Run
from harness.statistics.composition import COMPOSITION_COLUMNS
from harness.statistics.effects.paired import MedianChange
from harness.statistics.envelope import ENVELOPE
from harness.statistics.observations import observation1, observation2, observation3
from harness.statistics.observations.evidence import Evidence, gather
from harness.statistics.observations.verdicts import (
    FINDING_COLUMNS,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Trial,
    holm,
    judge,
)
from harness.statistics.panels import MEASURES, Panel
from harness.statistics.trends import DESCRIPTION_COLUMNS, describe_trend
from tests.simulate import is_at_most, is_rate, margin_rows, panel, predictions_of, run

NAN = math.nan
NO_ERRORS = pd.DataFrame(columns=["epoch", "split", "error"])


def curves(draw: np.random.Generator, averages: list[float], count: int, spread: float = 0.1) -> np.ndarray:
    """``(N, E)`` margins around a curve of averages; each image has its own level and varies a little."""
    level = draw.lognormal(sigma=spread, size=(count, 1))
    return level * np.array(averages) * draw.lognormal(sigma=0.02, size=(count, len(averages)))


def decline(last: float, epochs: int = 21) -> list[float]:
    """A jump at epoch 1 and a straight line from 1 to ``last``."""
    return [0.3, *np.linspace(1, last, epochs - 1)]


def verdicts(trials: list[Trial]) -> dict[str, str]:
    table = judge(trials)
    return dict(zip(table["claim"], table["verdict"], strict=True))


def trial_of(trials: Any, claim: str) -> Trial:
    (trial,) = [one for one in trials if one.claim == claim]
    return trial


# observation 1


@pytest.mark.parametrize(
    ("last", "expected"), [(0.5, SUPPORTED), (1.0, NOT_SUPPORTED), (0.995, NOT_SUPPORTED), (1.5, NOT_SUPPORTED)]
)
def test_a_decline_is_distinguished_from_no_change_and_from_a_rise(last: float, expected: str) -> None:
    made = panel(curves(np.random.default_rng(0), decline(last), 400))
    verdict_of = verdicts(list(observation1.trials([made])))
    assert verdict_of == {
        observation1.JUMP: SUPPORTED,
        observation1.DECLINE: expected,
        observation1.LATE: expected,
    }
    flat = verdicts(list(observation1.trials([panel(curves(np.random.default_rng(1), [1.0] * 21, 400))])))
    assert set(flat.values()) == {NOT_SUPPORTED}


def test_the_changes_are_between_the_epochs_fixed_beforehand() -> None:
    made = panel(curves(np.random.default_rng(2), decline(0.6), 100))
    trials = {trial.claim: trial for trial in observation1.trials([made])}
    for claim, (before, after) in {
        observation1.JUMP: (0, 1),
        observation1.DECLINE: (1, 20),
        observation1.LATE: (16, 20),
    }.items():
        trial = trials[claim]
        assert trial.epochs == f"{before} → {after}"
        assert trial.effect is not None
        assert trial.effect.estimate == pytest.approx(np.median(made.at(after) - made.at(before)))
        assert trial.bound == pytest.approx(0.02 * made.averages[1])
        assert (trial.run, trial.estimator, trial.norm, trial.split) == ("run", "deepfool", "l2", "test")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (range(21), 16),
        (range(41), 31),
        ([0, 1, 10, 20, 30, 40], 40),
        ([0, 1, 5], None),
        ([0, 1, 2], None),
        ([0, 1], None),
        ([0], None),
        ([], None),
        (range(1, 6), 4),
        ([0, 1, 10, 33, 36, 40], 33),
    ],
)
def test_the_last_quarter(epochs: Any, expected: int | None) -> None:
    quarter = observation1.last_quarter(np.array(list(epochs), dtype=int))
    assert quarter == (None if expected == 40 else expected)


def test_train_and_test_agree_within_the_bound_or_not() -> None:
    draw = np.random.default_rng(3)

    def agreement(shift: float, count: int) -> str:
        train = panel(curves(draw, decline(0.8), count), split="train")
        test = panel(curves(draw, [shift * value for value in decline(0.8)], count))
        (trial,) = [one for one in observation1.trials([train, test]) if one.claim == observation1.SPLITS_AGREE]
        assert (trial.side, trial.split, trial.epochs) == (0, "train - test", "20")
        assert trial.bound == pytest.approx(0.02 * train.averages[1])
        return str(judge([trial]).iloc[0]["verdict"])

    assert agreement(1.0, 1000) == SUPPORTED
    assert agreement(1.2, 1000) == NOT_SUPPORTED
    assert agreement(1.0, 15) == UNDECIDED
    only_test = observation1.trials([panel(curves(draw, decline(0.8), 20))])
    assert observation1.SPLITS_AGREE not in {one.claim for one in only_test}


def test_measures_and_norms_are_not_mixed_in_the_comparison_of_splits() -> None:
    made = [
        panel(np.full((30, 3), level), split=split, norm=norm, measure=measure)
        for split in ("train", "test")
        for level, (norm, measure) in enumerate([("l2", "distance"), ("l2", "attack_distance"), ("linf", "distance")])
    ]
    selected = [one for one in observation1.trials(made) if one.claim == observation1.SPLITS_AGREE]
    assert [(one.norm, one.measure) for one in selected] == [
        ("l2", "distance"),
        ("l2", "attack_distance"),
        ("linf", "distance"),
    ]
    assert all(one.effect is not None and one.effect.estimate == 0 for one in selected)


WALKS = 500


def decline_rate(make: Callable[[np.random.Generator], Panel], claim: str = observation1.DECLINE) -> int:
    """How many panels give a decline or a rise at 5%, each tested alone."""
    draw = np.random.default_rng(4)
    found = 0
    for _ in range(WALKS):
        effect = trial_of(observation1.trials([make(draw)]), claim).effect
        assert effect is not None
        low, high = effect.interval(0.05)
        assert (effect.p < 0.05) == (low > 0 or high < 0)
        found += effect.p < 0.05
    return found


def walks(draw: np.random.Generator) -> Panel:
    """Each image's margin is an independent random walk, so that the averages are autocorrelated."""
    return panel(20 + draw.normal(size=(101, 21)).cumsum(axis=1))


def noise(draw: np.random.Generator) -> Panel:
    return panel(5 + draw.normal(size=(101, 21)))


@pytest.mark.slow
def test_random_walks_of_images_are_no_decline() -> None:
    assert is_at_most(decline_rate(walks), 0.05, WALKS)
    assert is_at_most(decline_rate(walks, observation1.LATE), 0.05, WALKS)


def test_control_kendalls_tau_finds_a_trend_in_random_walks() -> None:
    draw = np.random.default_rng(5)
    made = [walks(draw) for _ in range(WALKS)]
    wrong = sum(stats.kendalltau(own.later, own.averages[1:]).pvalue < 0.05 for own in made)
    # control: the reason why tau and the slope have no p-values
    assert not is_at_most(wrong, 0.05, WALKS)
    assert wrong > 0.5 * WALKS
    rows = describe_trend(1, made[0], NO_ERRORS)
    assert {"p", "p_holm", "verdict"} & set(rows[0]) == set()
    assert list(rows[0]) == list(DESCRIPTION_COLUMNS)


@pytest.mark.slow
def test_control_starting_from_the_peak_finds_a_decline_in_noise() -> None:
    assert is_at_most(decline_rate(noise), 0.05, WALKS)
    draw = np.random.default_rng(6)
    wrong = 0
    for _ in range(WALKS):
        made = noise(draw)
        peak = int(np.argmax(made.averages[1:-1])) + 1
        wrong += MedianChange(made.at(20) - made.at(peak)).p < 0.05
    # control
    assert not is_at_most(wrong, 0.05, WALKS)


def test_a_walk_that_all_images_share_is_a_change_of_this_network() -> None:
    draw = np.random.default_rng(7)
    decided = 0
    for _ in range(100):
        shared = draw.normal(size=(1, 21)).cumsum(axis=1)
        effect = trial_of(
            observation1.trials([panel(50 + shared + 0.5 * draw.normal(size=(101, 21)))]), observation1.DECLINE
        ).effect
        assert effect is not None
        decided += effect.p < 0.05
    # true of the network, but no evidence about the training, which needs several seeds
    assert decided > 85


def test_obstacles_of_observation_1() -> None:
    def reasons(epochs: list[int]) -> dict[str, str]:
        made = panel(np.ones((20, len(epochs))), epochs=np.array(epochs))
        return {trial.claim: trial.obstacle for trial in observation1.trials([made])}

    assert reasons([0]) == {
        observation1.JUMP: "epoch 1 was not measured",
        observation1.DECLINE: "epoch 1 was not measured",
        observation1.LATE: "too few measured epochs for a last quarter",
    }
    assert reasons([0, 1]) == {
        observation1.JUMP: "",
        observation1.DECLINE: "no epoch after epoch 1",
        observation1.LATE: "too few measured epochs for a last quarter",
    }
    assert reasons([1, 2, 3, 4, 5])[observation1.JUMP] == "epoch 0 was not measured"
    assert reasons([5, 10, 15])[observation1.DECLINE] == "epoch 1 was not measured"


# observation 2


def compared(standard: np.ndarray, adversarial: np.ndarray, **given: Any) -> dict[str, Trial]:
    trials = observation2.trials([panel(standard, **given)], [panel(adversarial, **given)], "pair")
    return {trial.claim: trial for trial in trials}


def test_the_ratio_the_slopes_and_the_shares_of_a_pair() -> None:
    draw = np.random.default_rng(8)
    standard, adversarial = curves(draw, decline(0.5), 300), 1.9 * curves(draw, decline(0.9), 300)
    result = compared(standard, adversarial)
    assert set(result) == {observation2.TRANSFER, observation2.SLOPE, observation2.DAMPED}
    ratio, slope, kept = (
        result[claim].effect for claim in (observation2.TRANSFER, observation2.SLOPE, observation2.DAMPED)
    )
    assert ratio is not None
    assert slope is not None
    assert kept is not None
    last = adversarial[:, 20].mean() / standard[:, 20].mean()
    assert math.exp(ratio.estimate) == pytest.approx(last)
    assert last == pytest.approx(1.9 * 0.9 / 0.5, rel=0.05)
    epochs = np.arange(1, 21)
    fits = [np.polyfit(epochs, values[:, 1:].mean(axis=0), 1)[0] for values in (adversarial, standard)]
    assert slope.estimate == pytest.approx(fits[0] - fits[1])
    share = [values[:, 20].mean() / values[:, 1].mean() for values in (adversarial, standard)]
    assert math.exp(kept.estimate) == pytest.approx(share[0] / share[1])
    table = judge(list(result.values()))
    assert set(table["verdict"]) == {SUPPORTED}
    shown = table.set_index("claim").loc[observation2.TRANSFER]
    assert shown["value"] == pytest.approx(last)
    assert shown["low"] < last < shown["high"]
    assert shown["bound"] == pytest.approx(1.02)
    assert observation2.RATIO in compared(standard, adversarial, norm="linf")


def test_equal_networks_do_not_differ() -> None:
    draw = np.random.default_rng(9)
    wrong: dict[str, int] = {}
    for _ in range(300):
        base = draw.lognormal(sigma=0.5, size=(120, 1))
        one, other = (base * draw.lognormal(sigma=0.3, size=(120, 6)) for _ in range(2))
        for claim, trial in compared(one, other).items():
            assert trial.effect is not None
            wrong[claim] = wrong.get(claim, 0) + (trial.effect.p < 0.05)
    assert len(wrong) == 3
    for claim, count in wrong.items():
        assert is_rate(count, 0.05, 300), claim


def test_a_pair_that_cannot_be_compared_says_why() -> None:
    values = curves(np.random.default_rng(10), decline(0.5, 6), 40)
    others = list(observation2.trials([panel(values)], [panel(values, images=np.arange(1, 41))], "pair"))
    assert {trial.obstacle for trial in others} == {"the images differ"}
    apart = observation2.trials([panel(values)], [panel(values[:, :1], epochs=np.array([0]))], "pair")
    assert {trial.obstacle for trial in apart} == {"the runs have no measured epoch from 1 on in common"}
    short = {
        trial.claim: trial.obstacle
        for trial in observation2.trials([panel(values[:, :3])], [panel(values[:, :2])], "pair")
    }
    assert short[observation2.TRANSFER] == ""
    assert short[observation2.SLOPE] == "fewer than three common epochs from 1 on"
    assert list(observation2.trials([panel(values)], [panel(values, norm="linf")], "pair")) == []
    assert observation2.describe_change(panel(values[:, :2])) == []
    assert observation2.describe_change(panel(values))[0]["value"] == pytest.approx(
        np.median(values[:, 5] - values[:, 1])
    )


# observation 3


def hardness(
    draw: np.random.Generator, count: int, epochs: int, *, share: float = 0.2, factor: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Margins and correctness; incorrect images mostly stay incorrect and are nearer by a factor."""
    hard = draw.random((count, 1)) < share
    correct = ~(hard ^ (draw.random((count, epochs)) < 0.04))
    values = draw.lognormal(sigma=0.3, size=(count, 1)) * draw.lognormal(sigma=0.05, size=(count, epochs))
    return np.where(correct, values, factor * values), correct


def test_misclassified_images_that_are_closer_are_found_closer() -> None:
    values, correct = hardness(np.random.default_rng(11), 400, 5)
    trials = list(observation3.trials([panel(values, correct)]))
    closer = [trial for trial in trials if trial.claim == observation3.CLOSER]
    assert [trial.epochs for trial in closer] == ["1", "2", "3", "4"]
    table = judge(trials)
    own = table[table["claim"] == observation3.CLOSER]
    assert (own["verdict"] == SUPPORTED).all()
    assert (own["value"] < -0.9).all()
    assert own["detail"].str.startswith("Mann-Whitney U = ").all()
    u = stats.mannwhitneyu(values[~correct[:, 4], 4], values[correct[:, 4], 4])
    delta = 2 * u.statistic / (~correct[:, 4]).sum() / correct[:, 4].sum() - 1
    assert own["value"].iloc[-1] == pytest.approx(delta)


def test_closeness_that_has_nothing_to_do_with_correctness_is_not_found() -> None:
    draw = np.random.default_rng(12)
    counts: dict[str, int] = {}
    total: dict[str, int] = {}
    for _ in range(150):
        values, correct = hardness(draw, 250, 4, factor=1.0)
        confidence = draw.random(values.shape)
        made = panel(values, correct, confidence=confidence, logit_margin=draw.random(values.shape))
        for trial in observation3.trials([made]):
            if trial.epochs in ("3", "1 → 3"):
                assert trial.effect is not None
                counts[trial.claim] = counts.get(trial.claim, 0) + (trial.effect.p < 0.05)
                total[trial.claim] = total.get(trial.claim, 0) + 1
    assert set(counts) == {
        observation3.CLOSER,
        observation3.BEATS_SOFTMAX,
        observation3.BEATS_LOGITS,
        observation3.NEWCOMERS,
    }
    for claim, count in counts.items():
        assert is_at_most(count, 0.05, total[claim]), claim


def test_newcomers_close_to_the_boundary_are_found() -> None:
    draw = np.random.default_rng(13)
    values, correct = hardness(draw, 600, 8)
    new = correct.copy()
    new[:, 1:] &= ~correct[:, :-1]
    trial = trial_of(observation3.trials([panel(np.where(new, 0.5 * values, values), correct)]), observation3.NEWCOMERS)
    assert judge([trial]).iloc[0]["verdict"] == SUPPORTED
    assert trial.epochs == "1 → 7"


def test_a_margin_that_detects_better_than_confidence_is_found_on_test_images_only() -> None:
    values, correct = hardness(np.random.default_rng(14), 500, 3)
    blind = np.random.default_rng(15).random(values.shape)
    test = panel(values, correct, confidence=blind, logit_margin=values)
    verdict_of = verdicts(list(observation3.trials([test])))
    assert verdict_of[observation3.BEATS_SOFTMAX] == SUPPORTED
    # the same score twice cannot be better
    assert verdict_of[observation3.BEATS_LOGITS] in (NOT_SUPPORTED, UNDECIDED)
    on_train = {trial.claim for trial in observation3.trials([panel(values, correct, split="train")])}
    assert {observation3.BEATS_SOFTMAX, observation3.BEATS_LOGITS} & on_train == set()
    rows = {row["name"]: row["value"] for row in observation3.describe_groups(test)}
    margins = rows["area under the ROC curve of detecting misclassified images by margin"]
    wrong = ~correct[:, 2]
    u = stats.mannwhitneyu(-values[wrong, 2], -values[~wrong, 2])
    assert margins == pytest.approx(u.statistic / wrong.sum() / (~wrong).sum())
    assert abs(rows["area under the ROC curve of detecting misclassified images by maximum softmax"] - 0.5) < 0.1


def test_few_incorrect_images_are_undecided() -> None:
    values, _ = hardness(np.random.default_rng(16), 300, 4)
    for wrong, expected in ((9, UNDECIDED), (30, SUPPORTED), (0, UNDECIDED)):
        correct = np.tile(np.arange(300)[:, None] >= wrong, (1, 4))
        made = panel(np.where(correct, 1 + values, 0.1 * values), correct)
        table = judge([trial for trial in observation3.trials([made]) if trial.claim == observation3.CLOSER])
        assert (table["verdict"] == expected).all()
        if expected == UNDECIDED:
            assert set(table["reason"]) == {"fewer than 10 images in a group"}


def test_images_not_found_are_excluded_and_many_of_them_prevent_a_verdict() -> None:
    values, correct = hardness(np.random.default_rng(17), 400, 3)
    some = values.copy()
    some[:19] = NAN
    trial = next(observation3.trials([panel(some, correct)]))
    assert trial.effect is not None
    assert (trial.effect.images, trial.effect.left_out) == (381, 19)
    assert judge([trial]).iloc[0]["verdict"] == SUPPORTED
    some[:21] = NAN
    table = judge(list(observation3.trials([panel(some, correct)])))
    closer = table[table["claim"] == observation3.CLOSER]
    assert set(closer["reason"]) == {"more than 5% of the images have no distance"}


@pytest.mark.parametrize(("again", "expected"), [(0.8, SUPPORTED), (0.2, NOT_SUPPORTED), (0.5, UNDECIDED)])
def test_whether_incorrect_images_stay_incorrect(again: float, expected: str) -> None:
    wrong = np.zeros((2000, 3), dtype=bool)
    wrong[:200, 2] = True
    wrong[: int(200 * again), 1] = True
    wrong[500:900, 1] = True  # and many that are no longer incorrect
    table = pd.DataFrame(~wrong, columns=[0, 1, 2])
    trial = observation3.persistence("run", "train", table)
    assert (trial.epochs, trial.split, trial.estimator) == ("1 → 2", "train", "")
    result = judge([trial]).iloc[0]
    assert result["verdict"] == expected
    assert result["images"] == 200
    assert result["p"] == pytest.approx(stats.binomtest(int(200 * again), 200).pvalue)
    rows = observation3.describe_persistence("run", "train", table)
    assert [(row["epochs"], row["value"], row["images"]) for row in rows] == [("1 → 2", again, 200)]
    assert observation3.persistence("run", "train", table[[0, 1]]).obstacle == "fewer than two epochs from 1 on"


# whole reports


def simulated(
    name: str,
    source: int = 0,
    *,
    last: float = 0.6,
    scale: float = 1.0,
    epochs: int = 6,
    count: int = 120,
    whole: bool = True,
    **options: Any,
) -> Run:
    """A run of two splits and two estimators with known margins; its seed defaults to ``source``."""
    draw = np.random.default_rng(source)
    tables, kept = [], []
    for split in ("train", "test"):
        values, correct = hardness(draw, count, epochs)
        values = scale * values * np.array(decline(last, epochs))
        tables.append(margin_rows(values, correct=correct, split=split))
        tables.append(margin_rows(1.1 * values, correct=correct, split=split, estimator="fmn", overshoot=1.001))
        kept.append(predictions_of(correct, split=split))
    arguments = {"training": "standard", "seed": source} | options
    return run(name, *tables, predictions=pd.concat(kept, ignore_index=True) if whole else None, **arguments)


@pytest.fixture(scope="module")
def pair() -> Evidence:
    adversarial = simulated("robust", 1, last=0.95, scale=1.9, training="pgd", seed=0, pgd_epsilon=0.1)
    return gather([simulated("plain", 0, seed=0), adversarial])


def test_a_pair_is_tested_for_every_estimator_and_the_envelope_and_both_measures(pair: Evidence) -> None:
    findings = pair.findings
    assert list(findings.columns) == list(FINDING_COLUMNS)
    curves = {(name, "l2", split, measure) for name in ("deepfool", "fmn", ENVELOPE)
              for split in ("train", "test") for measure in MEASURES}  # fmt: skip
    for claim, names in {
        observation1.JUMP: {"plain"},
        observation1.DECLINE: {"plain"},
        observation2.TRANSFER: {"robust / plain"},
        observation2.DAMPED: {"robust / plain"},
        observation3.NEWCOMERS: {"plain", "robust"},
    }.items():
        own = findings[findings["claim"] == claim]
        keys = own[["estimator", "norm", "split", "measure"]].itertuples(index=False, name=None)
        assert set(keys) == curves, claim
        assert set(own["run"]) == names, claim
        assert len(own) == 12 * len(names)
    assert (findings["observation"].value_counts()[[1, 2]] == [12 * 3 + 6, 12 * 3]).all()
    closer = findings[findings["claim"] == observation3.CLOSER]
    assert len(closer) == 2 * 12 * 5
    assert pair.warnings == []


def test_a_pair_whose_answers_are_known(pair: Evidence) -> None:
    findings = pair.findings.set_index("claim")
    for claim in (
        observation1.JUMP,
        observation1.DECLINE,
        observation2.TRANSFER,
        observation2.DAMPED,
        observation3.CLOSER,
    ):
        assert (findings.loc[claim, "verdict"] == SUPPORTED).all(), claim
    ratios = findings.loc[observation2.TRANSFER, "value"]
    assert ((ratios > 2.5) & (ratios < 3.6)).all()  # 1.9 * 0.95 / 0.6
    assert (findings.loc[observation3.CLOSER, "value"] < -0.8).all()


def test_a_family_is_all_tests_of_one_observation(pair: Evidence) -> None:
    for _, family in pair.findings.groupby("observation"):
        tested = family[family["p"].notna()]
        adjusted, levels = holm(tested["p"].tolist())
        np.testing.assert_allclose(tested["p_holm"], adjusted)
        strictest = 1 - 0.05 / len(tested)
        assert tested["level"].max() == pytest.approx(strictest)
        read_at_holms = np.isclose(tested["level"], 1 - levels)
        assert (read_at_holms | np.isclose(tested["level"], strictest)).all()
        rest = family[family["p"].isna()]
        assert (rest["verdict"] == UNDECIDED).all()
        assert (rest["reason"] != "").all()
    assert ((pair.findings["reason"] == "") == (pair.findings["verdict"] == SUPPORTED)).all()


def test_descriptive_tables_of_a_pair(pair: Evidence) -> None:
    assert list(pair.descriptions.columns) == list(DESCRIPTION_COLUMNS)
    assert list(pair.composition.columns) == list(COMPOSITION_COLUMNS)
    assert set(pair.composition["run"]) == {"plain", "robust"}
    parts = pair.composition[["stayers", "entrants", "leavers"]].sum(axis=1)
    np.testing.assert_allclose(parts, pair.composition["change"], atol=1e-12)
    plain, robust = pair.measured
    assert set(plain.summary["estimator"]) == {"deepfool", "fmn", ENVELOPE}
    np.testing.assert_array_equal(
        plain.summary.query("estimator == 'deepfool'")["avg"], plain.summary.query("estimator == 'envelope'")["avg"]
    )
    observed = pair.descriptions.groupby("run")["observation"].unique().map(set)
    assert observed.to_dict() == {"plain": {1, 3}, "robust": {2, 3}}
    assert set(robust.correctness) == {"train", "test"}
    assert plain.calibration["images"].unique().tolist() == [120]


@pytest.mark.slow
def test_runs_are_paired_only_where_they_differ_in_their_training_only() -> None:
    plain, robust = simulated("plain", count=20), simulated("robust", 1, training="pgd", seed=0, count=20)
    wider = simulated("wider", 1, training="pgd", seed=0, count=20, model="dense")
    assert set(gather([plain, robust]).findings["observation"]) == {1, 2, 3}
    apart = gather([plain, wider])
    assert set(apart.findings["observation"]) == {1, 3}
    assert any("observation 2 is not tested" in line for line in apart.warnings)
    assert gather([plain]).warnings == []
    assert set(gather([robust]).findings["observation"]) == {3}


def test_the_envelope_is_over_estimators_that_all_runs_have_with_equal_parameters() -> None:
    plain, robust = simulated("plain", count=20), simulated("robust", 1, training="pgd", seed=0, count=20)
    robust.manifest["estimators"][1]["parameters"] = {"steps": 999}
    evidence = gather([plain, robust])
    assert ENVELOPE not in set(evidence.findings["estimator"])
    assert any(line.startswith("fmn (l2) not measured at every epoch") for line in evidence.warnings)
    alone = gather([robust])
    assert ENVELOPE in set(alone.findings["estimator"])


# seeds


@pytest.mark.slow
def test_five_seeds_are_pooled_and_four_are_not() -> None:
    runs = [simulated(f"run-{seed}", seed, count=60, epochs=3) for seed in range(5)]
    four = gather(runs[:4]).findings
    assert set(four["run"]) == {f"run-{seed}" for seed in range(4)}
    assert not four["effect"].str.contains("seeds").any()
    five = gather(runs).findings
    assert set(five["run"]) == {"5 seeds of run-0"}
    assert len(five) * 4 == len(four)
    tested = five[five["p"].notna()]
    assert tested["effect"].str.endswith("average of 5 seeds").all()
    drops = five[five["claim"] == observation1.DECLINE].set_index(["estimator", "split", "measure"])["value"]
    each = [
        np.median(np.subtract(*(
            one.margins.query("estimator == 'fmn' and split == 'train' and epoch == @epoch")["distance"].to_numpy()
            for epoch in (2, 1)
        )))
        for one in runs
    ]  # fmt: skip
    assert drops[("fmn", "train", "distance")] == pytest.approx(np.mean(each))
    assert (five[five["claim"] == observation1.DECLINE]["verdict"] == SUPPORTED).all()


@pytest.mark.slow
def test_pairs_of_five_seeds_are_pooled_seed_by_seed() -> None:
    plain = [simulated(f"plain-{seed}", seed, count=30, epochs=3) for seed in range(5)]
    robust = [
        simulated(f"robust-{seed}", 10 + seed, count=30, epochs=3, scale=1.9, training="pgd", seed=seed)
        for seed in (4, 3, 2, 1, 0)
    ]
    findings = gather([*plain, *robust]).findings
    own = findings[findings["observation"] == 2]
    assert set(own["run"]) == {"5 seeds of robust-4 / plain-0"}
    ratio = own[own["claim"] == observation2.TRANSFER]
    assert len(ratio) == 12
    assert ((ratio["value"] > 1.5) & (ratio["value"] < 2.4)).all()
    # four of five have a partner: each pair is reported separately
    fewer = gather([*plain, *robust[1:]]).findings
    own = fewer[(fewer["observation"] == 2) & (fewer["claim"] == observation2.TRANSFER)]
    assert sorted(set(own["run"])) == [f"robust-{seed} / plain-{seed}" for seed in range(4)]


@pytest.mark.slow
def test_seeds_that_measured_other_epochs_are_not_pooled() -> None:
    runs = [simulated(f"run-{seed}", seed, count=30, epochs=4 + (seed == 2)) for seed in range(5)]
    findings = gather(runs).findings
    own = findings[findings["claim"] == observation1.DECLINE]
    assert (own["verdict"] == UNDECIDED).all()
    assert own["reason"].str.startswith("not all of 5 seeds can be tested").all()
    jump = findings[findings["claim"] == observation1.JUMP]
    assert (jump["verdict"] == SUPPORTED).all()


@pytest.mark.slow
def test_a_run_given_twice_does_not_count_as_a_second_seed() -> None:
    runs = [simulated(f"run-{seed}", seed, count=30, epochs=3) for seed in (0, 1, 2, 3, 3)]
    assert not gather(runs).findings["effect"].str.contains("seeds").any()


# degenerate runs


def degenerate() -> dict[str, Run]:
    draw = np.random.default_rng(20)
    values = draw.lognormal(size=(30, 4))
    right, wrong = np.ones((30, 4), dtype=bool), np.zeros((30, 4), dtype=bool)
    one_class = {"label": np.zeros((30, 4), dtype=int), "prediction": np.zeros((30, 4), dtype=int)}
    failed = np.full((30, 4), "failed")
    mixed = draw.random((30, 4)) < 0.5
    tied = np.where(np.arange(4)[None] > 1, "tied", "found") * np.ones((30, 1), dtype=int).astype(object)
    return {
        "nothing": run("nothing"),
        "nothing of a command": run("nothing", seed=0),
        "epoch 0": run("zero", margin_rows(values[:, :1], correct=mixed[:, :1]), seed=0),
        "epochs 0 and 1": run("two", margin_rows(values[:, :2], correct=mixed[:, :2]), seed=0),
        "epochs 1 and 2": run("later", margin_rows(values[:, :2], epochs=np.array([1, 2])), seed=0),
        "late epochs only": run("late", margin_rows(values, epochs=np.array([5, 10, 15, 20])), seed=0),
        "one class": run("one", margin_rows(values, correct=right, **one_class), seed=0),
        "all correct": run("right", margin_rows(values, correct=right), predictions=predictions_of(right), seed=0),
        "all incorrect": run("wrong", margin_rows(values, correct=wrong), predictions=predictions_of(wrong), seed=0),
        "all failed": run("failed", margin_rows(np.full((30, 4), NAN), status=failed), seed=0),
        "not found": run("lost", margin_rows(np.full((30, 4), NAN), correct=mixed), seed=0),
        "not found later": run("fading", margin_rows(np.where(np.arange(4) > 1, NAN, values), correct=mixed), seed=0),
        "found later": run("rising", margin_rows(np.where(np.arange(4) < 2, NAN, values), correct=mixed), seed=0),
        "ties": run("tied", margin_rows(values, status=tied.astype(str), correct=mixed), seed=0),
        "equal distances": run("equal", margin_rows(np.ones((30, 4)), correct=mixed), seed=0),
        "few images": run("few", margin_rows(values[:5], correct=mixed[:5]), seed=0),
        "one image": run("single", margin_rows(values[:1], correct=mixed[:1]), seed=0),
        "train only": run("train", margin_rows(values, correct=mixed, split="train"), seed=0),
        "predictions only": run("predicted", predictions=predictions_of(mixed), seed=0),
        "other splits": run("mine", margin_rows(values, split="ours"), margin_rows(values, split="theirs")),
        "the tracker's": run("tracker", margin_rows(values, correct=mixed), margin_rows(values, norm="linf")),
        "two estimators, one failed": run(
            "half", margin_rows(values), margin_rows(np.full((30, 4), NAN), estimator="fmn"), seed=0
        ),
        "adversarial alone": run("robust", margin_rows(values, correct=mixed), training="pgd", seed=0),
        "tiny distances": run("tiny", margin_rows(1e-9 * values, correct=mixed), seed=0),
    }


def check(evidence: Evidence) -> None:
    """Complete tables, and no verdict without a test."""
    assert list(evidence.findings.columns) == list(FINDING_COLUMNS)
    assert list(evidence.descriptions.columns) == list(DESCRIPTION_COLUMNS)
    assert list(evidence.composition.columns) == list(COMPOSITION_COLUMNS)
    verdict = evidence.findings["verdict"]
    assert set(verdict) <= {SUPPORTED, NOT_SUPPORTED, UNDECIDED}
    untested = evidence.findings["p"].isna()
    assert (verdict[untested] == UNDECIDED).all()
    assert (evidence.findings.loc[verdict != SUPPORTED, "reason"] != "").all()
    assert (evidence.findings.loc[~untested, ["low", "high"]].notna()).all(axis=None)
    np.testing.assert_allclose(
        evidence.composition[["stayers", "entrants", "leavers"]].sum(axis=1).astype(float),
        evidence.composition["change"].astype(float),
        atol=1e-9,
    )


@pytest.mark.parametrize(
    "name",
    [
        name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(degenerate())
    ],
)
def test_a_degenerate_run_gives_tables_that_name_what_is_missing(name: str) -> None:
    evidence = gather([degenerate()[name]])
    check(evidence)
    if name in ("all failed", "not found", "few images", "one image", "epoch 0"):
        of_margins = evidence.findings[evidence.findings["estimator"] != ""]
        assert (of_margins["verdict"] == UNDECIDED).all()
    if name in ("all correct", "one class", "all incorrect"):
        closer = evidence.findings[evidence.findings["claim"] == observation3.CLOSER]
        assert len(closer) > 0
        assert (closer["verdict"] == UNDECIDED).all()
    if name.startswith("nothing") or name == "predictions only":
        assert len(evidence.composition) == 0


@pytest.mark.slow
def test_degenerate_runs_in_one_report() -> None:
    check(gather(list(degenerate().values())))


def test_a_report_without_runs_is_empty() -> None:
    check(gather([]))


def test_a_degenerate_run_changes_no_number_of_another_run() -> None:
    whole = simulated("plain", count=40, epochs=4)
    alone = gather([whole]).findings
    evidence = gather([whole, run("failed", margin_rows(np.full((30, 4), NAN)), seed=0, dataset="mnist")]).findings
    keys = ["claim", "estimator", "norm", "split", "measure", "epochs"]
    beside = evidence[
        (evidence["run"] == "plain") & evidence["p"].notna() & (evidence["estimator"] != ENVELOPE)
    ].set_index(keys)
    expected = alone[alone["p"].notna() & (alone["estimator"] != ENVELOPE)].set_index(keys)
    pd.testing.assert_frame_equal(
        beside[["value", "p", "p_holm"]], expected.loc[beside.index][["value", "p", "p_holm"]]
    )


def test_without_predictions_the_probe_images_represent_the_set() -> None:
    evidence = gather([simulated("plain", count=40, epochs=4, whole=False)])
    (one,) = evidence.measured
    assert {split: len(table) for split, table in one.correctness.items()} == {"train": 40, "test": 40}
    assert one.calibration["images"].unique().tolist() == [40]
    assert observation3.STAY in set(evidence.findings["claim"])


def test_a_pair_without_equal_seeds_is_reported() -> None:
    plain = [simulated(f"plain-{seed}", seed, count=20, epochs=3) for seed in (0, 1)]
    evidence = gather([*plain, simulated("robust", 9, count=20, epochs=3, training="pgd")])
    # nothing is compared, so a sentence must say so
    assert 2 in set(evidence.findings["observation"]) or any("observation 2" in line for line in evidence.warnings)
