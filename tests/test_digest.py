"""Several comparisons as tables in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.compare import audit
from benchmarks.compare.digest import digest, error_table, main


def rows(problem: str, **distances: list[float]) -> pd.DataFrame:
    """As `compare` writes them: image 0 is correct, the others are not."""
    tables = []
    for name, values in distances.items():
        own = pd.DataFrame({"image": range(len(values)), "distance": values, "correct": np.arange(len(values)) == 0})
        own["status"] = np.where(np.isfinite(values), "found", "not_found")
        tables.append(own.assign(estimator=name, problem=problem, norm="l2", role="estimator", passes=7.4))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(exact=np.nan, exact_lower=np.nan, exact_upper=np.nan, declared=np.nan)


def write(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir()
    table.to_csv(folder / "margins.csv", index=False)
    audit.ratio_table(table, leaving=["best"]).to_csv(folder / "ratios.csv", index=False)
    return folder


def test_tables_have_one_column_per_problem(tmp_path: Path) -> None:
    one = write(tmp_path / "one", rows("one", deepfool=[1.2, 2.0], best=[1.0, 2.0], other=[1.1, 2.0]))
    two = write(tmp_path / "two", rows("two", deepfool=[np.inf, 3.0], best=[1.0, 2.0]))
    lines = list(digest([one, two], "deepfool"))
    at = lines.index("\n### l2, against the envelope: mean, within 1% (passes per image)\n")
    assert lines[at + 1 : at + 6] == [
        "| estimator | one | two |",
        "|---|---|---|",
        "| deepfool | 1.1000, 50% (7) | 1.5000 of those found, 0% (7) |",
        "| best | 1.0000, 100% (7) | 1.0000, 100% (7) |",
        "| other | 1.0500, 50% (7) |  |",
    ]
    at = lines.index("\n### l2, against the envelope without best: mean, within 1% (passes per image)\n")
    assert "| best | 0.9545, 100% (7) | 0.3333, 100% (7) |" in lines[at:]


def test_errors_of_correct_and_incorrect_images_are_separate() -> None:
    table = rows("p", deepfool=[1.5, 3.0, np.inf, 4.0], best=[1.0, 2.0, 9.0, 4.0])
    table.loc[3, "status"] = "found_after_noise"
    (row,) = error_table(table, "deepfool").to_dict("records")
    assert (row["found"], row["after noise"], row["median"]) == ("75%", "25%", "1.500")
    assert (row["all"], row["correct"], row["incorrect"]) == ("1.214 (3)", "1.500 (1)", "1.167 (2)")
    assert (row["average"], row["envelope's"]) == ("2.8333", "2.3333")
    assert error_table(table, "absent").empty


def test_the_manifest_holds_the_comparison_without_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "one", rows("one", deepfool=[1.2, 2.0], best=[1.0, 2.0]))
    (folder / "comparison.json").write_text(
        json.dumps({"created": "now", "ratios": [1, 2], "versions": {"torch": "2"}})
    )
    assert main([str(folder), "--manifest", str(tmp_path / "manifest.json")]) == 0
    assert "### l2, against the envelope" in capsys.readouterr().out
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert facts == {"one": {"created": "now", "versions": {"torch": "2"}}}


def test_a_folder_without_a_comparison_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected margins.csv in" in capsys.readouterr().err
