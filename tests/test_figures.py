"""What is drawn is what the tables say, number by number, and the same tables give the same bytes."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from harness.figures import NORM_LABELS, margin_curves, save

EPOCHS = [0, 1, 2, 5]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def summary(
    estimators: tuple[str, ...] = ("deepfool", "fmn:steps=20"),
    norms: tuple[str, ...] = ("l2", "linf"),
    splits: tuple[str, ...] = ("train", "test"),
) -> pd.DataFrame:
    """Made-up rows: every number is another one."""
    draw = np.random.default_rng(0)
    rows = [
        {
            "epoch": epoch,
            "split": split,
            "subset": subset,
            "estimator": estimator,
            "norm": norm,
            "found": 10,
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


def bars(axes: Axes) -> dict[str, ErrorbarContainer]:
    """The curves with error bars of a panel by their label."""
    found = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    assert len(found) == len(axes.containers)
    return found


def heights(bar: ErrorbarContainer) -> list[float]:
    """Half the length of each error bar."""
    (stems,) = bar.lines[2]
    return [(segment[1, 1] - segment[0, 1]) / 2 for segment in stems.get_segments()]


def test_every_line_holds_the_tables_numbers() -> None:
    table = summary()
    figure = margin_curves(table, errors())
    error_axes, *margin_axes = figure.axes
    assert len(margin_axes) == 2
    for norm, axes in zip(("l2", "linf"), margin_axes, strict=True):
        assert axes.get_ylabel() == f"average {NORM_LABELS[norm]} margin (pixel range = 1)"
        assert axes.get_xlabel() == "epoch"
        curves = bars(axes)
        assert list(curves) == [f"{e}, {s}" for e in ("deepfool", "fmn:steps=20") for s in ("train", "test")]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
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
    lines = {line.get_label(): line for line in error_axes.get_lines()}
    assert list(lines) == ["train", "test"]
    assert lines["train"].get_ydata().tolist() == pytest.approx([90, 50, 20, 4], rel=1e-12)
    assert lines["test"].get_ydata().tolist() == pytest.approx([91, 55, 25, 12], rel=1e-12)
    assert lines["test"].get_xdata().tolist() == EPOCHS
    assert error_axes.get_ylabel() == "error (%)"
    assert [text.get_text() for text in error_axes.get_legend().get_texts()] == ["train", "test"]


def test_training_and_test_lines_differ_in_style_and_share_their_estimators_colour() -> None:
    curves = bars(margin_curves(summary(), errors()).axes[1])
    styles = {label: curve.lines[0].get_linestyle() for label, curve in curves.items()}
    assert styles["fmn:steps=20, train"] == "-"
    assert styles["fmn:steps=20, test"] == "--"
    colours = {label: to_hex(curve.lines[0].get_color()) for label, curve in curves.items()}
    assert colours["fmn:steps=20, train"] == colours["fmn:steps=20, test"] != colours["deepfool, train"]


def test_there_is_no_error_panel_without_errors_and_no_panel_of_a_norm_without_rows() -> None:
    assert len(margin_curves(summary(), errors()).axes) == 3
    assert len(margin_curves(summary(), errors().iloc[:0]).axes) == 2
    only = margin_curves(summary(norms=("linf",)), errors().iloc[:0])
    assert [axes.get_ylabel() for axes in only.axes] == [r"average $L_\infty$ margin (pixel range = 1)"]
    assert bars(only.axes[0]).keys() == bars(margin_curves(summary(), errors()).axes[2]).keys()


def test_many_estimators_are_told_apart_and_look_the_same_in_every_panel() -> None:
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


def test_epochs_with_nothing_found_leave_a_gap_and_one_image_no_bar() -> None:
    table = summary(estimators=("fmn",), norms=("l2",), splits=("train",))
    table.loc[table["epoch"] == 1, ["found", "avg", "se"]] = [0, math.nan, math.nan]
    table.loc[table["epoch"] == 2, ["found", "se"]] = [1, math.nan]
    (curve,) = bars(margin_curves(table, errors().iloc[:0]).axes[0]).values()
    assert curve.lines[0].get_xdata().tolist() == [0, 2, 5]
    drawn = heights(curve)
    assert drawn[1] == 0
    assert drawn[0] > 0
    assert drawn[2] > 0


@pytest.mark.parametrize("with_errors", [True, False])
def test_a_run_that_found_nothing_is_drawn_without_margins(tmp_path: Path, with_errors: bool) -> None:
    table = summary().assign(found=0, avg=math.nan, se=math.nan)
    for rows in (table, table.iloc[:0]):
        figure = margin_curves(rows, errors() if with_errors else errors().iloc[:0])
        assert len(figure.axes) == with_errors
        png, svg = save(figure, tmp_path, "margins")
        assert png.read_bytes().startswith(PNG_SIGNATURE)
        assert "<svg" in svg.read_text(encoding="utf-8")


def test_errors_of_zero_and_other_splits_are_drawn() -> None:
    table = summary(splits=("mine",))
    figure = margin_curves(table, errors().assign(error=0.0, split="mine"))
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.0] * 8
    assert list(bars(figure.axes[1])) == ["deepfool, mine", "fmn:steps=20, mine"]


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
    # neither a date nor the program's version
    assert not re.search(rb"<dc:date>|\d{4}-\d{2}-\d{2}T", first[1])
    assert b"Software" not in first[0]
