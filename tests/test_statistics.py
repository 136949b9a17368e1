"""Averages, standard errors and quantiles against hand calculation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attacks.estimator import Status
from harness.runs import epoch_table
from harness.statistics import SUMMARY_COLUMNS, quantile, standard_error, summarise
from harness.statistics.excess import EXCESS_COLUMNS
from harness.store.tables import write_csv

INF, NAN = math.inf, math.nan
STATISTICS = ["avg", "se", "attack_avg", "attack_se", "median", "q05", "q25", "q75", "q95"]
# DESIGN.md, section 4
DESIGN = """epoch split subset estimator norm domain count found avg se attack_avg attack_se
    median q05 q25 q75 q95 forwards backwards seconds"""


def margins(distances: list[float], statuses: list[str] | None = None, **columns: Any) -> pd.DataFrame:
    """Rows of one unit; images are found by default."""
    count = len(distances)
    made = {
        "epoch": 3,
        "split": "train",
        "correct": [True] * count,
        "estimator": "fmn",
        "norm": "l2",
        "domain": "box",
        "distance": distances,
        "attack_distance": [2 * d for d in distances],
        "status": statuses or ["found"] * count,
        "forwards": [10.0] * count,
        "basins": [math.nan] * count,
        "backwards": [4.0] * count,
        "seconds": [0.5] * count,
    }
    return pd.DataFrame(made | columns)


def row(table: pd.DataFrame, subset: str = "all") -> pd.Series:
    (only,) = [one for _, one in table[table["subset"] == subset].iterrows()]
    return only


# standard error


def test_the_standard_error_of_three_numbers() -> None:
    # mean 3, squares 4 + 1 + 9 = 14, over 3
    assert standard_error(np.array([1.0, 2.0, 6.0])) == pytest.approx(math.sqrt(14) / 3, rel=1e-15)
    assert math.sqrt(14) / 3 == pytest.approx(1.2472191289, rel=1e-9)
    # not the unbiased one, sqrt(14 / 2) / sqrt(3)
    assert standard_error(np.array([1.0, 2.0, 6.0])) != pytest.approx(math.sqrt(7 / 3), rel=0.1)


@pytest.mark.parametrize("count", [2, 5, 1000])
def test_the_standard_error_matches_the_paper(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    average = sum(values) / count
    paper = math.sqrt(math.fsum((value - average) ** 2 for value in values)) / count
    assert standard_error(values) == pytest.approx(paper, rel=1e-12)
    assert standard_error(values) == pytest.approx(values.std() / math.sqrt(count), rel=1e-12)
    if count < 1000:
        assert standard_error(values) != pytest.approx(values.std(ddof=1) / math.sqrt(count), rel=1e-3)


def test_the_standard_error_of_one_or_no_value_is_blank() -> None:
    assert math.isnan(standard_error(np.array([2.0])))
    assert math.isnan(standard_error(np.array([])))
    assert standard_error(np.array([2.0, 2.0])) == 0


# quantiles


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 0.5, 2.5),
        ([1.0, 2.0, 3.0, 5.0], 0.75, 3.5),
        ([1.0, 2.0], 0.05, 1.05),
        ([7.0], 0.05, 7.0),
        ([7.0], 0.95, 7.0),
        ([INF], 0.5, INF),
        ([INF, INF, INF], 0.05, INF),
        # the median lies on the last finite value, then halfway to infinity
        ([1.0, 2.0, INF], 0.5, 2.0),
        ([1.0, 2.0, INF, INF], 0.5, INF),
        ([1.0, INF], 0.0, 1.0),
        ([1.0, INF], 0.05, INF),
        ([0.0, 1.0, 2.0, 3.0, INF], 0.75, 3.0),
        ([0.0, 1.0, 2.0, 3.0, INF], 0.95, INF),
    ],
)
def test_quantiles_count_images_not_found_as_infinite(values: list[float], q: float, expected: float) -> None:
    assert quantile(np.array(values), q) == pytest.approx(expected, rel=1e-15)
    assert quantile(np.array(values[::-1]), q) == pytest.approx(expected, rel=1e-15)


def test_finite_quantiles_match_numpy() -> None:
    values = np.random.default_rng(0).random(101)[:97]
    for q in (0.05, 0.25, 0.5, 0.75, 0.95, 0.0, 1.0):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-14)
    assert math.isnan(quantile(np.array([]), 0.5))


# summary


# columns after those of the design, and their values in the hand-calculated summary
MORE: dict[str, float] = {
    "after_noise": 1,
    "tied": 1,
    "not_found": 1,
    "failed": 1,
}


def test_the_columns_start_with_the_documented_ones_in_order() -> None:
    assert list(SUMMARY_COLUMNS[:20]) == DESIGN.split()
    assert SUMMARY_COLUMNS[20:] == (*MORE, *EXCESS_COLUMNS)
    assert list(summarise(margins([1.0, 2.0])).columns) == list(SUMMARY_COLUMNS)
    nothing = summarise(margins([]))
    assert (len(nothing), list(nothing.columns)) == (0, list(SUMMARY_COLUMNS))


def test_a_summary_matches_hand_calculation() -> None:
    rows = margins(
        [1.0, 2.0, 6.0, 0.0, INF, INF],
        ["found", "found_after_noise", "found", "tied", "not_found", "failed"],
        attack_distance=[2.0, 2.0, 8.0, 0.0, INF, INF],
        forwards=[1.0, 2.0, 3.0, 4.0, 5.0, 9.0],
        backwards=[0.0, 0.0, 0.0, 0.0, 0.0, 3.0],
    )
    summary = row(summarise(rows))
    assert [summary[name] for name in ("epoch", "split", "estimator", "norm", "domain")] == [
        3,
        "train",
        "fmn",
        "l2",
        "box",
    ]
    assert (summary["count"], summary["found"]) == (6, 3)
    assert {name: summary[name] for name in MORE} == pytest.approx(MORE, rel=1e-15)
    assert np.isnan([summary[name] for name in EXCESS_COLUMNS]).all()
    # of the three that were found, regardless of the others
    assert summary["avg"] == pytest.approx(3.0, rel=1e-15)
    assert summary["se"] == pytest.approx(math.sqrt(14) / 3, rel=1e-15)
    assert summary["attack_avg"] == pytest.approx(4.0, rel=1e-15)
    assert summary["attack_se"] == pytest.approx(math.sqrt(4 + 4 + 16) / 3, rel=1e-15)
    # of all six: 0, 1, 2, 6, inf, inf
    assert [summary[q] for q in ("q05", "q25", "median", "q75", "q95")] == [0.25, 1.25, 4.0, INF, INF]
    assert (summary["forwards"], summary["backwards"], summary["seconds"]) == (4.0, 0.5, 3.0)


def test_ties_and_failures_are_counted_separately_and_never_averaged() -> None:
    plain = row(summarise(margins([1.0, 2.0, 6.0])))
    more = row(
        summarise(margins([1.0, 2.0, 6.0, 0.0, 0.0, INF, INF], ["found"] * 3 + ["tied", "tied", "failed", "not_found"]))
    )
    for name in ("avg", "se", "attack_avg", "attack_se", "found"):
        assert more[name] == plain[name]
    assert (more["count"], more["tied"], more["failed"], more["not_found"]) == (7, 2, 1, 1)
    # control: with the ties averaged too, the mean would differ
    as_found = row(summarise(margins([1.0, 2.0, 6.0, 0.0, 0.0])))
    assert as_found["avg"] == pytest.approx(9 / 5)
    assert as_found["found"] == 5


def test_every_status_is_counted_once() -> None:
    statuses = [status.value for status in Status]
    summary = row(summarise(margins([1.0, 1.0, 0.0, INF, INF], statuses)))
    assert (
        summary["found"] + summary["tied"] + summary["not_found"] + summary["failed"]
        == summary["count"]
        == len(statuses)
    )
    assert summary["after_noise"] == 1


def test_statistics_of_no_images_are_blank(tmp_path: Path) -> None:
    table = summarise(margins([INF, INF], ["not_found", "not_found"]))
    summary, none = row(table), row(table, "incorrect")
    assert [summary[name] for name in ("avg", "se", "attack_avg", "attack_se")] == pytest.approx([NAN] * 4, nan_ok=True)
    assert [summary[name] for name in ("median", "q05", "q25", "q75", "q95")] == [INF] * 5
    assert (none["count"], none["found"], none["seconds"]) == (0, 0, 0)
    assert all(math.isnan(none[name]) for name in [*STATISTICS, "forwards", "backwards"])
    one = row(summarise(margins([0.5])))
    assert (one["avg"], one["median"], one["q05"], one["q95"]) == (0.5, 0.5, 0.5, 0.5)
    assert math.isnan(one["se"])
    assert math.isnan(one["attack_se"])
    write_csv(tmp_path / "summary.csv", table)
    header, *lines = (tmp_path / "summary.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), lines[2].split(","), strict=True))
    assert cells["subset"] == "incorrect"
    assert {cells[name] for name in [*STATISTICS, "forwards", "backwards"]} == {""}
    assert cells["count"] == cells["found"] == "0"
    assert dict(zip(header.split(","), lines[0].split(","), strict=True))["median"] == "inf"


def test_subsets_split_the_images_by_correctness() -> None:
    correct = [True, False, True, False, False]
    table = summarise(margins([1.0, 10.0, 3.0, 20.0, INF], ["found"] * 4 + ["not_found"], correct=correct))
    assert table["subset"].tolist() == ["all", "correct", "incorrect"]
    assert table["count"].tolist() == [5, 2, 3]
    assert table["found"].tolist() == [4, 2, 2]
    assert table["avg"].tolist() == [8.5, 2.0, 15.0]
    assert table["se"].tolist() == pytest.approx(
        [math.sqrt(7.5**2 + 1.5**2 + 5.5**2 + 11.5**2) / 4, 2**0.5 / 2, 50**0.5 / 2]
    )
    assert table["median"].tolist() == [10.0, 2.0, 20.0]
    assert table["not_found"].tolist() == [1, 0, 1]


def test_every_group_has_its_own_rows_in_the_order_of_the_parts() -> None:
    groups = [
        {"epoch": epoch, "split": split, "estimator": estimator, "norm": norm}
        for epoch in (0, 1)
        for estimator in ("fmn", "deepfool")
        for norm in ("linf", "l2")
        for split in ("train", "test")
    ]
    rows = pd.concat([margins([1.0 + place, 2.0 + place], **group) for place, group in enumerate(groups)])
    table = summarise(rows)
    assert len(table) == 3 * len(groups)
    whole = table[table["subset"] == "all"].reset_index(drop=True)
    for place, group in enumerate(groups):
        assert {name: whole.loc[place, name] for name in group} == group
        assert whole.loc[place, "avg"] == 1.5 + place
        assert whole.loc[place, "se"] == pytest.approx(math.sqrt(0.5) / 2)


# epochs


def test_loss_and_error_of_each_split() -> None:
    predictions = pd.DataFrame(
        {
            "split": ["train"] * 4 + ["test"] * 2,
            "label": [0, 1, 2, 2, 5, 5],
            "prediction": [0, 1, 2, 0, 4, 3],
            "loss": np.float32([0.5, 0.25, 0.25, 3.0, 1.0, 2.0]),
        }
    )
    table = epoch_table(predictions, epoch=7, seconds=1.25)
    assert table.to_dict("list") == {
        "epoch": [7, 7],
        "split": ["train", "test"],
        "loss": [1.0, 1.5],
        "error": [0.25, 1.0],
        "seconds": [1.25, 1.25],
    }
    assert list(table.columns) == ["epoch", "split", "loss", "error", "seconds"]
