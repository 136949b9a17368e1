"""Tables by hand: envelope, panels, classes, boundaries, paths, flow, composition, calibration, trends."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.statistics import SUMMARY_COLUMNS, standard_error, summarise
from harness.statistics.calibration import (
    CALIBRATION_COLUMNS,
    RELIABILITY_COLUMNS,
    calibration_error,
    reliability,
)
from harness.statistics.composition import COMPOSITION_COLUMNS, composition, composition_table, newcomer_gap
from harness.statistics.envelope import ENVELOPE, complete_estimators, envelope
from harness.statistics.figure_tables import (
    at_nearest_epochs,
    bin_counts,
    bin_edges,
    boundary_counts,
    image_flow,
    row_shares,
    subset_averages,
)
from harness.statistics.panels import MEASURES, panels
from harness.statistics.tables import (
    BOUNDARY_COLUMNS,
    CHANGE_COLUMNS,
    CLASS_COLUMNS,
    PATH_COLUMNS,
    RATIO_COLUMNS,
    boundary_changes,
    boundary_classes,
    class_margins,
    confidence_correlation,
    correctness,
    estimator_ratios,
    image_paths,
)
from harness.statistics.trends import (
    DESCRIPTION_COLUMNS,
    correlation,
    describe_trend,
    kendall,
    slopes,
    theil_sen,
)
from harness.store import MARGIN_COLUMNS
from tests.simulate import margin_rows, panel, predictions_of

NAN, INF = math.nan, math.inf


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(sigma=0.5, size=shape)


# the envelope


def three_estimators() -> pd.DataFrame:
    first = np.array([[1.0, 4.0], [2.0, NAN], [NAN, NAN]])
    second = np.array([[3.0, 2.0], [1.5, 7.0], [NAN, 5.0]])
    partly = np.array([[0.1], [0.1], [0.1]])
    return pd.concat(
        [
            margin_rows(first, estimator="deepfool", overshoot=1.5),
            margin_rows(second, estimator="fmn", overshoot=1.01),
            margin_rows(partly, estimator="ddn", epochs=np.array([1])),
            margin_rows(first, estimator="deepfool", norm="linf"),
        ],
        ignore_index=True,
    )


def test_only_estimators_of_every_epoch_and_split_are_complete() -> None:
    rows = three_estimators()
    assert complete_estimators(rows, "l2") == ["deepfool", "fmn"]
    assert complete_estimators(rows, "linf") == ["deepfool"]
    one_split = pd.concat([rows, margin_rows(np.ones((3, 2)), split="train", estimator="fmn")], ignore_index=True)
    assert complete_estimators(one_split, "l2") == ["fmn"]
    with_envelope = pd.concat([rows, envelope(rows, {"l2": ["deepfool", "fmn"]})], ignore_index=True)
    assert complete_estimators(with_envelope, "l2") == ["deepfool", "fmn"]


def test_the_envelope_is_the_smallest_of_each_measure_and_the_status_of_the_distance() -> None:
    rows = three_estimators()
    best = envelope(rows, {"l2": ["deepfool", "fmn"], "linf": ["deepfool"]})
    assert list(best.columns) == list(MARGIN_COLUMNS)
    assert set(best["norm"]) == {"l2"}  # a single estimator would equal its envelope
    assert set(best["estimator"]) == {ENVELOPE}
    best = best.sort_values(["epoch", "image"])
    assert best["distance"].tolist() == [1.0, 1.5, INF, 2.0, 7.0, 5.0]
    # 1.5 * 1 or 1.01 * 3, and so on: not always that of the estimator with the smallest distance
    assert best["attack_distance"].tolist() == pytest.approx([1.5, 1.515, INF, 2.02, 7.07, 5.05])
    assert best["status"].tolist() == ["found", "found", "not_found", "found", "found", "found"]
    assert best["forwards"].tolist() == [20.0] * 6
    crossed = pd.concat(
        [
            margin_rows(np.array([[1.0]]), estimator="a", overshoot=3.0),
            margin_rows(np.array([[2.0]]), estimator="b", overshoot=1.01),
        ],
        ignore_index=True,
    )
    both = envelope(crossed, {"l2": ["a", "b"]})
    assert (both["distance"].item(), both["attack_distance"].item()) == (1.0, 2.02)


def test_the_envelope_of_ties_and_failures() -> None:
    status = np.array([["tied"], ["failed"], ["failed"]])
    rows = pd.concat(
        [
            margin_rows(np.array([[0.0], [NAN], [NAN]]), estimator="a", status=status),
            margin_rows(np.array([[0.0], [3.0], [NAN]]), estimator="b", status=np.array([["tied"], ["found"], ["x"]])),
        ],
        ignore_index=True,
    )
    best = envelope(rows, {"l2": ["a", "b"]}).sort_values("image")
    assert best["distance"].tolist() == [0.0, 3.0, INF]
    assert best["status"].tolist() == ["tied", "found", "failed"]


def test_there_is_no_envelope_of_fewer_than_two_estimators() -> None:
    rows = three_estimators()
    for names in ([], ["fmn"]):
        nothing = envelope(rows, {"l2": names})
        assert (len(nothing), list(nothing.columns)) == (0, list(MARGIN_COLUMNS))
    assert len(envelope(rows.iloc[:0], {})) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_envelope_is_never_above_an_estimator(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tables = []
    for name in ("a", "b", "c"):
        values = draw.random((6, 3))
        values[draw.random((6, 3)) < 0.2] = NAN
        tables.append(margin_rows(values, estimator=name, overshoot=1 + draw.random()))
    rows = pd.concat(tables, ignore_index=True)
    keys = ["epoch", "image"]
    best = envelope(rows, {"l2": ["a", "b", "c"]}).set_index(keys)
    for measure in MEASURES:
        expected = rows.groupby(keys)[measure].min()
        pd.testing.assert_series_equal(best[measure].sort_index(), expected, check_dtype=False)


# panels


def test_a_panel_holds_only_images_that_were_found() -> None:
    values = np.array([[1.0, 2.0, 3.0], [4.0, NAN, 0.0], [7.0, 8.0, 9.0]])
    status = np.array([["found"] * 3, ["found_after_noise", "not_found", "tied"], ["found"] * 3])
    rows = margin_rows(values, epochs=np.array([0, 1, 5]), status=status, correct=values > 1).sample(
        frac=1, random_state=0
    )
    distance, attack = panels("mine", rows)
    assert (distance.run, distance.key) == ("mine", ("deepfool", "l2", "test", "distance"))
    assert attack.measure == "attack_distance"
    np.testing.assert_array_equal(distance.epochs, [0, 1, 5])
    np.testing.assert_array_equal(distance.later, [1, 5])
    np.testing.assert_array_equal(distance.values, [[1, 2, 3], [4, NAN, NAN], [7, 8, 9]])
    np.testing.assert_allclose(attack.values, 1.02 * distance.values)
    np.testing.assert_array_equal(distance.averages, [4, 5, 6])
    np.testing.assert_array_equal(distance.at(5), [3, NAN, 9])
    np.testing.assert_array_equal(distance.correct, [[False, True, True], [True, False, False], [True] * 3])
    np.testing.assert_array_equal(distance.label, [0, 1, 2])
    np.testing.assert_array_equal(distance.target[1], [2, -1, 0])
    with pytest.raises(ValueError, match="unpack"):
        distance.column(3)


def test_images_missing_at_an_epoch_have_no_distance_there() -> None:
    rows = margin_rows(np.ones((3, 2)))
    partly = rows.drop(index=rows.index[(rows["epoch"] == 1) & (rows["image"] == 2)])
    first_panel = next(panels("r", partly))
    np.testing.assert_array_equal(first_panel.values, [[1, 1], [1, 1], [1, NAN]])
    assert (first_panel.prediction[2, 1], first_panel.target[2, 1]) == (-1, -1)


def test_an_average_of_no_images_is_blank() -> None:
    assert np.isnan(panel(np.array([[NAN, 1.0], [NAN, 3.0]])).averages[0])
    assert panel(np.array([[NAN, 1.0], [NAN, 3.0]])).averages[1] == 2.0


def test_averages_of_panels_match_the_summary() -> None:
    values = draws(0, 40, 3)
    values[3, 1] = NAN
    rows = margin_rows(values)
    table = summarise(rows)
    assert list(table.columns) == list(SUMMARY_COLUMNS)
    whole = table[table["subset"] == "all"].sort_values("epoch")
    distance, attack = panels("r", rows)
    np.testing.assert_allclose(whole["avg"].to_numpy(), distance.averages)
    np.testing.assert_allclose(whole["attack_avg"].to_numpy(), attack.averages)


# estimators against the envelope


def test_the_ratio_of_an_estimator_to_the_envelope_is_over_the_images_of_both() -> None:
    best = draws(1, 50, 2)
    own = best * (1 + draws(2, 50, 2))
    own[0, 0] = NAN
    table = estimator_ratios([panel(own), panel(best, estimator=ENVELOPE), panel(best, split="train")])
    assert list(table.columns) == list(RATIO_COLUMNS)
    assert table[["epoch", "split", "estimator", "images"]].values.tolist() == [
        [0, "test", "deepfool", 49],
        [1, "test", "deepfool", 50],
    ]
    expected = [own[1:, 0].mean() / best[1:, 0].mean(), own[:, 1].mean() / best[:, 1].mean()]
    assert table["ratio"].tolist() == pytest.approx(expected)
    draw = np.random.default_rng(3).integers(50, size=(8000, 50))
    drawn = own[draw, 1].mean(axis=1) / best[draw, 1].mean(axis=1)
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.01)
    assert list(estimator_ratios([]).columns) == list(RATIO_COLUMNS)
    few = np.full((5, 1), NAN)
    few[0] = 1.0
    assert len(estimator_ratios([panel(few), panel(few, estimator=ENVELOPE)])) == 0


# classes and boundaries


def test_class_margins_match_hand_calculation() -> None:
    values = np.array([[1.0, 2.0], [NAN, 5.0], [3.0, 4.0], [NAN, 7.0]])
    table = class_margins([panel(values, label=np.array([0, 1, 0, 1]))])
    assert list(table.columns) == list(CLASS_COLUMNS)
    facts = table.set_index(["label", "epoch"])
    assert facts.loc[(0, 0), ["avg", "found", "count"]].tolist() == [2.0, 2, 2]
    assert facts.loc[(0, 0), "se"] == standard_error(np.array([1.0, 3.0]))
    assert facts.loc[(1, 1), "avg"] == 6.0
    assert facts.loc[(1, 0), ["found", "count"]].tolist() == [0, 2]
    assert math.isnan(facts.loc[(1, 0), "avg"])
    assert list(class_margins([]).columns) == list(CLASS_COLUMNS)


def test_classes_beyond_the_boundary_and_how_often_they_change() -> None:
    prediction = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [2, 2, 2]])
    target = np.array([[1, 1, 2], [1, 2, 0], [2, -1, 2], [0, 0, 0]])
    made = panel(np.ones((4, 3)), prediction=prediction, target=target, epochs=np.array([0, 1, 4]))
    counts = boundary_classes([made])
    assert list(counts.columns) == list(BOUNDARY_COLUMNS)
    first = counts[counts["epoch"] == 0]
    assert first[["prediction", "target", "count"]].values.tolist() == [[0, 1, 2], [1, 2, 1], [2, 0, 1]]
    assert counts.groupby("epoch")["count"].sum().tolist() == [4, 3, 4]
    changes = boundary_changes([made])
    assert list(changes.columns) == list(CHANGE_COLUMNS)
    # of three images found at both epochs, image 1 changed; then images 0 and 1 did
    assert changes[["epoch", "previous", "images"]].values.tolist() == [[1, 0, 3], [4, 1, 3]]
    assert changes["changed"].tolist() == pytest.approx([1 / 3, 2 / 3])
    nothing = panel(np.full((4, 2), NAN))
    assert len(boundary_classes([nothing])) == len(boundary_changes([nothing])) == 0
    assert list(boundary_classes([]).columns) == list(BOUNDARY_COLUMNS)
    assert list(boundary_changes([]).columns) == list(CHANGE_COLUMNS)


def test_paths_are_of_images_at_even_quantiles_of_the_last_epoch() -> None:
    last = np.random.default_rng(4).permutation(np.arange(1.0, 24))
    values = np.stack([last + 1, last], axis=1)
    table = image_paths([panel(values)])
    assert list(table.columns) == list(PATH_COLUMNS)
    ends = table[table["epoch"] == 1]
    assert ends["distance"].tolist() == [float(2 * k + 1) for k in range(12)]
    assert ends["rank"].tolist() == list(range(12))
    assert table[table["epoch"] == 0]["distance"].tolist() == [float(2 * k + 2) for k in range(12)]
    assert len(image_paths([panel(values[:5])])) == 5 * 2  # fewer images than paths: each once
    assert len(image_paths([panel(np.full((5, 2), NAN))])) == 0
    assert list(image_paths([]).columns) == list(PATH_COLUMNS)


# flow


def test_flow_counts_every_image_once_an_epoch() -> None:
    right = np.array([[True, True, False], [False, True, True], [False, False, False], [True, False, True]])
    flow = image_flow(correctness(predictions_of(right))["test"], [0, 1, 2])
    first = flow[flow["epoch"] == 0].set_index(["before", "after"])["count"]
    assert first.to_dict() == {
        ("correct", "correct"): 1,
        ("correct", "incorrect"): 1,
        ("incorrect", "correct"): 1,
        ("incorrect", "incorrect"): 1,
    }
    assert flow.groupby("epoch")["count"].sum().tolist() == [4, 4]
    assert flow["next_epoch"].unique().tolist() == [1, 2]
    assert list(image_flow(pd.DataFrame(), []).columns) == ["epoch", "next_epoch", "before", "after", "count"]


# what the static and the interactive figure share


def test_the_last_bin_holds_the_distances_beyond_it() -> None:
    edges = bin_edges(0.0, 4)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert bin_counts(np.array([0.1, 0.25, 0.9, 7.0]), edges).tolist() == [1, 1, 0, 2]


def test_shares_are_of_the_row_and_rows_without_an_image_have_none() -> None:
    rows = pd.DataFrame({"prediction": [0, 0], "target": [1, 2], "count": [3, 1]})
    counts = boundary_counts(rows, [0, 1, 2])
    assert np.isnan(counts.loc[0, 0])
    shares = row_shares(counts)
    assert shares.loc[0, [1, 2]].tolist() == [0.75, 0.25]
    assert shares.loc[[1, 2]].isna().all(axis=None)


def test_averages_of_a_norm_keep_their_gaps_and_a_norm_without_any_is_left_out() -> None:
    rows = pd.DataFrame({"subset": ["all", "all", "all", "correct"], "norm": ["l2", "l2", "linf", "l2"]})
    rows["found"] = [0, 5, 0, 5]
    assert subset_averages(rows, ["all"]).index.tolist() == [0, 1]


def test_rows_are_those_of_the_nearest_measured_epochs() -> None:
    rows = pd.DataFrame({"epoch": [0, 5, 5, 15, 30]})
    assert at_nearest_epochs(rows, (10, 40)).index.tolist() == [1, 2, 4]


def test_correctness_is_of_images_seen_at_every_epoch() -> None:
    table = predictions_of(np.array([[True, False], [False, True], [True, True]]))
    whole = correctness(table)["test"]
    assert whole.to_numpy().tolist() == [[True, False], [False, True], [True, True]]
    assert correctness(table.iloc[:-1])["test"].index.tolist() == [0, 1]
    assert correctness(table.iloc[:0]) == {}


# composition


def parts(values: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    table = composition_table([panel(values, correct)])
    assert list(table.columns) == list(COMPOSITION_COLUMNS)
    return table


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.05, 0.3, 0.5, 0.95]))
def test_the_three_parts_sum_to_the_change(seed: int, rate: float) -> None:
    draw = np.random.default_rng(seed)
    values = draw.lognormal(size=(12, 5))
    values[draw.random(values.shape) < 0.2] = NAN
    correct = draw.random(values.shape) > rate
    made = panel(values, correct)
    for row in composition(made):
        member = correct if row["subset"] == "correct" else ~correct
        before, after = (values[member[:, t], t] for t in (row["previous"], row["epoch"]))
        assert row["previous"] >= 1
        assert row["change"] == pytest.approx(np.nanmean(after) - np.nanmean(before), abs=1e-12)
        assert row["stayers"] + row["entrants"] + row["leavers"] == pytest.approx(row["change"], abs=1e-12)
        found = np.isfinite(values) & member
        t = [row["previous"], row["epoch"]]
        assert row["n_stayers"] + row["n_leavers"] == found[:, t[0]].sum()
        assert row["n_stayers"] + row["n_entrants"] == found[:, t[1]].sum()


def test_a_composition_matches_hand_calculation() -> None:
    # epoch 0 is excluded; at epoch 2 image 2 becomes correct close to the boundary, and image 3 becomes incorrect
    values = np.array([[9.0, 4.0, 3.0], [9.0, 6.0, 5.0], [9.0, 1.0, 1.0], [9.0, 2.0, 0.5]])
    correct = np.array([[True, True, True], [True, True, True], [True, False, True], [True, True, False]])
    table = parts(values, correct).set_index("subset")
    assert table.index.tolist() == ["correct", "incorrect"]
    # 4 = (4 + 6 + 2) / 3 to 3 = (3 + 5 + 1) / 3; the stayers from 5 to 4
    own = table.loc["correct", ["change", "stayers", "entrants", "leavers", "gap"]].tolist()
    assert own == pytest.approx([-1.0, -1.0, -1.0, 1.0, -3.0])
    assert table.loc["correct", ["n_stayers", "n_entrants", "n_leavers"]].tolist() == [2, 1, 1]
    # no incorrect image stayed
    other = table.loc["incorrect", ["change", "stayers", "entrants", "leavers"]].tolist()
    assert other == pytest.approx([-0.5, 0.0, 0.5, -1.0])
    assert math.isnan(table.loc["incorrect", "gap"])


def test_a_composition_of_entrants_or_leavers_only() -> None:
    values = np.array([[1.0, 2.0, 4.0], [1.0, 6.0, 8.0]])
    gained = parts(values, np.array([[True, True, True], [True, False, True]]))
    row = gained[gained["subset"] == "correct"].iloc[0]
    assert row[["change", "stayers", "entrants", "leavers", "gap"]].tolist() == pytest.approx([4.0, 2.0, 2.0, 0.0, 4.0])
    lost = parts(values, np.array([[True, True, True], [True, True, False]]))
    row = lost[lost["subset"] == "correct"].iloc[0]
    assert row[["change", "stayers", "entrants", "leavers"]].tolist() == pytest.approx([0.0, 2.0, 0.0, -2.0])
    assert math.isnan(row["gap"])
    # an image that is no longer found leaves the average
    gone = parts(np.array([[1.0, 2.0, 4.0], [1.0, 6.0, NAN]]), np.ones((2, 3), dtype=bool))
    assert gone[["stayers", "leavers", "n_leavers"]].values.tolist() == [[2.0, -2.0, 1]]


def test_there_is_no_composition_of_one_epoch_or_an_empty_subset() -> None:
    assert composition(panel(np.ones((5, 1)))) == []
    assert composition(panel(np.ones((5, 2)))) == []
    assert [row["subset"] for row in composition(panel(np.ones((5, 3))))] == ["correct"]
    assert composition(panel(np.full((5, 3), NAN))) == []
    assert newcomer_gap(panel(np.ones((5, 2)))) is None
    assert list(composition_table([]).columns) == list(COMPOSITION_COLUMNS)


def test_newcomers_of_a_panel_are_those_of_neighbouring_epochs_from_1_on() -> None:
    correct = np.array([[False, True, True, True], [True, False, True, True], [True, True, True, False]])
    values = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.5, 2.0], [1.0, 5.0, 6.0, 1.0]])
    gap = newcomer_gap(panel(values, correct))
    assert gap is not None
    # image 1 at epoch 2, against images 0 and 2; image 0 became correct at epoch 1, relative to epoch 0
    assert gap.estimate == pytest.approx(0.5 - 4.5)


# calibration


def test_the_calibration_error_matches_hand_calculation() -> None:
    table = pd.DataFrame(
        {
            "epoch": 3,
            "split": "test",
            "label": [0, 0, 0, 0, 0, 0],
            "prediction": [0, 1, 0, 0, 1, 1],
            # bins (1/15, 2/15], (8/15, 9/15] and (14/15, 1]
            "confidence": [0.1, 0.58, 0.56, 0.99, 1.0, 0.95],
        }
    )
    bins = reliability(table)
    assert list(bins.columns) == list(RELIABILITY_COLUMNS)
    assert bins["count"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3]
    assert bins.loc[8, ["confidence", "accuracy"]].tolist() == pytest.approx([0.57, 0.5])
    assert bins.loc[14, ["confidence", "accuracy", "low", "high"]].tolist() == pytest.approx([0.98, 1 / 3, 14 / 15, 1])
    assert bins.loc[0, ["confidence", "accuracy"]].isna().all()
    errors = calibration_error(bins)
    assert list(errors.columns) == list(CALIBRATION_COLUMNS)
    ece = (1 * abs(1 - 0.1) + 2 * abs(0.5 - 0.57) + 3 * abs(1 / 3 - 0.98)) / 6
    over = (-0.9 + 2 * 0.07 + 3 * (0.98 - 1 / 3)) / 6
    assert errors[["epoch", "images"]].values.tolist() == [[3, 6]]
    assert (errors.loc[0, "ece"], errors.loc[0, "overconfidence"]) == (pytest.approx(ece), pytest.approx(over))
    assert over == pytest.approx(table["confidence"].mean() - 0.5)


def test_a_calibrated_network_has_a_small_error_and_an_overconfident_one_a_large_error() -> None:
    draw = np.random.default_rng(5)
    confidence = draw.uniform(0.3, 1, size=40_000)
    right = draw.random(40_000) < confidence
    table = pd.DataFrame({"epoch": 0, "split": "test", "label": 0, "prediction": 1 - right, "confidence": confidence})
    calibrated = calibration_error(reliability(table)).iloc[0]
    assert calibrated["ece"] < 0.012
    assert abs(calibrated["overconfidence"]) < 0.01
    sure = calibration_error(reliability(table.assign(confidence=1.0))).iloc[0]
    assert sure["ece"] == pytest.approx(1 - right.mean())
    assert sure["overconfidence"] == pytest.approx(sure["ece"])


def test_bins_are_closed_above_and_every_image_is_in_one() -> None:
    edges = np.arange(1, 16) / 15
    table = pd.DataFrame({"epoch": 0, "split": "test", "label": 0, "prediction": 0, "confidence": edges})
    assert reliability(table)["count"].sum() == 15
    exact = table.iloc[:3].assign(confidence=[0.2, 0.4, 0.6])  # 3, 6 and 9 fifteenths, also in floating point
    assert np.flatnonzero(reliability(exact)["count"]).tolist() == [2, 5, 8]
    assert reliability(table.assign(confidence=np.float32(1)))["count"].tolist() == [0] * 14 + [15]
    empty = table.iloc[:0]
    assert list(reliability(empty).columns) == list(RELIABILITY_COLUMNS)
    assert list(calibration_error(reliability(empty)).columns) == list(CALIBRATION_COLUMNS)


def test_reliability_keeps_epochs_and_splits_apart() -> None:
    both = pd.concat(
        [predictions_of(np.ones((4, 2), dtype=bool)), predictions_of(np.zeros((3, 2), dtype=bool), split="train")]
    )
    errors = calibration_error(reliability(both)).set_index(["split", "epoch"])
    assert errors.loc[("test", 1), ["images", "ece"]].tolist() == pytest.approx([4, 0.1])
    assert errors.loc[("train", 0), ["images", "ece"]].tolist() == pytest.approx([3, 0.9])
    assert len(errors) == 4


# trends and correlations


def test_trends_match_scipy() -> None:
    epochs = np.array([1, 2, 3, 5, 8, 9])
    averages = np.array([5.0, 4.0, 4.5, NAN, 3.0, 3.5])
    found = np.isfinite(averages)
    assert kendall(epochs, averages) == pytest.approx(stats.kendalltau(epochs[found], averages[found]).statistic)
    assert theil_sen(epochs, averages) == pytest.approx(stats.theilslopes(averages[found], epochs[found]).slope)
    assert kendall(epochs, -np.arange(6.0)) == pytest.approx(-1)
    for nothing in (np.full(6, NAN), np.ones(6)):
        assert math.isnan(kendall(epochs, nothing))
    assert theil_sen(epochs, np.ones(6)) == 0
    assert math.isnan(theil_sen(epochs[:1], averages[:1]))
    assert math.isnan(kendall(epochs[:2], averages[:2]))


def test_a_correlation_needs_three_pairs_with_spread() -> None:
    draw = np.random.default_rng(6)
    first, second = draw.random(20), draw.random(20)
    first[3] = second[7] = NAN
    both = np.isfinite(first) & np.isfinite(second)
    assert correlation(first, second) == pytest.approx(stats.pearsonr(first[both], second[both]).statistic)
    assert math.isnan(correlation(first[:2], second[:2]))
    assert math.isnan(correlation(np.ones(5), np.arange(5.0)))


def test_the_slope_of_an_average_is_the_average_of_the_slopes() -> None:
    values = draws(7, 30, 5)
    made = panel(values)
    epochs = np.array([1, 2, 4])
    own = slopes(made, epochs)
    assert own[4] == pytest.approx(np.polyfit(epochs, values[4, epochs], 1)[0])
    assert own.mean() == pytest.approx(np.polyfit(epochs, values[:, epochs].mean(axis=0), 1)[0])
    values[4, 2] = NAN
    assert np.isnan(slopes(panel(values), epochs)).tolist() == [k == 4 for k in range(30)]


def test_a_described_trend_leaves_epoch_0_out_and_only_reports_the_peak() -> None:
    averages = np.array([9.0, 3.0, 4.0, 2.0, 1.0])
    made = panel(np.tile(averages, (12, 1)))
    errors = pd.DataFrame({"epoch": range(5), "split": "test", "error": [0.9, 0.5, 0.6, 0.3, 0.1]})
    table = pd.DataFrame(describe_trend(1, made, errors), columns=list(DESCRIPTION_COLUMNS)).set_index("name")
    assert table["epochs"].unique().tolist() == ["1 → 4"]
    assert table["images"].unique().tolist() == [12]
    named = {name.split(",")[0]: row["value"] for name, row in table.iterrows()}
    assert named["Kendall's tau of the average with epochs"] == pytest.approx(-2 / 3)
    assert named["Theil-Sen slope of the average"] == pytest.approx((-1 - 2 / 3) / 2)
    assert named["peak of the average"] == 4.0
    assert "at epoch 2; only reported" in table.loc["peak of the average", "note"]
    assert named["correlation of the average with accuracy"] == pytest.approx(
        np.corrcoef([3, 4, 2, 1], [0.5, 0.4, 0.7, 0.9])[0, 1]
    )
    assert named["correlation of their changes from epoch to epoch"] == pytest.approx(
        np.corrcoef([1, -2, -1], [-0.1, 0.3, 0.2])[0, 1]
    )
    assert not any(word in " ".join(table.columns) for word in ("p_holm", "verdict"))
    assert describe_trend(1, panel(np.ones((4, 1))), errors) == []


def test_without_an_error_table_accuracy_is_that_of_the_probe_images() -> None:
    correct = np.zeros((4, 4), dtype=bool)
    correct[:1, 1] = correct[:2, 2] = correct[:3, 3] = True
    made = panel(np.tile(np.array([9.0, 3.0, 2.0, 0.0]), (4, 1)), correct)
    rows = describe_trend(1, made, pd.DataFrame(columns=["epoch", "split", "error"]))
    value = next(row["value"] for row in rows if row["name"] == "correlation of the average with accuracy")
    assert value == pytest.approx(np.corrcoef([3, 2, 0], [0.25, 0.5, 0.75])[0, 1])


def test_confidence_and_margin_are_correlated_by_rank() -> None:
    values = draws(8, 25, 2)
    confidence = np.stack([values[:, 0] ** 3, np.full(25, 0.5)], axis=1)
    values[2, 0] = NAN
    made = panel(values, confidence=confidence)
    assert confidence_correlation(made, 0) == pytest.approx(1.0)
    assert math.isnan(confidence_correlation(made, 1))
    assert math.isnan(confidence_correlation(panel(np.full((5, 2), NAN)), 0))
