"""The estimated excess of averages over the margins: by hand, from measured basins, and on the page."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from attacks.estimators.linear import Linear
from attacks.isolation import Classifier
from attacks.measure import measure
from attacks.registry import create
from attacks.types import NORMS, Norm
from harness import MarginTracker
from harness.report.prose.warnings import warnings_of
from harness.statistics.averages import SUMMARY_COLUMNS, summarise
from harness.statistics.excess import CALIBRATION, EXCESS_COLUMNS, UNSEEN, excess_at_ends, own_excess, with_others
from harness.statistics.observations.evidence import gather
from harness.store import StoreError
from harness.store.parts import read_margins
from harness.store.tables import read_part, write_part
from tests import oracles
from tests.simulate import margin_rows, run
from tests.test_cascade import digits

KEY = {"epoch": 1, "split": "test", "subset": "all", "norm": "l2", "domain": "box"}


def excess(estimator: str, basins: list[float], norm: str = "l2") -> list[float]:
    distance = np.arange(1.0, len(basins) + 1)
    return list(own_excess(estimator, norm, distance, np.array(basins)).values())


@pytest.mark.parametrize("norm", NORMS)
def test_the_excess_of_a_unit_by_hand(norm: Norm) -> None:
    # averages of 1, 2, 3 and 1.1, 2, 3: a gain of 0.1 / 6
    found = CALIBRATION[norm]
    middle = found.scale * (0.1 / 6) ** found.power
    assert excess("cascade", [1.1, 1.0, 1.0], norm) == pytest.approx(
        [middle, found.low * middle, found.high * middle + UNSEEN / 3]
    )
    # searches that agree leave what three images cannot rule out
    assert excess("cascade", [1.0, 1.0, 1.0], norm) == pytest.approx([0.0, 0.0, 0.05])


def test_an_excess_that_cannot_be_estimated_is_unknown() -> None:
    for estimator, basins in (
        ("deepfool", [1.1, 1.0]),
        ("best", [1.1, 1.0]),
        ("cascade:budget=1000", [1.1, 1.0]),
        ("cascade:warm=150", [1.1, 1.0]),
        ("cascade:refine=polish", [1.1, 1.0]),
        ("cascade", [1.1, math.nan]),
        ("cascade", []),
    ):
        assert np.isnan(excess(estimator, basins)).all(), (estimator, basins)
    # a few images without basins do not matter
    assert np.isfinite(excess("cascade", [1.1] * 19 + [math.nan])).all()


def summary(*rows: tuple[str, float, int, float, float, float]) -> pd.DataFrame:
    names = ("estimator", "avg", "found", *EXCESS_COLUMNS)
    table = pd.DataFrame([KEY | dict(zip(names, row, strict=True)) for row in rows])
    return table.reindex(columns=list(SUMMARY_COLUMNS)).assign(count=10, tied=0)


def test_other_estimators_are_compared_with_one_whose_excess_is_known() -> None:
    unknown = (math.nan,) * 3
    rows = [("deepfool", 3.0, 10, *unknown), ("cascade", 2.0, 10, 0.1, 0.05, 0.2), ("fmn", 2.5, 9, *unknown)]
    table = with_others(summary(*rows)).set_index("estimator")[list(EXCESS_COLUMNS)]
    # three halves of an average that exceeds by 10%
    assert table.loc["deepfool"].tolist() == pytest.approx([1.5 * 1.1 - 1, 1.5 * 1.05 - 1, 1.5 * 1.2 - 1])
    assert table.loc["cascade"].tolist() == pytest.approx([0.1, 0.05, 0.2])
    # it did not find all images
    assert table.loc["fmn"].isna().all()
    ends = excess_at_ends(with_others(summary(*rows[1:2])))
    assert ends[["epoch", "avg", "excess"]].to_numpy().tolist() == [pytest.approx([1, 2.0, 0.1])]


def test_no_excess_is_below_that_over_the_smallest_average() -> None:
    unknown = (math.nan,) * 3
    rows = [("deepfool", 2.2, 10, *unknown), ("cascade", 2.0, 10, 0.01, 0.0, 0.02), ("best", 1.9, 10, *unknown)]
    table = with_others(summary(*rows)).set_index("estimator")[list(EXCESS_COLUMNS)]
    least = 2 / 1.9 - 1
    high = least + UNSEEN / 10
    assert table.loc["cascade"].tolist() == pytest.approx([least, least, high])
    assert table.loc["best"].tolist() == pytest.approx([0.0, 0.0, 0.95 * (1 + high) - 1], abs=1e-12)
    assert table.loc["deepfool"].tolist() == pytest.approx([2.2 / 1.9 - 1, 2.2 / 1.9 - 1, 1.1 * (1 + high) - 1])


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_basins_are_the_gain_of_the_later_searches(norm: Norm) -> None:
    network, images = digits()
    margins = measure(network, images[:24], create("cascade"), norm)
    assert ((margins.basins >= 1) & (margins.basins < 1.5)).all()
    assert (margins.basins > 1.0001).any()
    # with walks alone nothing is known
    short = measure(network, images[:4], create("cascade:budget=150"), norm)
    assert short.basins.isnan().all()
    assert measure(network, images[:4], create("deepfool"), norm).basins.isnan().all()
    both = measure(network, images[:8], create("best:of=cascade:budget=100+deepfool,polish=false"), norm)
    near, far = (measure(network, images[:8], create(text), norm) for text in ("cascade:budget=100", "deepfool"))
    ratio = torch.maximum(near.distance, far.distance) / torch.minimum(near.distance, far.distance)
    torch.testing.assert_close(both.basins, ratio, rtol=3e-3, atol=0)


def test_what_a_lost_search_said_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = oracles.affine(3).head(4)

    def lost(self: Linear, model: Classifier, images: Tensor, *_: object, **__: object) -> Tensor:
        model.disagree(torch.full((len(images),), 2.0))
        return images.clone()

    calls: list[int] = []

    def once(self: Linear, model: Classifier, images: Tensor, *_: object, **__: object) -> Tensor:
        calls.append(len(images))
        return lost(self, model, images) if len(calls) == 1 else 1 - images

    monkeypatch.setattr(Linear, "perturb", once)
    margins = measure(truth.model, truth.images, create("linear"), "l2", noise_retries=6)
    assert (margins.noise_retries > 0).all()
    assert margins.distance.isfinite().any()
    assert margins.basins.isnan().all()


def test_a_part_with_basins_below_one_is_refused(tmp_path: Path) -> None:
    truth = oracles.affine(3).head(4)
    with closing(
        MarginTracker(tmp_path, {"test": (truth.images, torch.zeros(4, dtype=torch.int64))}, ["linear"], ["l2"])
    ) as tracker:
        tracker.update(1, truth.model)
        (path,) = tracker.folder.margin_parts()
        rows, facts = read_part(path)
        write_part(path, rows.assign(basins=0.5), **facts)
        with pytest.raises(StoreError, match="basins of at least 1"):
            read_margins(tracker.folder, path)


@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_images_without_a_witness_have_no_basins() -> None:
    nowhere = oracles.constant()
    margins = measure(nowhere.model, nowhere.images, create("cascade"), "l2", noise_retries=0)
    assert margins.basins.isnan().all()


def test_a_large_excess_is_called_out() -> None:
    values = np.tile(np.arange(1.0, 5.0), (3, 1)).T

    def warned(basins: float) -> list[str]:
        rows = margin_rows(values, estimator="cascade", basins=np.full(values.shape, basins))
        (one,) = gather([run("cascade", rows)]).measured
        return [line for line in warnings_of(one) if "exceed" in line]

    assert warned(1.0) == []
    (line,) = warned(1.05)
    excess = 3.5 * 0.05**1.3
    assert line == (
        "cascade l2: averages are estimated to exceed the margins by more than 2% at 3 epochs, by "
        f"{100 * excess:.2g}% ({20 * excess:.2g}% to {400 * excess + 3.75:.2g}%) at epoch 2 (test)"
    )


def test_summaries_of_parts_without_basins_have_no_excess() -> None:
    assert summarise(margin_rows(np.ones((4, 2)), estimator="cascade"))["excess"].isna().all()
