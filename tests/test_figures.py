"""Figures show the numbers of the tables, and the same tables give the same bytes."""

import ast
import inspect
import io
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

import harness.figures
from harness.figures import (
    CORRECT,
    INCORRECT,
    NORM_LABELS,
    boundary_classes,
    calibration_curves,
    class_margins,
    confidence_margins,
    correctness_curves,
    estimator_ratios,
    flow_epochs,
    image_flow,
    image_paths,
    margin_curves,
    margin_distributions,
    nearest_epochs,
    save,
)
from harness.figures.images import spread
from tests.grids import covering

EPOCHS = [0, 1, 2, 5]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNIT = "(pixel range = 1)"


def summary(
    estimators: tuple[str, ...] = ("deepfool", "fmn:steps=20"),
    norms: tuple[str, ...] = ("l2", "linf"),
    splits: tuple[str, ...] = ("train", "test"),
) -> pd.DataFrame:
    """Synthetic rows: all averages and standard errors differ."""
    draw = np.random.default_rng(0)
    rows = [
        {
            "epoch": epoch,
            "split": split,
            "subset": subset,
            "estimator": estimator,
            "norm": norm,
            "count": {"all": 30, "correct": 20, "incorrect": 10}[subset],
            "found": {"all": 30, "correct": 20, "incorrect": 10}[subset],
            "avg": draw.uniform(0.1, 1.0),
            "se": draw.uniform(0.01, 0.05),
        }
        for epoch, estimator, norm, split, subset in itertools.product(
            EPOCHS, estimators, norms, splits, ("all", "correct", "incorrect")
        )
    ]
    return pd.DataFrame(rows)


def errors() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": EPOCHS * 2,
            "split": ["train"] * 4 + ["test"] * 4,
            "loss": 1.0,
            "error": [0.9, 0.5, 0.2, 0.04, 0.91, 0.55, 0.25, 0.12],
            "seconds": 1.0,
        }
    )


def margins(images: int = 60, epochs: tuple[int, ...] = (0, 1, 10, 20)) -> pd.DataFrame:
    """Synthetic images: a quarter is incorrect and nearer; distances fall over epochs and differ by norm and split."""
    draw = np.random.default_rng(1)
    parts = []
    for epoch, split, estimator, norm in itertools.product(
        epochs, ("train", "test"), ("deepfool", "envelope"), ("l2", "linf")
    ):
        correct = np.arange(images) % 4 > 0
        scale = (1.0 if norm == "l2" else 0.05) * np.where(correct, 1.0, 0.3) / (1 + epoch / 10)
        part = {
            "image": np.arange(images) * 7,
            "label": np.arange(images) % 3,
            "correct": correct,
            "confidence": 1 - 10 ** draw.uniform(-9, -0.5, images),
            "distance": scale * draw.uniform(0.1, 1.0, images),
        }
        parts.append(pd.DataFrame(part).assign(epoch=epoch, split=split, estimator=estimator, norm=norm))
    return pd.concat(parts, ignore_index=True)


def classes(labels: int = 10) -> pd.DataFrame:
    keys = list(itertools.product(EPOCHS, ("train", "test"), ("deepfool", "fmn"), ("l2", "linf"), range(labels)))
    table = pd.DataFrame(keys, columns=["epoch", "split", "estimator", "norm", "label"])
    average = np.random.default_rng(2).uniform(0.1, 1.0, len(table))
    return table.assign(avg=average, se=0.01, found=5, count=5)


def boundary(labels: int = 4) -> pd.DataFrame:
    columns = ["epoch", "split", "estimator", "norm", "prediction", "target"]
    keys = list(
        itertools.product(EPOCHS, ("train", "test"), ("deepfool",), ("l2", "linf"), range(labels), range(labels))
    )
    table = pd.DataFrame(keys, columns=columns)
    counts = np.random.default_rng(3).integers(1, 50, len(table))
    return table.assign(count=counts)[table["prediction"] != table["target"]]


def changes() -> pd.DataFrame:
    columns = ["epoch", "split", "estimator", "norm"]
    table = pd.DataFrame(list(itertools.product(EPOCHS[1:], ("train", "test"), ("deepfool",), ("l2", "linf"))))
    return table.set_axis(columns, axis=1).assign(previous=0, images=30, changed=np.linspace(0.9, 0.1, len(table)))


def ratios() -> pd.DataFrame:
    columns = ["epoch", "split", "estimator", "norm"]
    table = pd.DataFrame(list(itertools.product(EPOCHS, ("train", "test"), ("deepfool", "fmn"), ("l2", "linf"))))
    ratio = np.random.default_rng(4).uniform(1.0, 1.3, len(table))
    return table.set_axis(columns, axis=1).assign(ratio=ratio, low=ratio - 0.02, high=ratio + 0.03, images=30)


def reliability() -> pd.DataFrame:
    table = pd.DataFrame(
        list(itertools.product(EPOCHS, ("train", "test"), range(15))), columns=["epoch", "split", "bin"]
    )
    counts = np.where(table["bin"] < 5, 0, 10 * table["bin"] + table["epoch"])
    confidence = np.where(counts > 0, (table["bin"] + 0.5) / 15, np.nan)
    accuracy = confidence - 0.01 * table["epoch"]
    low, high = table["bin"] / 15, (table["bin"] + 1) / 15
    return table.assign(low=low, high=high, count=counts, confidence=confidence, accuracy=accuracy)


def calibration() -> pd.DataFrame:
    table = pd.DataFrame(list(itertools.product(EPOCHS, ("train", "test"))), columns=["epoch", "split"])
    return table.assign(images=100, ece=np.linspace(0.1, 0.01, len(table)), overconfidence=0.0)


def paths() -> pd.DataFrame:
    rows = pick(margins(images=12, epochs=(0, 1, 10, 20)), split="test", estimator="deepfool")
    last = rows[rows["epoch"] == 20].assign(rank=lambda table: table.groupby("norm")["distance"].rank().astype(int) - 1)
    return rows.merge(last[["image", "norm", "rank"]], on=["image", "norm"])


def correctness(epochs: int = 41, images: int = 1000, seed: int = 5) -> pd.DataFrame:
    """A tenth is correct before training, nine of ten after one epoch, and a few change every epoch."""
    draw = np.random.default_rng(seed)
    columns = {0: draw.random(images) < 0.1}
    columns |= {epoch: draw.random(images) < 0.9 + 0.002 * epoch for epoch in range(1, epochs)}
    return pd.DataFrame(columns)


def bars(axes: Axes) -> dict[str, ErrorbarContainer]:
    """The curves with error bars of a panel by their label."""
    found = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    assert len(found) == len(axes.containers)
    return found


def heights(bar: ErrorbarContainer) -> list[float]:
    """Half the length of each error bar; gaps have none."""
    (stems,) = bar.lines[2]
    return [(segment[1, 1] - segment[0, 1]) / 2 for segment in stems.get_segments() if len(segment)]


def values(line: Line2D) -> np.ndarray:
    """Heights of a line's points, NaN at gaps."""
    return np.asarray(line.get_ydata(), dtype=float)


def pick(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values."""
    return table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])]


def legend(figure: Figure) -> list[str]:
    """Entries of the single legend below the panels."""
    (found,) = figure.legends
    assert all(axes.get_legend() is None for axes in figure.axes)
    figure.draw_without_rendering()
    lowest = min(axes.get_tightbbox().y0 for axes in figure.axes)
    assert found.get_window_extent().y1 <= lowest + 1
    return [text.get_text() for text in found.get_texts()]


def sentence_of(figure: Figure) -> str:
    """The sentence of a figure without data."""
    assert figure.axes == []
    (text,) = figure.texts
    return text.get_text().replace("\n", " ")


def lines(axes: Axes) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


# averages over epochs


def test_every_line_matches_its_table() -> None:
    table = summary()
    figure = margin_curves(table, errors())
    error_axes, *margin_axes = figure.axes
    assert len(margin_axes) == 2
    assert legend(figure) == ["deepfool", "fmn:steps=20", "train", "test"]
    for norm, axes in zip(("l2", "linf"), margin_axes, strict=True):
        assert axes.get_ylabel() == f"average {NORM_LABELS[norm]} margin\n{UNIT}"
        assert axes.get_xlabel() == "epoch"
        curves = bars(axes)
        assert list(curves) == [f"{e}, {s}" for e in ("deepfool", "fmn:steps=20") for s in ("train", "test")]
        for label, curve in curves.items():
            estimator, split = label.split(", ")
            group = table[table["estimator"].eq(estimator) & table["split"].eq(split) & table["norm"].eq(norm)]
            rows, wrong = group[group["subset"] == "all"], group[group["subset"] == "correct"]
            line = curve.lines[0]
            assert line.get_xdata().tolist() == EPOCHS
            assert line.get_ydata().tolist() == rows["avg"].tolist()
            assert heights(curve) == pytest.approx(rows["se"].tolist(), rel=1e-12)
            assert line.get_ydata().tolist() != wrong["avg"].tolist()
            assert heights(curve) != pytest.approx(wrong["se"].tolist(), rel=1e-3)
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > pick(table, subset="all", norm=norm).eval("avg + se").max()
    drawn = lines(error_axes)
    assert list(drawn) == ["train", "test"]
    assert drawn["train"].get_ydata().tolist() == pytest.approx([90, 50, 20, 4], rel=1e-12)
    assert drawn["test"].get_ydata().tolist() == pytest.approx([91, 55, 25, 12], rel=1e-12)
    assert drawn["test"].get_xdata().tolist() == EPOCHS
    assert error_axes.get_ylabel() == "error (%)"


def test_rows_in_any_order_give_the_same_lines() -> None:
    table = summary()
    mixed = table.sample(frac=1, random_state=0)
    one, two = (bars(margin_curves(rows, errors()).axes[1]) for rows in (table, mixed))
    assert one.keys() == two.keys()
    assert all(one[key].lines[0].get_ydata().tolist() == two[key].lines[0].get_ydata().tolist() for key in one)


def test_training_and_test_lines_differ_in_style_and_share_their_estimators_colour() -> None:
    curves = bars(margin_curves(summary(), errors()).axes[1])
    styles = {label: curve.lines[0].get_linestyle() for label, curve in curves.items()}
    assert styles["fmn:steps=20, train"] == "-"
    assert styles["fmn:steps=20, test"] == "--"
    colours = {label: to_hex(curve.lines[0].get_color()) for label, curve in curves.items()}
    assert colours["fmn:steps=20, train"] == colours["fmn:steps=20, test"] != colours["deepfool, train"]


def test_the_envelope_is_a_thick_black_line_without_markers_and_takes_no_colour_of_others() -> None:
    table = summary(("deepfool", "envelope", "fmn"))
    curves = {label: curve.lines[0] for label, curve in bars(margin_curves(table, errors()).axes[1]).items()}
    line, other = curves["envelope, train"], curves["deepfool, train"]
    assert to_hex(line.get_color()) == "#000000"
    assert line.get_markevery() == []
    assert other.get_markevery() == [0, 1, 2, 3]
    assert line.get_linewidth() > other.get_linewidth()
    assert line.get_zorder() < other.get_zorder()
    plain = {label: curve.lines[0] for label, curve in bars(margin_curves(summary(), errors()).axes[1]).items()}
    assert curves["fmn, train"].get_color() == plain["fmn:steps=20, train"].get_color()


def test_estimators_of_other_tables_keep_their_colours() -> None:
    def colours(axes: Axes) -> dict[str, str]:
        return {str(label): to_hex(line.get_color()) for label, line in lines(axes).items() if ", " in str(label)}

    table = ratios()
    alone = table[table["estimator"] == "fmn"]
    both = colours(estimator_ratios(table).axes[0])
    colour_of = colours(estimator_ratios(alone, estimators=["deepfool", "fmn"]).axes[0])
    assert colour_of["fmn, test"] == both["fmn, test"] != both["deepfool, test"]
    assert colours(estimator_ratios(alone).axes[0])["fmn, test"] == both["deepfool, test"]
    curves = bars(margin_curves(summary(("fmn",)), errors(), estimators=["deepfool", "fmn"]).axes[1])
    assert to_hex(curves["fmn, test"].lines[0].get_color()) == both["fmn, test"]


def test_there_is_no_error_panel_without_errors_and_no_panel_of_a_norm_without_rows() -> None:
    assert len(margin_curves(summary(), errors()).axes) == 3
    assert len(margin_curves(summary(), errors().iloc[:0]).axes) == 2
    only = margin_curves(summary(norms=("linf",)), errors().iloc[:0])
    assert [axes.get_ylabel() for axes in only.axes] == [rf"average $L_\infty$ margin{chr(10)}{UNIT}"]
    assert bars(only.axes[0]).keys() == bars(margin_curves(summary(), errors()).axes[2]).keys()


@pytest.mark.slow
def test_many_estimators_are_distinguishable_and_look_the_same_in_every_panel() -> None:
    names = tuple(f"e{place}" for place in range(20))
    table = summary(names)
    table = table[~((table["estimator"] == "e0") & (table["norm"] == "linf"))]
    figure = margin_curves(table, errors())
    looks: list[dict[str, tuple[str, Any]]] = []
    for axes in figure.axes[1:]:
        curves = {label: curve.lines[0] for label, curve in bars(axes).items() if label.endswith("train")}
        looks.append({label: (to_hex(line.get_color()), line.get_marker()) for label, line in curves.items()})
    l2, linf = looks
    assert len(l2) == 20
    assert len(set(l2.values())) == 20
    assert len({colour for colour, _ in list(l2.values())[:6]}) == 6
    assert linf == {label: look for label, look in l2.items() if not label.startswith("e0,")}
    assert legend(figure) == [*names, "train", "test"]


def test_epochs_with_nothing_found_leave_a_gap_and_one_image_no_bar() -> None:
    table = summary(estimators=("fmn",), norms=("l2",), splits=("train",))
    table.loc[table["epoch"] == 1, ["found", "avg", "se"]] = [0, math.nan, math.nan]
    table.loc[table["epoch"] == 2, ["found", "se"]] = [1, math.nan]
    (axes,) = margin_curves(table, errors().iloc[:0]).axes
    (curve,) = bars(axes).values()
    assert curve.lines[0].get_xdata().tolist() == EPOCHS
    assert np.isnan(values(curve.lines[0])).tolist() == [False, True, False, False]
    assert [height > 0 for height in heights(curve)] == [True, False, True]
    assert axes.get_title("left") == "n = 0–30 of 30 train"


def test_a_point_between_gaps_has_a_marker_also_on_the_envelope() -> None:
    table = summary(estimators=("envelope",), norms=("l2",), splits=("train",))
    table.loc[table["epoch"].isin([0, 2]), ["found", "avg", "se"]] = [0, math.nan, math.nan]
    (curve,) = bars(margin_curves(table, errors().iloc[:0]).axes[0]).values()
    assert curve.lines[0].get_markevery() == [1, 3]


def test_an_estimator_that_was_measured_at_some_epochs_only_has_points_and_no_line() -> None:
    table = summary(("deepfool", "best"))
    last = table["epoch"].max()
    sparse = table[(table["estimator"] == "deepfool") | table["epoch"].isin([0, last])]
    for rows, styles in ((table, {"-", "--"}), (sparse, {"None"})):
        curves = bars(margin_curves(rows, errors()).axes[1])
        assert {curve.lines[0].get_linestyle() for name, curve in curves.items() if "best" in name} == styles
        assert {curve.lines[0].get_linestyle() for name, curve in curves.items() if "deepfool" in name} == {"-", "--"}
    assert list(curves["best, train"].lines[0].get_xdata()) == [0, last]
    assert curves["best, train"].lines[0].get_markevery() is None
    for rows, style in ((table, "--"), (sparse, "None")):
        curves = bars(correctness_curves(rows).axes[0])
        assert curves["best, correct"].lines[0].get_linestyle() == style
        assert curves["deepfool, incorrect"].lines[0].get_linestyle() == "--"


def test_the_number_of_images_in_each_average_is_stated() -> None:
    table = summary()
    assert margin_curves(table, errors()).axes[1].get_title("left") == "n = 30 train, 30 test"
    table.loc[(table["epoch"] == 2) & (table["split"] == "test"), "found"] -= 4
    figure = margin_curves(table, errors())
    assert figure.axes[1].get_title("left") == "n = 30 train, 26–30 of 30 test"
    note = correctness_curves(table, "test").axes[0].get_title("left")
    assert note == "n = 16–20 correct, 6–10 incorrect\nat most 4 left out (no distance, or tied)"
    assert correctness_curves(table, "train").axes[0].get_title("left") == "n = 20 correct, 10 incorrect"


@pytest.mark.slow
@pytest.mark.parametrize("with_errors", [True, False])
def test_a_run_that_found_nothing_says_so(tmp_path: Path, with_errors: bool) -> None:
    table = summary().assign(found=0, avg=math.nan, se=math.nan)
    sentence = "There is no average margin to show: no image has a distance at any epoch."
    for rows in (table, table.iloc[:0], pd.DataFrame()):
        figure = margin_curves(rows, errors() if with_errors else errors().iloc[:0])
        png, svg = save(figure, tmp_path, "margins")
        assert png.read_bytes().startswith(PNG_SIGNATURE)
        assert "<svg" in svg.read_text(encoding="utf-8")
        if with_errors:
            assert figure.axes[1].texts[0].get_text().replace("\n", " ") == sentence
            assert len(figure.axes) == 2
        else:
            assert sentence_of(figure) == sentence


def test_errors_of_zero_other_splits_and_single_epochs_are_drawn() -> None:
    table = summary(splits=("mine", "yours"))
    figure = margin_curves(table, errors().assign(error=0.0, split="mine"))
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.0] * 8
    curves = bars(figure.axes[1])
    assert list(curves) == [f"{e}, {s}" for e in ("deepfool", "fmn:steps=20") for s in ("mine", "yours")]
    assert curves["deepfool, mine"].lines[0].get_linestyle() != curves["deepfool, yours"].lines[0].get_linestyle()
    one = margin_curves(pick(summary(), epoch=2), pick(errors(), epoch=2))
    marks = {label: line.get_marker() for label, line in lines(one.axes[0]).items()}
    assert marks == {"train": "o", "test": "o"}
    assert one.axes[0].get_ylim()[1] > 25


def test_correct_and_incorrect_images_have_their_own_curves_and_colours() -> None:
    table = summary(("deepfool", "fmn", "envelope"))
    figure = correctness_curves(table, "test")
    assert legend(figure) == ["correct", "incorrect", "deepfool", "fmn", "envelope"]
    for norm, axes in zip(("l2", "linf"), figure.axes, strict=True):
        assert axes.get_ylabel() == f"average {NORM_LABELS[norm]} margin of test images\n{UNIT}"
        curves = bars(axes)
        assert len(curves) == 6
        for label, curve in curves.items():
            estimator, subset = label.split(", ")
            rows = pick(table, estimator=estimator, subset=subset, norm=norm, split="test")
            assert curve.lines[0].get_ydata().tolist() == rows["avg"].tolist()
            assert heights(curve) == pytest.approx(rows["se"].tolist(), rel=1e-12)
        look = {label: (to_hex(c.lines[0].get_color()).upper(), c.lines[0].get_marker()) for label, c in curves.items()}
        assert look["deepfool, correct"] == (CORRECT, "o")
        assert look["deepfool, incorrect"] == (INCORRECT, "o")
        assert look["envelope, incorrect"][0] == INCORRECT
        assert look["fmn, correct"][1] == look["fmn, incorrect"][1] != "o"
        assert look["fmn, correct"][0] not in (CORRECT, INCORRECT)


def test_epochs_without_incorrect_images_are_gaps_of_their_curve_only() -> None:
    table = summary(("deepfool",), ("l2",))
    gone = table["subset"].eq("incorrect") & table["epoch"].eq(1)
    table.loc[gone, ["count", "found", "avg", "se"]] = [0, 0, math.nan, math.nan]
    curves = bars(correctness_curves(table).axes[0])
    assert np.isnan(values(curves["deepfool, incorrect"].lines[0])).tolist() == [False, True, False, False]
    assert not np.isnan(values(curves["deepfool, correct"].lines[0])).any()
    table.loc[table["subset"] == "incorrect", ["count", "found", "avg", "se"]] = [0, 0, math.nan, math.nan]
    assert correctness_curves(table).axes[0].get_title("left") == "n = 20 correct, 0 incorrect"


# distributions


def test_the_nearest_measured_epochs_are_chosen_once_each() -> None:
    assert nearest_epochs((10, 20, 40), range(41)) == [10, 20, 40]
    assert nearest_epochs((10, 20, 40), range(21)) == [10, 20]
    assert nearest_epochs((10, 20, 40), [0, 1, 5, 15, 30]) == [5, 15, 30]
    assert nearest_epochs((40, 10), [9, 12, 38]) == [9, 38]
    assert nearest_epochs((10,), [0]) == [0]
    assert nearest_epochs((10, 20), []) == []


def test_histograms_hold_the_shares_of_each_group() -> None:
    standard, adversarial = margins(), margins(epochs=(0, 1, 9)).assign(distance=lambda table: 3 * table["distance"])
    runs = {"standard": standard, "PGD": adversarial}
    figure = margin_distributions(runs, "l2", estimator="deepfool")
    assert legend(figure) == ["correct", "incorrect"]
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title().split("\n")[0] for axes in drawn] == ["epoch 10", "epoch 20", "epoch 9"]
    assert [axes.get_ylabel().split("\n")[0] for axes in drawn] == ["standard", "", "PGD"]
    for axes, table, epoch in zip(drawn, (standard, standard, adversarial), (10, 20, 9), strict=True):
        chosen = pick(table, estimator="deepfool", split="train", norm="l2")
        longest = chosen[chosen["epoch"].isin([9, 10, 20])]["distance"].max()
        assert axes.get_xlim() == drawn[0].get_xlim()
        outlines = {p.get_label(): p for p in axes.patches if isinstance(p, StepPatch) and not p.get_fill()}
        for name, right in (("correct", True), ("incorrect", False)):
            values = chosen[(chosen["epoch"] == epoch) & (chosen["correct"] == right)]["distance"]
            heights, edges, _ = outlines[name].get_data()
            assert edges[0] == 0
            assert edges[-1] == longest
            assert heights.tolist() == pytest.approx((100 * np.histogram(values, edges)[0] / len(values)).tolist())
            assert heights.sum() == pytest.approx(100)
            assert f"{len(values)} {name}, median {np.median(values):.3g}" in axes.get_title().split("\n")
            assert axes.get_ylim()[1] >= heights.max()
    assert drawn[2].get_xlabel() == f"$L_2$ margin\n{UNIT}"


def test_images_without_a_distance_are_counted_and_few_images_drawn_one_by_one() -> None:
    table = pick(margins(images=24), epoch=10, split="train").copy()
    table.loc[table["image"] % 5 == 0, "distance"] = math.inf
    (axes,) = margin_distributions({"run": table}, "linf", estimator="deepfool").axes
    chosen = pick(table, estimator="deepfool", norm="linf")
    missing = int(np.isinf(chosen["distance"]).sum())
    assert missing > 0
    assert axes.get_title().split("\n")[-1] == f"{missing} without a distance"
    (outline,) = [p for p in axes.patches if isinstance(p, StepPatch) and not p.get_fill()]
    assert outline.get_data().values.sum() == pytest.approx(100)
    few = chosen[~chosen["correct"] & np.isfinite(chosen["distance"])]["distance"]
    assert 0 < len(few) < 10
    assert lines(axes)["incorrect"].get_xdata().tolist() == few.tolist()
    # the median counts them as infinite
    every = chosen[chosen["correct"]]["distance"]
    assert f"median {np.median(every):.3g}" in axes.get_title()
    assert np.median(every) > np.median(every[np.isfinite(every)])


# flow


def test_flow_epochs_are_few_and_denser_early() -> None:
    for count, shown in itertools.product((2, 3, 5, 12, 13, 21, 41, 200), (3, 4, 8, 12)):
        chosen = flow_epochs(list(range(count)), shown)
        assert len(chosen) <= shown
        assert chosen == sorted(set(chosen))
        assert chosen[:2] == [0, 1]
        assert chosen[-1] == count - 1
        gaps = np.diff(chosen)
        assert count <= shown or gaps[0] == 1 < gaps[-1]
        if count <= shown:
            assert chosen == list(range(count))
    assert len(flow_epochs(list(range(41)), 12)) == 12


def ribbons(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Lower and upper height of each ribbon at its start and at its end, by name."""
    result = {}
    for collection in itertools.chain.from_iterable(axes.collections for axes in figure.axes):
        assert isinstance(collection, PolyCollection)
        points = collection.get_paths()[0].vertices
        start, end = (points[points[:, 0] == edge][:, 1] for edge in (points[:, 0].min(), points[:, 0].max()))
        result[str(collection.get_gid())] = (start.min(), start.max(), end.min(), end.max())
    return result


def test_ribbon_widths_are_numbers_of_images() -> None:
    table = correctness()
    figure = image_flow(table)
    epochs = flow_epochs(list(range(41)), 12)
    drawn = ribbons(figure)
    assert len(drawn) == 4 * (len(epochs) - 1)
    for one, two in itertools.pairwise(epochs):
        before, after = table[one], table[two]
        nodes = {"incorrect": (0.0, 0.0), "correct": (100 * (~before).mean(), 100 * (~after).mean())}
        for name, (left, right) in nodes.items():
            inside = [(kind, before.eq(kind == "correct")) for kind in ("incorrect", "correct")]
            # from below: at the start ordered by destination, at the end by origin
            for kind, _ in inside:
                count = (before.eq(name == "correct") & after.eq(kind == "correct")).sum()
                low, high, _, _ = drawn[f"flow_{one}_{two}_{name}_{kind}"]
                assert (low, high) == pytest.approx((left, left + count / 10))
                left = high
                count = (before.eq(kind == "correct") & after.eq(name == "correct")).sum()
                _, _, low, high = drawn[f"flow_{one}_{two}_{kind}_{name}"]
                assert (low, high) == pytest.approx((right, right + count / 10))
                right = high
    # consecutive epochs, which are not shown, would give other widths
    drawn_steps = [drawn[f"flow_{one}_{two}_incorrect_correct"][:2] for one, two in itertools.pairwise(epochs)]
    steps = [(~table[one] & table[one + 1]).sum() / 10 for one in epochs[:-1]]
    assert np.diff(drawn_steps)[:, 0].tolist() != pytest.approx(steps)


def test_a_small_share_is_enlarged_and_the_axis_says_where_it_ends() -> None:
    table = correctness()
    first, rest = image_flow(table).axes
    assert first.get_ylim() == (0, 100)
    assert first.get_title("left") == "whole scale"
    top = rest.get_ylim()[1]
    assert 100 * (~table[1]).mean() < top < 25
    assert rest.get_title("left") == f"the axis ends at {top:.0f}%: all above is correct"
    wrong = [f"{epoch}\n{100 * (~table[epoch]).mean():.1f}%" for epoch in flow_epochs(list(range(41)), 12)]
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in (first, rest)]
    assert ticks == [wrong[:2], wrong[1:]]
    nodes = [bar.get_height() for bar in rest.containers[0]]
    assert nodes == pytest.approx([100 * (~table[epoch]).mean() for epoch in flow_epochs(list(range(41)), 12)[1:]])
    assert first.get_ylabel() == "share of the 1,000 images (%)"
    # if many stay incorrect, the axis is not cut; if few are incorrect from the start, there is no enlarged panel
    (whole,) = image_flow(pd.DataFrame({epoch: np.arange(10) < 3 for epoch in range(4)})).axes
    assert whole.get_ylim() == (0, 100)
    (part,) = image_flow(table.drop(columns=[0])).axes
    assert part.get_ylim()[1] == top


def test_numbers_on_ribbons_are_counts() -> None:
    table = correctness(epochs=4)
    texts = {text.get_text() for axes in image_flow(table).axes for text in axes.texts}
    counts = {f"{(table[e].eq(a) & table[e + 1].eq(b)).sum():,}" for e in range(3) for a in (0, 1) for b in (0, 1)}
    assert texts
    assert texts <= counts


# trust, classes, calibration, images


def test_ratios_and_their_bands_match_the_table() -> None:
    table = ratios()
    figure = estimator_ratios(table)
    assert legend(figure) == ["envelope", "deepfool", "fmn", "train", "test"]
    for norm, axes in zip(("l2", "linf"), figure.axes, strict=True):
        assert NORM_LABELS[norm] in axes.get_ylabel()
        assert axes.get_title("left") == "n = 30 images, band: 95%"
        drawn = lines(axes)
        bands = iter(axes.collections)
        for estimator, split in itertools.product(("deepfool", "fmn"), ("train", "test")):
            rows = pick(table, estimator=estimator, split=split, norm=norm)
            assert drawn[f"{estimator}, {split}"].get_ydata().tolist() == rows["ratio"].tolist()
        for (estimator, split), _ in table.groupby(["estimator", "split"], sort=False):
            rows = pick(table, estimator=estimator, split=split, norm=norm)
            points = next(bands).get_paths()[0].vertices
            for row in rows.itertuples():
                span = points[points[:, 0] == row.epoch][:, 1]
                assert (span.min(), span.max()) == pytest.approx((row.low, row.high))


def test_ratios_of_an_estimator_measured_at_some_epochs_only_are_points_with_bars() -> None:
    table = ratios()
    sparse = table[(table["estimator"] == "deepfool") | table["epoch"].isin([EPOCHS[0], EPOCHS[-1]])]
    for rows, style, bands in ((table, "-", 4), (sparse, "None", 2)):
        axes = estimator_ratios(rows).axes[0]
        assert lines(axes)["fmn, train"].get_linestyle() == style
        assert lines(axes)["deepfool, train"].get_linestyle() == "-"
        assert len([one for one in axes.collections if not isinstance(one, LineCollection)]) == bands
    (bars, _) = (one for one in axes.collections if isinstance(one, LineCollection))
    rows = pick(sparse, estimator="fmn", split="train", norm="l2")
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([row.low, row.high]) for row in rows.itertuples()]


@pytest.mark.slow
def test_class_margins_match_the_table_and_the_last_epochs_are_at_the_side() -> None:
    table = classes()
    table.loc[table["label"].eq(3) & table["epoch"].eq(5), ["avg", "found"]] = [math.nan, 0]
    figure = class_margins(table, estimator="fmn", split="train")
    for norm, axes in zip(("l2", "linf"), figure.axes[:2], strict=True):
        rows = pick(table, estimator="fmn", split="train", norm=norm)
        expected = rows.pivot(index="label", columns="epoch", values="avg")
        (mesh,) = axes.collections
        values = mesh.get_array()
        assert np.ma.getmaskarray(values).sum() == 1
        assert values.filled(math.nan) == pytest.approx(expected.to_numpy(), nan_ok=True)
        # every epoch has its own cell
        assert mesh.get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 3.5, 6.5]
        side = [text.get_text() for text in axes.child_axes[0].get_yticklabels()]
        assert side == ["" if math.isnan(value) else f"{value:#.3g}" for value in expected[5]]
        assert axes.get_title("left") == "at most 5 images an epoch left out (no distance, or tied)"
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(label) for label in range(10)]


def test_of_many_classes_the_nearest_and_the_farthest_are_drawn() -> None:
    table = classes(labels=40)
    axes = class_margins(table, estimator="deepfool").axes[0]
    order = pick(table, estimator="deepfool", split="test", norm="l2", epoch=5)
    labels = order.sort_values("avg")["label"].tolist()
    assert [int(label.get_text()) for label in axes.get_yticklabels()] == labels[:10] + labels[-10:]
    assert "20 of 40" in axes.get_ylabel()
    lost = table.copy()
    lost.loc[lost["label"].ge(15) & lost["epoch"].eq(5), "avg"] = math.nan
    shown = [int(label.get_text()) for label in class_margins(lost, estimator="deepfool").axes[0].get_yticklabels()]
    assert sorted(shown) == list(range(15))


def test_nearest_classes_are_shares_of_their_row_at_the_last_epoch() -> None:
    table = boundary()
    figure = boundary_classes(table, changes(), estimator="deepfool")
    heats = [axes for axes in figure.axes if axes.get_ylabel() == "predicted class"]
    for norm, axes in zip(("l2", "linf"), heats, strict=True):
        rows = pick(table, split="test", norm=norm, epoch=5)
        counts = rows.pivot(index="prediction", columns="target", values="count")
        values = axes.collections[0].get_array().filled(math.nan)
        assert values == pytest.approx(100 * counts.div(counts.sum(axis=1), axis=0).to_numpy(), nan_ok=True)
        assert np.isnan(np.diag(values)).all()
        written = {text.get_position(): int(text.get_text()) for text in axes.texts}
        cells = zip(rows["target"], rows["prediction"], strict=True)
        assert written == dict(zip(cells, rows["count"], strict=True))
        assert axes.get_title("left") == f"{NORM_LABELS[norm]}, epoch 5: {rows['count'].sum()} test images (grey: none)"
    below = [axes for axes in figure.axes if axes.get_lines()]
    for norm, axes in zip(("l2", "linf"), below, strict=True):
        rows = pick(changes(), split="test", norm=norm)
        (line,) = axes.get_lines()
        assert line.get_xdata().tolist() == rows["epoch"].tolist()
        assert line.get_ydata().tolist() == pytest.approx((100 * rows["changed"]).tolist())


@pytest.mark.slow
def test_confidence_and_margin_of_every_image_are_drawn_at_the_chosen_epoch() -> None:
    table = margins()
    table.loc[table["image"] == 14, "distance"] = math.inf
    for epoch, wanted in ((None, 20), (1, 1)):
        figure = confidence_margins(table, estimator="deepfool", epoch=epoch)
        assert legend(figure) == ["correct", "incorrect"]
        for norm, axes in zip(("l2", "linf"), figure.axes, strict=True):
            rows = pick(table, estimator="deepfool", split="test", norm=norm, epoch=wanted)
            rows = rows[np.isfinite(rows["distance"])]
            for cloud, right, colour in zip(axes.collections, (True, False), (CORRECT, INCORRECT), strict=True):
                group = rows[rows["correct"] == right]
                doubt = np.maximum(1 - group["confidence"], 1e-7)
                assert not right or (doubt == 1e-7).any()
                assert cloud.get_offsets().filled() == pytest.approx(np.column_stack([doubt, group["distance"]]))
                assert to_hex(cloud.get_facecolor()[0]).upper() == colour
            assert axes.get_title("left") == f"epoch {wanted}: 44 correct, 15 incorrect\n1 without a distance"
            assert axes.get_ylabel() == f"{NORM_LABELS[norm]} margin\n{UNIT}"
            left, right_end = axes.get_xlim()
            assert left > 1 > 1e-7 > right_end


def test_reliability_and_calibration_error_match_the_tables() -> None:
    figure = calibration_curves(reliability(), calibration(), split="test")
    entries = ["accuracy = confidence (left)", "epoch 1 (left)", "epoch 5 (left)", "train (right)", "test (right)"]
    assert legend(figure) == entries
    curve, counts, error = figure.axes
    for epoch, steps in zip((1, 5), counts.patches, strict=True):
        rows = pick(reliability(), split="test", epoch=epoch)
        line = lines(curve)[f"epoch {epoch}"]
        assert line.get_xdata().tolist() == pytest.approx(rows["confidence"].dropna().tolist())
        assert line.get_ydata().tolist() == pytest.approx(rows["accuracy"].dropna().tolist())
        assert isinstance(steps, StepPatch)
        assert steps.get_data().values.tolist() == rows["count"].tolist()
    for split in ("train", "test"):
        rows = pick(calibration(), split=split)
        assert lines(error)[split].get_ydata().tolist() == rows["ece"].tolist()
    first = calibration_curves(pick(reliability(), epoch=1), pick(calibration(), epoch=1))
    assert list(lines(first.axes[0])) == ["accuracy = confidence", "epoch 1"]


def test_paths_match_the_table_with_gaps_and_marks_where_incorrect() -> None:
    table = paths()
    table["correct"] = table["correct"] & (table["epoch"] > 0)
    table.loc[table["image"].eq(21) & table["epoch"].eq(1), "distance"] = math.inf
    figure = image_paths(table)
    assert legend(figure) == ["correct", "incorrect"]
    for norm, axes in zip(("l2", "linf"), figure.axes, strict=True):
        note = "test, deepfool; at the right: image (true class)\n1 points without a distance"
        assert axes.get_title("left") == note
        drawn = axes.get_lines()
        assert len(drawn) == 24
        shades = []
        for rank, (line, marks) in enumerate(zip(drawn[::2], drawn[1::2], strict=True)):
            rows = pick(table, norm=norm, rank=rank)
            distance = rows["distance"].replace(math.inf, math.nan)
            assert line.get_label() == f"{rows['image'].iloc[0]} ({rows['label'].iloc[0]})"
            assert line.get_ydata().tolist() == pytest.approx(distance.tolist(), nan_ok=True)
            assert marks.get_ydata().tolist() == pytest.approx(distance.where(~rows["correct"]).tolist(), nan_ok=True)
            assert to_hex(marks.get_color()).upper() == INCORRECT
            shades.append(to_hex(line.get_color()))
        assert len(set(shades)) == 12
        assert [text.get_text() for text in axes.texts] == [line.get_label() for line in drawn[::2]]


def test_names_are_spread_no_further_than_needed() -> None:
    assert spread([1.0, 3.0, 5.0], 1.0, 10.0) == [1.0, 3.0, 5.0]
    assert spread([4.0, 4.0, 4.0], 1.0, 10.0) == pytest.approx([3.0, 4.0, 5.0])
    assert spread([0.0, 0.0, 0.1, 9.0], 1.0, 10.0) == pytest.approx([0.0, 1.0, 2.0, 9.0])
    assert spread([9.9, 10.0], 1.0, 10.0) == pytest.approx([9.0, 10.0])
    assert spread([], 1.0, 10.0) == []


# no data

EVERY: dict[str, Callable[[Callable[[pd.DataFrame], pd.DataFrame]], Figure]] = {
    "margin_curves": lambda cut: margin_curves(cut(summary()), cut(errors())),
    "correctness_curves": lambda cut: correctness_curves(cut(summary())),
    "margin_distributions": lambda cut: margin_distributions({"run": cut(margins())}, "l2", estimator="deepfool"),
    "image_flow": lambda cut: image_flow(cut(correctness(epochs=6))),
    "estimator_ratios": lambda cut: estimator_ratios(cut(ratios())),
    "class_margins": lambda cut: class_margins(cut(classes()), estimator="fmn"),
    "confidence_margins": lambda cut: confidence_margins(cut(margins()), estimator="deepfool"),
    "calibration_curves": lambda cut: calibration_curves(cut(reliability()), cut(calibration())),
    "boundary_classes": lambda cut: boundary_classes(cut(boundary()), cut(changes()), estimator="deepfool"),
    "image_paths": lambda cut: image_paths(cut(paths())),
}


def epoch_one(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["epoch"] == 1] if "epoch" in table else table[[1]]


def all_failed(table: pd.DataFrame) -> pd.DataFrame:
    nothing = {"found": 0, "avg": math.nan, "se": math.nan, "distance": math.inf, "target": -1, "ratio": math.nan}
    return table.assign(**{name: value for name, value in nothing.items() if name in table})


def all_correct(table: pd.DataFrame) -> pd.DataFrame:
    if "epoch" not in table:
        return table | True
    if "subset" in table:
        gone = table["subset"].eq("incorrect")
        return table.assign(found=table["found"].mask(gone, 0), avg=table["avg"].mask(gone), se=table["se"].mask(gone))
    return table[table["correct"]] if "correct" in table else table


def only_train(table: pd.DataFrame) -> pd.DataFrame:
    return pick(table, split="train") if "split" in table else table


@pytest.mark.parametrize("name", EVERY)
def test_empty_tables_give_one_sentence(name: str) -> None:
    for cut in (lambda table: table.iloc[:0], lambda table: pd.DataFrame()):
        sentence = sentence_of(EVERY[name](cut))
        assert sentence.startswith("There ")
        assert sentence.endswith(".")
        assert sentence.count(".") == 1


@pytest.mark.parametrize(("name", "cut"), covering(EVERY, [epoch_one, all_failed, all_correct, only_train]))
def test_odd_runs_are_drawn_without_warnings(name: str, cut: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    figure = EVERY[name](cut)
    figure.draw_without_rendering()
    assert figure.axes or sentence_of(figure).startswith("There ")


def test_what_is_missing_is_named() -> None:
    assert "no mine image" in sentence_of(confidence_margins(margins(), estimator="deepfool", split="mine"))
    assert "at epoch 99" in sentence_of(confidence_margins(margins(), estimator="deepfool", epoch=99))
    assert "by apgd" in sentence_of(class_margins(classes(), estimator="apgd"))
    assert "no mine image" in sentence_of(boundary_classes(boundary(), changes(), estimator="deepfool", split="mine"))
    assert "by apgd" in sentence_of(margin_distributions({"run": margins()}, "l2", estimator="apgd"))
    assert "mine images" in sentence_of(correctness_curves(summary(), "mine"))
    assert "every image is classified correctly" in sentence_of(image_flow(correctness() | True))
    assert "two epochs" in sentence_of(image_flow(correctness()[[3]]))
    partly = calibration_curves(reliability(), calibration(), split="mine")
    assert partly.axes[0].texts[0].get_text().replace("\n", " ") == "No predictions of mine images were recorded."
    runs = {"one": margins(), "two": margins().iloc[:0]}
    note = margin_distributions(runs, "l2", estimator="deepfool").axes[2].texts[0].get_text().replace("\n", " ")
    assert note == "two: there are no train images by deepfool."
    assert boundary_classes(boundary(), changes().iloc[:0], estimator="deepfool").axes[2].get_title("left")


# files


@pytest.mark.slow
def test_the_same_tables_give_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in save(margin_curves(summary(), errors()), tmp_path / "a", "margins")]
    with mpl.rc_context({"svg.hashsalt": "other"}):
        again = [path.read_bytes() for path in save(margin_curves(summary(), errors()), tmp_path / "b", "margins")]
    assert first == again
    table = summary()
    table.loc[0, "avg"] += 0.05
    other = [path.read_bytes() for path in save(margin_curves(table, errors()), tmp_path / "c", "margins")]
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["margins.png", "margins.svg"]
    assert first[0].startswith(PNG_SIGNATURE)
    # neither a date nor the program version
    assert not re.search(rb"<dc:date>|\d{4}-\d{2}-\d{2}T", first[1])
    assert b"Software" not in first[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_flow", "boundary_classes", "confidence_margins"])
def test_every_kind_of_mark_is_written_identically_twice(tmp_path: Path, name: str) -> None:
    once, again = (
        [path.read_bytes() for path in save(EVERY[name](lambda table: table), tmp_path / folder, name)]
        for folder in ("a", "b")
    )
    assert once == again


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_no_text_is_too_small_to_read(name: str) -> None:
    figure = EVERY[name](lambda table: table)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 9


def test_no_figure_is_made_by_pyplot() -> None:
    folder = Path(inspect.getfile(harness.figures)).parent
    modules = sorted(folder.glob("*.py"))
    assert len(modules) > 5
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert "pyplot" not in [str(node.module).rpartition(".")[2], *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                assert not any("pyplot" in alias.name for alias in node.names)
    assert set(EVERY) <= set(dir(harness.figures))


@pytest.mark.parametrize("name", [r"$\frac{$", "$$", r"a\$b$c$", "a\x01b", "_hidden", "<b>[red]"])
def test_names_are_not_rendered_as_math(name: str) -> None:
    rows = pd.DataFrame({"epoch": [0, 1], "split": name, "subset": "all", "estimator": name, "norm": "l2"})
    rows = rows.assign(count=9, found=9, avg=[1.0, 2.0], se=0.1)
    figure = margin_curves(rows, pd.DataFrame({"epoch": [0, 1], "split": name, "error": [0.5, 0.25]}))
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    ElementTree.fromstring(out.getvalue())
    shown = {text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()}
    assert shown == {name.replace(r"\$", "$").replace("\x01", "\ufffd").replace("_h", " _h")}
    # our own settings are unchanged
    assert any("$L_2$" in axes.get_ylabel() for axes in figure.axes)
