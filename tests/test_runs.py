"""A run folder read into tables, and errors for unreadable ones."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from harness import MarginTracker
from harness.runs import EPOCH_COLUMNS, PREDICTION_TYPES, Run, read_run
from harness.store import MARGIN_COLUMNS, RunFolder, Unit
from harness.store.identity import StoreError
from harness.store.tables import from_csv, write_csv, write_part
from tests.runs import ONE_LINE
from tests.simulate import margin_rows, predictions_of, run

ERRORS = pd.DataFrame(
    {"epoch": [0, 0], "split": ["train", "test"], "loss": [2.3, 2.4], "error": [0.9, 0.8], "seconds": [1.0, 1.0]}
)
OPTIONS = {"dataset": "digits", "training": "pgd", "seed": 3}


def folder(path: Path, **manifest: Any) -> RunFolder:
    made = RunFolder(path)
    made.write_manifest({"schema": 1, "config": OPTIONS, "fingerprint": OPTIONS, "estimators": []} | manifest)
    return made


def filled(path: Path) -> RunFolder:
    made = folder(path)
    for epoch in (0, 1, 10):
        for norm in ("linf", "l2"):
            rows = margin_rows(np.full((4, 1), 1.0 + epoch), epochs=np.array([epoch]), norm=norm)
            write_part(made.margins(epoch, Unit("deepfool", norm)), rows, weights="00")
        table = predictions_of(np.array([[True], [False], [True]])).drop(columns="epoch").assign(loss=0.5)
        write_part(made.predictions(epoch), table, epoch=str(epoch), seconds="1.5")
    write_csv(made.epochs_csv, ERRORS)
    return made


def one_line(error: pytest.ExceptionInfo[StoreError]) -> str:
    text = str(error.value)
    assert ONE_LINE.fullmatch(text)
    return text


def test_every_row_of_a_folder_is_read_in_order(tmp_path: Path) -> None:
    filled(tmp_path / "mine")
    result = read_run(tmp_path / "mine")
    assert (result.name, result.training, result.seed) == ("mine", "pgd", 3)
    assert list(result.margins.columns) == list(MARGIN_COLUMNS)
    assert result.margins["epoch"].unique().tolist() == [0, 1, 10]
    assert len(result.margins) == 3 * 2 * 4
    assert result.margins.index.tolist() == list(range(24))
    assert result.margins.groupby(["epoch", "norm"], sort=False)["distance"].mean().tolist() == [1, 1, 2, 2, 11, 11]
    assert result.predictions.dtypes.astype(str).to_dict() == {
        name: str(kind) for name, kind in PREDICTION_TYPES.items()
    }
    assert result.predictions["epoch"].unique().tolist() == [0, 1, 10]
    assert len(result.predictions) == 9
    # from the predictions, not from the table next to them, which has no checksum
    rows = [{"epoch": epoch, "split": "test", "loss": 0.5, "error": 1 / 3, "seconds": 1.5} for epoch in (0, 1, 10)]
    pd.testing.assert_frame_equal(result.epochs, pd.DataFrame(rows), check_dtype=False)
    assert read_run(tmp_path / "mine", "other").name == "other"


def test_a_run_has_the_name_of_its_folder_for_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert read_run(Path()).name == "mine"


def test_a_run_that_has_just_started_is_empty_tables(tmp_path: Path) -> None:
    folder(tmp_path)
    result = read_run(tmp_path)
    assert (len(result.margins), list(result.margins.columns)) == (0, list(MARGIN_COLUMNS))
    assert (len(result.epochs), list(result.epochs.columns)) == (0, list(EPOCH_COLUMNS))
    assert (len(result.predictions), list(result.predictions.columns)) == (0, list(PREDICTION_TYPES))


def test_a_run_of_the_tracker_has_no_training_options(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    made.write_manifest({"schema": 1, "fingerprint": {"domain": "box"}, "estimators": []})
    result = read_run(tmp_path)
    assert (result.config, result.training, result.seed) == ({}, "", None)
    # it has no options, so it is not comparable with another run
    assert result.alike(but=()) == ""


def test_a_missing_folder_or_manifest_gives_a_one_line_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(StoreError) as error:
            read_run(path)
        assert "without manifest.json" in one_line(error)
        assert str(path) in str(error.value)


def test_damaged_manifests_are_errors(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.manifest.write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="expected a run's manifest"):
        read_run(tmp_path)
    made.manifest.write_text(json.dumps({"schema": 99}), encoding="utf-8")
    with pytest.raises(StoreError, match="expected schema 2"):
        read_run(tmp_path)


@pytest.mark.parametrize("kind", ["margins", "predictions"])
def test_damaged_parts_are_named(tmp_path: Path, kind: str) -> None:
    made = filled(tmp_path)
    part = made.margins(1, Unit("deepfool", "l2")) if kind == "margins" else made.predictions(1)
    whole = part.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:40] + bytes(60) + whole[100:]):
        part.write_bytes(content)
        with pytest.raises(StoreError) as error:
            read_run(tmp_path)
        assert str(part) in one_line(error)


def test_unfinished_parts_are_not_read(tmp_path: Path) -> None:
    made = filled(tmp_path)
    part = made.margins(1, Unit("deepfool", "l2"))
    part.with_name(f".{part.name}.123.tmp").write_bytes(b"half")
    part.with_name(f".{part.name}").write_bytes(b"half")
    assert len(read_run(tmp_path).margins) == 24


@pytest.mark.parametrize("text", ["", "epoch,split\n0,train\n", '"'])
def test_a_damaged_table_of_epochs_gives_a_one_line_error(tmp_path: Path, text: str) -> None:
    made = filled(tmp_path)
    made.epochs_csv.write_text(text, encoding="utf-8")
    assert len(read_run(tmp_path).epochs) == 3  # of the predictions
    for part in made.prediction_parts():
        part.unlink()
    with pytest.raises(StoreError) as error:
        read_run(tmp_path)
    assert str(made.epochs_csv) in one_line(error)


def test_bytes_that_are_not_text_give_an_error(tmp_path: Path) -> None:
    made = filled(tmp_path)
    made.epochs_csv.write_bytes(b"\xff\xfe\x00epoch")
    for part in made.prediction_parts():
        part.unlink()
    with pytest.raises(StoreError):
        read_run(tmp_path)


def test_runs_are_alike_in_all_options_but_the_named_ones() -> None:
    one, other = run("a", seed=0, batch_size=32), run("b", seed=1, batch_size=32)
    assert one.alike(but=("seed",)) == other.alike(but=("seed",)) != ""
    assert one.alike(but=()) != other.alike(but=())
    assert one.alike(but=("seed",)) != run("c", seed=1, batch_size=64).alike(but=("seed",))


def test_parameters_are_those_of_the_manifest() -> None:
    result = run("a", seed=0)
    assert result.parameters == {"deepfool": '{"steps": 50}', "fmn": '{"steps": 50}'}
    silent = Run("b", RunFolder(Path("b")), {"schema": 1}, result.margins, result.epochs, result.predictions)
    assert silent.parameters == {}


# as in a part of another program


def test_a_part_without_its_columns_or_epoch_is_named(tmp_path: Path) -> None:
    made = filled(tmp_path)
    part = made.predictions(1)
    table = predictions_of(np.array([[True]])).drop(columns=["epoch", "confidence"])
    for facts in ({}, {"epoch": "1"}):
        write_part(part, table, **facts)
        with pytest.raises(StoreError) as error:
            read_run(tmp_path)
        assert str(part) in one_line(error)


FORMULAS = pd.DataFrame(
    {
        "text": ["=1+1", "+a", "-a", "@x", "\tx", "'=x", "ok", "'ok", "-0.5", "a,b"],
        "number": [-1.5, 2.0, -math.inf, math.nan, 0.0, -1e-9, 1.0, 2.0, 3.0, -4.0],
    }
)


def test_csv_texts_are_never_formulas_and_are_read_back_unchanged(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", FORMULAS)
    lines = (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()
    assert lines == [
        *("text,number", "'=1+1,-1.5", "'+a,2.0", "'-a,-inf", "'@x,", "'\tx,0.0", "''=x,-1e-09", "ok,1.0", "'ok,2.0"),
        *("-0.5,3.0", '"a,b",-4.0'),
    ]
    pd.testing.assert_frame_equal(from_csv(tmp_path / "table.csv"), FORMULAS)


def test_a_split_named_like_a_formula_is_read_back_from_epochs_csv(tmp_path: Path) -> None:
    images = torch.rand(4, 1, 2, 2)
    tracker = MarginTracker(tmp_path, {"=1+1": (images, torch.tensor([0, 1, 0, 1]))}, ["linear"], ["l2"])
    torch.manual_seed(0)
    tracker.update(0, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert tracker.folder.summary_csv.read_text(encoding="utf-8").splitlines()[1].startswith("0,'=1+1,all,linear,l2,")
    rows = pd.DataFrame({"epoch": [0], "split": ["=1+1"], "loss": [0.5], "error": [0.25], "seconds": [1.0]})
    write_csv(tracker.folder.epochs_csv, rows)
    pd.testing.assert_frame_equal(read_run(tmp_path).epochs, rows)


@pytest.mark.skipif(sys.platform == "win32", reason="names are texts there")
def test_a_folder_name_that_is_not_text_gives_a_one_line_error(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    images = torch.rand(4, 1, 2, 2)
    with pytest.raises(StoreError, match=r"expected a folder whose path is UTF-8, got '.*/a\\udcff'; choose") as caught:
        MarginTracker(place, {"test": (images, torch.tensor([0, 1, 0, 1]))}, ["linear"], ["l2"])
    one_line(caught)
    assert not place.exists()
