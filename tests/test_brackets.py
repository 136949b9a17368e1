"""Lower bounds in the harness: rows, resuming, the alarm, certain changes, the report and the commands."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks.certifier import Certificates
from attacks.certify import ball
from attacks.estimator import Settings
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, Norm, UnsoundError
from harness import MarginTracker, compare, track
from harness.figures import bracket_bands
from harness.report.prose.brackets import bracket_sentences
from harness.runs import read_run
from harness.statistics.brackets import bracket_table, bracketed, proved
from harness.store import BOUND_COLUMNS, Unit
from tests.runs import ONE_LINE


@dataclass(frozen=True, kw_only=True)
class Claims(Settings):
    """Claims a multiple of the distances that it receives."""

    times: float = 0.5

    name: ClassVar[str] = "claims"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)

    def certify(self, model: nn.Module, images: Tensor, norm: Norm, **given: Any) -> Certificates:
        label = model(images).argmax(1)
        return Certificates(lower=given["upper"] * self.times, solved=torch.zeros(len(images)) > 0, label=label)


@pytest.fixture
def probes(trained_digits: tuple[nn.Module, Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    _, images, labels = trained_digits
    return {"train": (images[:6], labels[:6]), "test": (images[6:14], labels[6:14])}


@pytest.mark.slow
def test_bounds_are_below_the_distances_and_are_not_computed_again(
    tmp_path: Path,
    trained_digits: tuple[nn.Module, Tensor, Tensor],
    probes: dict[str, tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained_digits[0]
    tracker = MarginTracker(
        tmp_path / "run", probes, ["deepfool"], certifiers=["crown"], certify_every=2, certify_probe=5
    )
    for epoch in (0, 1, 2, 3):
        tracker.update(epoch, model, last=epoch == 3)
    rows = read_run(tmp_path / "run").bounds
    assert list(rows.columns) == list(BOUND_COLUMNS)
    assert sorted(rows["epoch"].unique()) == [0, 2, 3]
    assert (rows.groupby(["epoch", "split", "norm"]).size() == 5).all()
    assert (rows["lower"] > 0.3 * rows["upper"]).all()
    assert (rows["lower"] <= rows["upper"]).all()
    margins = read_run(tmp_path / "run").margins
    joined = rows.merge(margins, on=["epoch", "split", "norm", "image"])
    np.testing.assert_array_equal(joined["upper"], joined["distance"])
    assert (joined["domain_x"] == joined["domain_y"]).all()
    # the second call computes nothing
    monkeypatch.setattr("harness.measuring.plan.create_certifier", lambda text: Claims(times=3.0))
    again = MarginTracker(tmp_path / "run", probes, ["deepfool"], certify_every=2, certify_probe=5)
    again.update(3, model)
    pd.testing.assert_frame_equal(read_run(tmp_path / "run").bounds, rows)


def test_a_bound_above_a_distance_stops_the_run_and_keeps_the_case(
    tmp_path: Path, trained_digits: tuple[nn.Module, Tensor, Tensor], probes: dict[str, tuple[Tensor, Tensor]]
) -> None:
    def run(times: float, folder: str) -> MarginTracker:
        return MarginTracker(tmp_path / folder, probes, ["deepfool"], ["l2"], certifiers=[Claims(times=times)])

    run(1.0, "right").update(0, trained_digits[0])
    with pytest.raises(UnsoundError, match=r"expected lower bounds below .*, got .* above .* for train image 0 .*; "):
        run(1.01, "wrong").update(0, trained_digits[0])
    unit = Unit("claims:times=1.01", "l2")
    folder = read_run(tmp_path / "wrong").folder
    assert folder.unsound(0, unit).exists()
    assert not folder.bounds(0, unit).exists()
    assert folder.margins(0, Unit("deepfool", "l2")).exists()


def test_an_unsound_relaxation_raises_the_alarm(
    tmp_path: Path,
    trained_digits: tuple[nn.Module, Tensor, Tensor],
    probes: dict[str, tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = ball.gain
    monkeypatch.setattr(ball, "gain", lambda rows, *rest: -honest(-rows, *rest))
    tracker = MarginTracker(tmp_path / "run", probes, ["cascade"], ["l2"], certifiers=["crown"])
    with pytest.raises(UnsoundError):
        tracker.update(0, trained_digits[0])


@pytest.mark.slow
def test_images_without_a_distance_have_a_bound(
    tmp_path: Path, trained_digits: tuple[nn.Module, Tensor, Tensor], probes: dict[str, tuple[Tensor, Tensor]]
) -> None:
    tracker = MarginTracker(tmp_path / "run", probes, ["ddn"], certifiers=["crown"])
    tracker.update(0, trained_digits[0])
    rows = read_run(tmp_path / "run").bounds
    alone = rows[rows["norm"] == "linf"]
    assert np.isinf(alone["upper"]).all()
    assert (alone["lower"] > 0).all()


def test_a_certifier_must_have_the_norm(tmp_path: Path, probes: dict[str, tuple[Tensor, Tensor]]) -> None:
    class OnlyL2(Claims):
        norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})

    with pytest.raises(EstimatorError, match="expected a certifier of linf in the box domain, got "):
        MarginTracker(tmp_path / "run", probes, ["deepfool"], ["linf"], certifiers=[OnlyL2()])


# --- certain changes ---


def rows_of(lower: list[float], upper: list[float], epoch: int, correct: list[bool] | None = None) -> pd.DataFrame:
    count = len(lower)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "split": "test",
            "image": range(count),
            "label": 0,
            "prediction": 0,
            "correct": correct or [True] * count,
            "certifier": "crown",
            "norm": "l2",
            "domain": "box",
            "lower": lower,
            "upper": upper,
            "solved": False,
            "seconds": 0.1,
        }
    )


def test_the_table_counts_certain_changes() -> None:
    rows = pd.concat(
        [
            rows_of([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], 0),
            rows_of([1.0, 1.0, 1.0, 1.9], [2.0, 2.0, 2.0, 2.0], 1),
            rows_of([0.5, 2.5, 1.5, 1.0], [0.9, 3.0, 2.5, math.inf], 5),
        ]
    )
    table = bracket_table(rows).set_index("epoch")
    assert table.loc[5, ["since", "compared", "closer", "farther"]].tolist() == [1, 4, 1, 1]
    assert table.loc[1, "compared"] == 0
    assert table.loc[0, "compared"] == 0
    assert table.loc[1, "tightness"] == pytest.approx((3 * 0.5 + 0.95) / 4)
    assert table.loc[1, "tight"] == 0.25
    assert table.loc[5, "upper"] == pytest.approx((0.9 + 3.0 + 2.5) / 3)
    assert table.loc[5, "images"] == 4


def test_an_average_has_changed_only_if_its_brackets_are_disjoint() -> None:
    then = rows_of([1.0, 1.0], [1.2, 1.2], 1)
    for lower, upper, verdict in ((0.5, 0.9, "holds"), (1.3, 1.5, "does not hold"), (0.5, 1.1, "open")):
        rows = pd.concat([then, rows_of([lower] * 2, [upper] * 2, 9)])
        changes = proved({"a": ("standard", rows)}, [])
        assert changes.loc[changes["claim"] == "decline", "certain"].tolist() == [verdict]
    mixed = rows_of([1.0, 0.1], [1.2, 0.3], 1, [True, False])
    assert proved({"a": ("pgd", mixed)}, [])["certain"].tolist() == ["holds"]
    pairs = proved({"a": ("standard", then), "b": ("pgd", rows_of([2.0] * 2, [3.0] * 2, 1))}, [("a", "b")])
    assert pairs.loc[pairs["claim"] == "level", "certain"].tolist() == ["holds"]
    assert pairs.loc[pairs["claim"] == "level", "by_upper"].tolist() == pytest.approx([2.5])


def test_an_estimator_added_later_narrows_a_bracket() -> None:
    rows = rows_of([1.0, 1.0], [2.0, 2.0], 1)
    margins = pd.DataFrame(
        {"epoch": 1, "split": "test", "norm": "l2", "domain": "box", "image": [0, 0, 1], "distance": [1.5, 1.7, 3.0]}
    )
    assert bracketed(rows, margins)["upper"].tolist() == [1.5, 2.0]
    # distances in another domain are not joined
    assert bracketed(rows, margins.assign(domain="free"))["upper"].tolist() == [2.0, 2.0]


def test_sentences_and_figure() -> None:
    rows = pd.concat([rows_of([1.0, 1.0], [1.2, 1.2], 1), rows_of([0.5, 0.5], [0.9, 0.8], 9)])
    table, proofs = bracket_table(rows), proved({"a": ("standard", rows)}, [])
    text = " ".join(bracket_sentences(table.assign(run="a"), proofs))
    assert "mean lower bound / distance 0.83 at epoch 1, 0.59 at epoch 9" in text
    assert "certainly moved closer for 2 and farther for 0 of 2" in text
    assert "Observation 1 (a, L₂, crown, epoch 1 → 9): that standard training moves the boundary closer holds" in text
    assert len(bracket_bands(table).axes) == 2
    assert "no lower bounds" in " ".join(text.get_text() for text in bracket_bands(table.iloc[:0]).texts).replace(
        "\n", " "
    )


# --- the commands ---


@pytest.mark.slow
def test_track_and_compare_certify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--model", "dense", "--epochs", "2", "--probe", "12", "--norm", "linf", "--certify-probe", "6"]
    assert track.main([*options, "--certify", "crown:rounds=0", "--certify-every", "2", "--out", str(out)]) == 0
    run = read_run(out)
    assert sorted(run.bounds["epoch"].unique()) == [0, 2]
    assert len(run.bounds) == 24
    assert [entry["estimator"] for entry in run.manifest["certifiers"]] == ["crown:rounds=0"]
    assert compare.main([str(out), "--certify", "ibp", "--epoch", "1", "--certify-probe", "3"]) == 0
    run = read_run(out)
    assert run.bounds.groupby("certifier").size().to_dict() == {"crown:rounds=0": 24, "ibp": 6}
    assert [entry["estimator"] for entry in run.manifest["certifiers"]] == ["crown:rounds=0", "ibp"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Brackets: what is certain" in page
    assert "Brackets of the average margin" in page
    assert (out / "figures" / "brackets.png").exists()
    assert re.search(r"crown:rounds=0 \(run\), L∞, 6 test images: mean lower bound / distance 0\.\d\d", page)
    capsys.readouterr()


@pytest.mark.parametrize(
    "options",
    [
        ["--certify", "crow"],
        ["--certify", "crown:depth=2"],
        ["--certify", "crown", "--certify-every", "0"],
        ["--certify", "crown", "--certify", "crown"],
    ],
)
def test_bad_options_give_a_one_line_error(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track.main([*options, "--epochs", "0", "--probe", "2", "--out", str(tmp_path / "run")]) == 2
    assert ONE_LINE.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert not (tmp_path / "run").exists()
