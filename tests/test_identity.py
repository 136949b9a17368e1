"""Files of a run match their names: misplaced files, other names, older versions, revisions, pipes."""

import dataclasses
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from attacks.estimator import Settings, revision_of
from attacks.estimators.best import Best
from attacks.estimators.deepfool import DeepFool
from attacks.estimators.linear import Linear
from attacks.polish import Polished
from attacks.registry import create
from attacks.types import EstimatorError
from harness.compare import main as compare
from harness.report.__main__ import main as report
from harness.runs import read_run
from harness.store import RunFolder, Unit, tables, tensors
from harness.store.identity import StoreError
from harness.store.places import place_of
from harness.tracking.finished_run import options_of
from harness.tracking.manifest import describe
from harness.tracking.tracker import MarginTracker
from tests.runs import ONE_LINE, state
from tests.simulate import predictions_of

UNIT = Unit("linear", "l2")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def probes() -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return {name: (torch.rand(6, 1, 4, 4, generator=draw), torch.arange(6) % 3) for name in ("train", "test")}


def tracker(path: Path, estimators: tuple[object, ...] = ("linear",), **options: object) -> MarginTracker:
    return MarginTracker(path, probes(), estimators, **options)  # type: ignore[arg-type]


def filled(path: Path, **options: object) -> RunFolder:
    """Three epochs with a file of every kind."""
    made = tracker(path, certifiers=("ibp",), certify_every=1, **options)
    folder = made.folder
    for epoch in range(3):
        made.update(epoch, network(epoch))
        folder.save_checkpoint(epoch, network(epoch))
        folder.save_trainer(epoch, {"epoch": epoch, "optimizer": {}})
        table = predictions_of(torch.ones(4, 1).bool().numpy()).drop(columns="epoch").assign(loss=0.5)
        folder.write_part(folder.predictions(epoch), table, seconds="1.0")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return filled(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(whole.path, tmp_path / "renamed")
    return RunFolder(tmp_path / "renamed")


def line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert ONE_LINE.fullmatch(str(error.value)), str(error.value)
    return str(error.value)


# misplaced files

PLACES = {
    "another norm": (
        "margins/epoch-001/linear.l2.parquet",
        "margins/epoch-001/linear.linf.parquet",
        "unit linear linf",
    ),
    "margins": ("margins/epoch-001/linear.l2.parquet", "margins/epoch-002/linear.l2.parquet", "epoch 2"),
    "bounds": ("bounds/epoch-001/ibp.l2.parquet", "bounds/epoch-002/ibp.l2.parquet", "epoch 2"),
    "bounds as margins": ("bounds/epoch-001/ibp.l2.parquet", "margins/epoch-001/ibp.l2.parquet", "kind margins"),
    "predictions": ("predictions/epoch-001.parquet", "predictions/epoch-002.parquet", "epoch 2"),
    "witnesses": ("witnesses/epoch-001/linear.l2.safetensors", "witnesses/epoch-002/linear.l2.safetensors", "epoch 2"),
    "checkpoint": ("checkpoints/epoch-001.safetensors", "checkpoints/epoch-002.safetensors", "epoch 2"),
    "trainer": ("checkpoints/epoch-001.trainer.pt", "checkpoints/epoch-002.trainer.pt", "epoch 2"),
    "probes": ("probes/test.safetensors", "probes/train.safetensors", "split train"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_misplaced_file_is_refused_by_every_reader(run: RunFolder, name: str) -> None:
    source, target, wanted = PLACES[name]
    shutil.copy(run.path / source, run.path / target)
    before = state(run.path)
    for act in (
        lambda: read_run(run.path),
        lambda: run.start(run.read_manifest(), resume=True),
        lambda: tracker(run.path).update(2, network(2)),
    ):
        with pytest.raises(StoreError) as error:
            act()
        assert f"expected {wanted} at {run.path / target}, got " in line(error)
        assert state(run.path) == before


def test_a_misplaced_file_ends_the_commands_with_1(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run.margins(1, UNIT), run.margins(2, UNIT))
    before = state(run.path)
    for command in (report, compare):
        assert command([str(run.path)]) == 1
        error = capsys.readouterr().err
        assert error.endswith(
            f"expected epoch 2 at {run.margins(2, UNIT)}, got epoch 1; put the right file there, "
            "or delete it and --resume\n"
        )
        assert error.count("\n") == 1
    assert state(run.path) == before


def test_readers_of_single_files_check_the_place(run: RunFolder) -> None:
    shutil.copy(run.checkpoint(1), run.checkpoint(2))
    shutil.copy(run.trainer(1), run.trainer(2))
    shutil.copy(run.witnesses(1, UNIT), run.witnesses(2, UNIT))
    model = network(7)
    before = tensors.weights_checksum(model)
    for act in (
        lambda: run.load_checkpoint(2, model),
        lambda: run.load_trainer(2),
        lambda: run.load_tensors(run.witnesses(2, UNIT)),
    ):
        with pytest.raises(StoreError, match=r"expected epoch 2 at .*, got epoch 1; "):
            act()
    assert tensors.weights_checksum(model) == before


def test_a_part_of_another_run_is_refused_and_a_copied_run_is_the_same(run: RunFolder, tmp_path: Path) -> None:
    assert len(read_run(run.path).margins) == 72
    other = filled(tmp_path / "other", noise_retries=1)
    for path in (run.margins(1, UNIT), run.witnesses(1, UNIT), run.checkpoint(1), run.probes("test")):
        kept = path.read_bytes()
        shutil.copy(other.path / path.relative_to(run.path), path)
        with pytest.raises(StoreError) as error:
            read_run(run.path)
        assert f"expected run {run.digest[:12]} at {path}, got run {other.digest[:12]}; " in line(error)
        path.write_bytes(kept)


def test_equal_options_written_differently_are_the_same_run(tmp_path: Path) -> None:
    first = tracker(tmp_path / "run", bounds=(0, 1))
    first.update(0, network())
    second = tracker(tmp_path / "run", bounds=(0.0, 1.0))
    second.update(1, network(1))
    assert first.folder.digest == RunFolder(tmp_path / "run").digest
    assert read_run(tmp_path / "run").margins["epoch"].unique().tolist() == [0, 1]


def test_the_checksum_of_a_file_covers_its_metadata(run: RunFolder) -> None:
    for path, read in (
        (run.checkpoint(1), lambda: run.load_checkpoint(1, network())),
        (run.witnesses(1, UNIT), lambda: run.load_tensors(run.witnesses(1, UNIT))),
    ):
        raw = path.read_bytes()
        assert raw.count(b"epoch") == 1
        path.write_bytes(raw.replace(b"epoch", b"epock"))
        with pytest.raises(StoreError):
            read()
    _, facts = run.read_part(run.margins(1, UNIT))
    assert {name: facts[name] for name in ("kind", "epoch", "unit", "run", "revision")} == {
        "kind": "margins",
        "epoch": "1",
        "unit": "linear l2",
        "run": run.digest,
        "revision": "1",
    }


# names


@pytest.mark.parametrize(
    "name",
    [
        "margins/epoch-001/linear.l2 (conflicted copy).parquet",
        pytest.param("margins/epoch-001/linear.l1.parquet", marks=pytest.mark.slow),
        pytest.param("margins/epoch-0001/linear.l2.parquet", marks=pytest.mark.slow),
        pytest.param("margins/epoch-1/linear.l2.parquet", marks=pytest.mark.slow),
        pytest.param("margins/linear.l2.parquet", marks=pytest.mark.slow),
        pytest.param("bounds/epoch-001 (copy)/ibp.l2.parquet", marks=pytest.mark.slow),
        pytest.param("predictions/epoch-0001.parquet", marks=pytest.mark.slow),
        "predictions/epoch-001 2.parquet",
        "witnesses/epoch-001/linear.l2 copy.safetensors",
        "checkpoints/epoch-best.safetensors",
        pytest.param("checkpoints/epoch-0001.safetensors", marks=pytest.mark.slow),
        pytest.param("probes/a b.safetensors", marks=pytest.mark.slow),
    ],
)
def test_files_with_other_names_are_skipped_with_one_warning(run: RunFolder, name: str) -> None:
    kinds = {"margins": run.margins(1, UNIT), "bounds": run.bounds(1, Unit("ibp", "l2")), "probes": run.probes("test")}
    kinds |= {"predictions": run.predictions(1), "witnesses": run.witnesses(1, UNIT), "checkpoints": run.checkpoint(1)}
    whole = read_run(run.path)
    (run.path / name).parent.mkdir(exist_ok=True)
    shutil.copy(kinds[name.partition("/")[0]], run.path / name)
    result = read_run(run.path)
    # a folder with another name is reported as such
    shown = name.rpartition("/")[0] if "epoch-0001/" in name or "epoch-1/" in name or " (copy)/" in name else name
    message = f"{run.path}: {shown} left out: not the name of a file of a run"
    assert (whole.remarks, result.remarks) == ((), (message,))
    for table in ("margins", "bounds", "predictions", "epochs"):
        pd.testing.assert_frame_equal(getattr(result, table), getattr(whole, table))
    with pytest.warns(UserWarning, match="left out") as warned:
        tracker(run.path).update(2, network(2))
    assert [str(warning.message) for warning in warned] == [message]


@pytest.mark.slow
def test_the_commands_report_skipped_files(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    shutil.copy(run.margins(1, UNIT), run.margins(1, UNIT).with_stem("linear.l2 (conflicted copy)"))
    message = "margins/epoch-001/linear.l2 (conflicted copy).parquet left out: not the name of a file of a run\n"
    for command in (report, compare):
        assert command([str(run.path)]) == 0
        assert capsys.readouterr().out.count(message) == 1


def test_epochs_beyond_999_have_four_digits() -> None:
    for name, epoch in (("epoch-000", 0), ("epoch-999", 999), ("epoch-1000", 1000), ("epoch-12345", 12345)):
        place = place_of(("predictions", f"{name}.parquet"))
        assert place is not None
        assert place.epoch == epoch
    for name in (
        "epoch-0001",
        "epoch-1",
        "epoch-01000",
        "epoch-",
        "epoch-00a",
        "epoch-\u0661\u0662\u0663",
        "Epoch-001",
    ):
        assert place_of(("predictions", f"{name}.parquet")) is None


# version 0.1.0


def write_as_version_0_1_0(path: Path) -> None:
    """Write a file in the format of version 0.1.0."""
    if path.suffix == ".parquet":
        rows, facts = tables.read_part(path)
        tables.write_part(path, rows, **{n: v for n, v in facts.items() if n in tables.FACTS and n != "epoch"})
        return
    with safe_open(str(path), framework="pt") as handle:
        content = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    tensors.save_tensors(path, content)


def test_files_of_earlier_versions_are_accepted_with_one_warning(run: RunFolder) -> None:
    parts = [*run.margin_parts(), *run.bound_parts(), *run.witness_files()]
    for path in parts:
        write_as_version_0_1_0(path)
    message = (
        f"{run.path}: files of version 0.1.0, such as linear.l2.parquet, do not record their "
        "identity; their names are trusted"
    )
    result = read_run(run.path)
    assert (len(result.margins), result.remarks) == (72, (message,))
    again = tracker(run.path)
    with pytest.warns(UserWarning, match=r"0\.1\.0") as warned:
        again.update(0, network(0))
    for epoch in (1, 2, 3):
        again.update(epoch, network(epoch))
    assert [str(warning.message) for warning in warned] == [message]
    # their rows hold their epoch, estimator and norm
    for other, wanted in ((run.margins(1, Unit("linear", "linf")), "norm linf"), (run.margins(2, UNIT), "epoch 2")):
        kept = other.read_bytes()
        shutil.copy(run.margins(1, UNIT), other)
        with pytest.raises(StoreError, match=f"expected {wanted} in the rows of"):
            read_run(run.path)
        other.write_bytes(kept)


# rows


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("norm", "l7", "expected norm l2 in the rows of {}, got norm l7; delete it and --resume"),
        ("epoch", 2, "expected epoch 1 in the rows of {}, got epoch 2; delete it and --resume"),
        ("status", "lost", "expected status of found, found_after_noise, tied, not_found, failed in the rows of {}, "),
        ("distance", float("nan"), "expected distance of at least 0 in the rows of {}, got distance nan; delete"),
        ("attack_distance", -1.0, "expected attack_distance of at least 0 in the rows of {}, got attack_distance -1"),
        ("domain", "ball", "expected domain of box, free in the rows of {}, got domain ball; delete it and --resume"),
        ("image", 0, "expected every image once in the rows of {}, got image 0; delete it and --resume"),
        ("image", 0.5, "expected the types of a part's columns at {}, got float64 as image; delete it and --resume"),
        ("status", 1, "expected the types of a part's columns at {}, got int64 as status; delete it and --resume"),
    ],
)
def test_impossible_rows_give_a_one_line_error(
    run: RunFolder, column: str, value: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.margins(1, UNIT)
    rows, facts = run.read_part(path)
    tables.write_part(path, rows.assign(**{column: value}), **facts)
    with pytest.raises(StoreError) as error:
        read_run(run.path)
    assert said.format(path) in line(error)
    assert report([str(run.path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# probes and certifiers in the manifest


def test_probes_and_certifiers_are_in_the_manifest_but_not_in_the_fingerprint(run: RunFolder) -> None:
    manifest = run.read_manifest()
    assert manifest["probes"] == manifest["fingerprint"]["probes"]
    assert [(e["estimator"], e["revision"], e["every"], e["probe"]) for e in manifest["certifiers"]] == [
        ("ibp", 2, 1, 100)
    ]
    assert "certifiers" not in manifest["fingerprint"]
    assert [entry["revision"] for entry in manifest["estimators"]] == [1]


def test_probes_that_differ_from_the_manifest_are_refused(run: RunFolder) -> None:
    tensors = run.load_tensors(run.probes("test"))
    run.save_tensors(run.probes("test"), tensors | {"images": 1 - tensors["images"]})
    with pytest.raises(
        StoreError, match=r"checksum mismatch in .*: not the probe images of test that .*; restore the file"
    ):
        tracker(run.path).update(2, network(2))
    manifest = run.read_manifest()
    with pytest.raises(StoreError, match=r"expected the probe images of test that the run has, .*, got other; use"):
        run.start(manifest | {"probes": {"test": "other"}}, resume=True)


# edited manifests

EDITS: dict[str, object] = {
    "estimators": "linear",
    "certifiers": [{"name": "ibp"}],
    "fingerprint": [1],
    "bounds": [1],
    "probes": {"test": 3},
    "config": 5,
    "seed": "one",
    "digest": 5,
    "classes": "ten",
    "notes": None,
    "command": {"a": 1},
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_gives_a_one_line_error(
    run: RunFolder, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run.read_manifest()
    inside = {"bounds": "fingerprint", "seed": "config"}.get(name)
    changed = {inside: manifest.get(inside, {}) | {name: EDITS[name]}} if inside else {name: EDITS[name]}
    run.manifest.write_text(json.dumps(manifest | changed | {"schema": 1}), encoding="utf-8")
    before = state(run.path)
    message = f"expected {name} in {run.manifest} as a run writes it, got a value of another type or without a key; "
    for act in (lambda: read_run(run.path), lambda: tracker(run.path).update(0, network())):
        with pytest.raises(StoreError) as error:
            act()
        assert line(error) == message + "restore it"
    assert report([str(run.path)]) == 1
    assert capsys.readouterr().err == f"report: error: {message}restore it\n"
    assert state(run.path) == before


def test_options_that_are_missing_or_of_another_type_are_named(run: RunFolder) -> None:
    config = {"model": "cnn", "norm": ["l2"], "domain": "box", "noise_retries": 6, "measure_batch": 8, "seed": 0}
    for changes, got in (({"norm": 5}, "norm"), ({"noise_retries": "six"}, "noise"), ({"domain": "ball"}, "domain")):
        changed_run = dataclasses.replace(read_run(run.path), manifest={"config": config | changes})
        with pytest.raises(StoreError, match=rf"expected the options of a run in .*manifest.json, got .*{got}"):
            options_of(changed_run)
    del config["measure_batch"]
    changed_run = dataclasses.replace(read_run(run.path), manifest={"config": config})
    with pytest.raises(StoreError, match=r"got none of measure_batch; restore it"):
        options_of(changed_run)


# revisions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Second(Linear):
    """`Linear` with changed results, as another revision."""

    revision: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign(Settings):
    name: ClassVar[str] = "foreign"


def test_a_run_refuses_to_extend_units_of_another_revision(run: RunFolder) -> None:
    before = state(run.path)
    with pytest.raises(StoreError) as error:
        tracker(run.path, (Second(),)).update(3, network(3))
    assert line(error) == (
        f"expected `linear` revision 2, got 1 in {run.path}; measure into a new run or remove its units"
    )
    assert state(run.path) == before
    assert len(read_run(run.path).margins) == 72
    # another estimator may be added, and a new run started
    tracker(run.path, ("deepfool:steps=2",)).update(0, network(0))
    for path in run.margin_parts():
        if path.name.startswith("linear."):
            path.unlink()
    tracker(run.path, (Second(),)).update(3, network(3))
    entries = {entry["estimator"]: entry["revision"] for entry in run.read_manifest()["estimators"]}
    assert entries == {"linear": 2, "deepfool:steps=2": 1}
    assert run.read_part(run.margins(3, UNIT))[1]["revision"] == "2"
    with pytest.raises(StoreError, match=r"expected `linear` revision 1, got 2 in "):
        tracker(run.path).update(4, network(4))


@pytest.mark.slow
def test_a_revision_covers_every_part_of_an_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [revision_of(one) for one in (Linear(), Second(), Polished(inner=Second()), Foreign(), object())] == [
        *(1, 2, 2, 1, 1)
    ]
    assert (revision_of(Best()), revision_of(create("best:of=linear+deepfool"))) == (1, 1)
    monkeypatch.setattr(DeepFool, "revision", 3)
    assert (revision_of(Best()), revision_of(Best(of="linear+deepfool")), revision_of(Best(of="linear"))) == (3, 3, 1)
    monkeypatch.setattr("attacks.polish.REVISION", 2)
    assert (revision_of(Best(of="linear")), revision_of(Best(of="linear", polish=False))) == (2, 1)
    assert describe({"deepfool": DeepFool()})[0]["revision"] == 3


# invalid file names


@pytest.mark.slow
def test_an_estimator_whose_text_is_no_file_name_is_refused_before_measuring(tmp_path: Path) -> None:
    text = "best:of=" + "+".join(f"fmn:steps={steps}/gamma=0.1" for steps in range(100, 112))
    with pytest.raises(EstimatorError) as error:
        tracker(tmp_path / "run", (text,)).update(0, network())
    assert "expected an estimator whose text names a file, at most 200 bytes, got " in line(error)
    assert not (tmp_path / "run" / "manifest.json").exists()


# pipes, folders, oversized files, leftovers


def places(run: RunFolder) -> Iterator[Path]:
    yield from (run.manifest, run.margins(1, UNIT), run.bounds(1, Unit("ibp", "l2")), run.predictions(1))
    yield from (run.probes("test"), run.checkpoint(1), run.trainer(1), run.witnesses(1, UNIT))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_or_folder_in_place_of_a_file_gives_a_one_line_error(run: RunFolder, kind: str) -> None:
    for path in places(run):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
        with pytest.raises(StoreError) as error:
            read_run(run.path)
        assert line(error) == f"expected a file at {path}, got a {kind}; remove it and --resume"
        path.unlink() if kind == "pipe" else path.rmdir()
        path.write_bytes(kept)
    for part in run.prediction_parts():
        part.unlink()
    os.mkfifo(run.epochs_csv)
    with pytest.raises(StoreError, match=r"expected a file at .*epochs.csv, got a pipe; remove it"):
        read_run(run.path)


def test_a_part_of_very_many_rows_is_refused_unread(run: RunFolder) -> None:
    path = run.margins(1, UNIT)
    chunk = pa.table({"image": pa.nulls(500_000, pa.int64())})
    with pq.ParquetWriter(path, chunk.schema) as writer:
        for _ in range(tables.ROWS // 500_000 + 1):
            writer.write_table(chunk)
    assert path.stat().st_size < 100_000
    with pytest.raises(StoreError, match=rf"got ValueError: \d+ rows, more than {tables.ROWS}; delete it and --resume"):
        tables.read_part(path)


def test_a_header_of_very_many_tensors_is_refused_at_once(run: RunFolder) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    raw = ("{" + ",".join(f'"t{i}":{entry}' for i in range(300_000)) + "}").encode()
    path = run.witnesses(1, UNIT)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    shutil.copy(path, run.checkpoint(1))
    began = time.perf_counter()
    with pytest.raises(StoreError, match=r"expected at most 1000 tensors in .*, got a header of \d+ bytes; restore"):
        run.load_tensors(path)
    with pytest.raises(StoreError, match=r"expected at most 1004 tensors in .*, got a header of \d+ bytes; restore"):
        run.load_checkpoint(1, network())
    assert time.perf_counter() - began < 1


def test_temporary_files_of_safetensors_are_removed_from_our_folders_only(run: RunFolder) -> None:
    names = [f"{folder}/.tmpAb12Cd" for folder in ("checkpoints", "probes", "witnesses/epoch-001", "unsound", "shards")]
    mine = ["figures/.tmpAb12Cd", ".tmpAb12Cd", "checkpoints/.tmpfile", "checkpoints/.tmpAb12Cde", "witnesses/tmpAb12C"]
    for name in (*names, *mine):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(b"half")
    with run.locked():
        pass
    assert not any((run.path / name).exists() for name in names)
    assert all((run.path / name).exists() for name in mine)


# listing


@pytest.mark.slow
def test_a_locked_run_is_listed_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    real = os.listdir

    def counted(path: str) -> list[str]:
        listed.append(str(path))
        return real(path)

    monkeypatch.setattr("harness.store.places.os.listdir", counted)
    with run.locked():
        made = MarginTracker(run, probes(), ("linear",))
        made.update(3, network(3))
        before = len(listed)
        for epoch in range(4, 7):
            made.update(epoch, network(epoch))
        assert len(listed) == before
        assert run.measured_epochs(UNIT) == list(range(7))
        assert run.witness_epochs(UNIT) == list(range(7))
        run.drop(run.checkpoint(1))
        assert run.checkpoint_epochs() == [0, 2]
    assert run.checkpoint_epochs() == [0, 2]
    assert len(listed) > before
    assert read_run(run.path).margins["epoch"].nunique() == 7
