"""Runs compared at their last epochs: ratios over the same images only."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.report.__main__ import main
from harness.runs import read_run
from harness.statistics.averages import standard_error
from harness.statistics.envelope import ENVELOPE
from harness.statistics.observations.evidence import gather
from harness.statistics.side_by_side import SIDE_COLUMNS, side_by_side
from tests.test_report import write_run


def table_of(*folders: Path) -> pd.DataFrame:
    return side_by_side(gather([read_run(folder) for folder in folders]).measured)


@pytest.mark.slow
def test_ratios_are_over_the_first_run(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", shrink=0.8)
    other = write_run(tmp_path / "other", shrink=0.4, loss="hinge")
    table = table_of(plain, other)
    assert list(table) == list(SIDE_COLUMNS)
    # runs x norms x splits x estimators, of which the envelope is first
    norms = table["norm"].nunique()
    assert len(table) == 2 * norms * 2 * 3
    assert set(table["estimator"][: 2 * norms * 2]) == {ENVELOPE}
    assert table["run"][:2].tolist() == ["plain", "other"]
    assert table.loc[table["run"] == "plain", ["ratio", "low", "high"]].isna().all().all()
    rows = table[table["run"] == "other"]
    last = read_run(other).margins["epoch"].max()
    # every margin is the same multiple, so that the interval has zero width
    wanted = pytest.approx(np.full(len(rows), (0.4 / 0.8) ** (last - 1)))
    assert rows["ratio"].to_numpy() == wanted
    assert rows["low"].to_numpy() == wanted
    margins = read_run(other).margins
    own = margins[(margins["epoch"] == last) & (margins["split"] == "test") & (margins["estimator"] == "fmn")]
    distances = own[own["norm"] == rows["norm"].iloc[0]]["distance"].to_numpy()
    (row,) = rows[
        (rows["estimator"] == "fmn") & (rows["split"] == "test") & (rows["norm"] == rows["norm"].iloc[0])
    ].itertuples()
    assert row.average == pytest.approx(distances.mean())
    assert row.se == pytest.approx(standard_error(distances))
    assert (row.found, row.images, row.epoch) == (len(distances), len(distances), last)


@pytest.mark.slow
def test_other_images_have_no_ratio(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    for name, options in (("seed", {"probe_seed": 3}), ("data", {"dataset": "mnist"})):
        table = table_of(plain, write_run(tmp_path / name, **options))
        assert table["ratio"].isna().all()
        assert (table["images"] == 0).all()
        assert table["average"].notna().all()


@pytest.mark.slow
def test_a_single_run_is_not_compared(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    assert table_of(plain).empty
    assert main([str(plain)]) == 0
    assert "The runs side by side" not in (plain / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_shows_the_rows_of_the_first_estimator(tmp_path: Path) -> None:
    plain, other = write_run(tmp_path / "plain"), write_run(tmp_path / "other", loss="hinge")
    assert main([str(plain), str(other), "--out", str(tmp_path / "both.html")]) == 0
    kept = pd.read_csv(tmp_path / "both-runs.csv")
    pd.testing.assert_frame_equal(kept, table_of(plain, other))
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="side">') :]
    section = section[: section.index("</section>")]
    assert '<details class="sheet" data-print open>' in section
    shown = section.count("<tr><td>")
    assert shown == section.count("<td>envelope</td>") == len(table_of(plain, other)) // 3
