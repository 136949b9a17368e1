"""The run folder: parts are complete or absent, damage gives one-line errors, foreign runs are unchanged."""

import dataclasses
import json
import math
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.config.run_config import RunConfig, digest, resolve
from harness.store import RunFolder, Unit, files, tables, tensors
from harness.store import manifest as manifests
from harness.store.identity import StoreError
from tests.runs import ONE_LINE, contents, state


def error_line(act: Callable[..., object], *args: Any, **options: Any) -> str | None:
    """The one line of the `StoreError` that this raises, as the command prints it; None if it raises none."""
    try:
        act(*args, **options)
    except StoreError as error:
        message = " ".join(str(error).split())
    else:
        return None
    assert ONE_LINE.fullmatch(message), message
    assert "\x1b" not in message
    return message


def refused(act: Callable[..., object], *args: Any, **options: Any) -> str:
    message = error_line(act, *args, **options)
    assert message is not None
    return message


# atomic writes


class Planned(Exception):
    """Raised deliberately by a writer."""


def failing(path: Path) -> None:
    path.write_bytes(b"half")
    raise Planned


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "part"
    with pytest.raises(Planned):
        files.write_atomically(path, failing)
    assert contents(tmp_path) == {}
    files.write_atomically(path, lambda temporary: temporary.write_bytes(b"whole"))
    with pytest.raises(Planned):
        files.write_atomically(path, failing)
    assert list(contents(tmp_path)) == ["deep/part"]
    assert path.read_bytes() == b"whole"
    files.write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    assert list(contents(tmp_path)) == ["deep/part"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"old")

    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(contents(tmp_path)) == ["part"]


def test_a_part_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "part", []
    sync, rename = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        seen.append(("sync", path.exists()))
        sync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        seen.append(("rename", path.exists()))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    files.write_atomically(path, lambda temporary: temporary.write_bytes(b"whole"))
    # the file, its name, then the folder
    assert seen == [("sync", False), ("rename", False), ("sync", True)]


# parts


def table() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "image": np.arange(40),
            "distance": np.r_[draw.random(38), math.inf, 0.0],
            "correct": draw.random(40) < 0.5,
            "status": ["found"] * 38 + ["not_found", "tied"],
            "message": [""] * 39 + ["ValueError: über"],
        }
    )


def test_a_part_keeps_every_value_type_and_fact(tmp_path: Path) -> None:
    path = tmp_path / "margins" / "part.parquet"
    tables.write_part(path, table(), weights="abc", epoch="3")
    rows, facts = tables.read_part(path)
    pd.testing.assert_frame_equal(rows, table(), check_exact=True)
    assert (facts["weights"], facts["epoch"]) == ("abc", "3")
    assert rows["distance"].dtype == np.float64
    assert rows["correct"].dtype == bool
    # also for a reader without this package
    assert pq.read_table(path).column_names == list(table().columns)
    assert list(contents(tmp_path)) == ["margins/part.parquet"]


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def test_a_damaged_part_gives_a_one_line_error_or_unchanged_numbers(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    tables.write_part(path, table(), weights="abc")
    raw, draw, refusals = path.read_bytes(), random.Random(0), 0
    pages = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")  # the rest describes them
    for position in range(0, pages, 9):
        flip(path, position, draw.randrange(8))
        message = error_line(tables.read_part, path)
        if message is None:
            # a byte that does not affect the numbers, such as an unread statistic
            pd.testing.assert_frame_equal(tables.read_part(path)[0], table(), check_exact=True)
        else:
            refusals += 1
            assert str(path) in message
        path.write_bytes(raw)
    assert refusals > pages / 9 / 2
    for position in range(pages, len(raw), 31):
        flip(path, position, draw.randrange(8))
        error_line(tables.read_part, path)
        path.write_bytes(raw)
    tables.read_part(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a part at all" * 9])
def test_a_file_that_is_not_a_part_gives_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(content)
    assert f"expected a Parquet part at {path}, got " in refused(tables.read_part, path)
    assert "FileNotFoundError" in refused(tables.read_part, tmp_path / "none.parquet")


def test_a_table_is_blank_where_a_statistic_is_undefined(tmp_path: Path) -> None:
    tables.write_csv(tmp_path / "t.csv", pd.DataFrame({"avg": [0.5, math.nan], "q95": [math.inf, 1.0]}))
    assert (tmp_path / "t.csv").read_text() == "avg,q95\n0.5,inf\n,1.0\n"


def test_concatenating_nothing_keeps_the_columns() -> None:
    assert list(tables.concatenate([], ["a", "b"]).columns) == ["a", "b"]
    empty = pd.DataFrame({"a": []})
    joined = tables.concatenate([empty, pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [2]})], ["a"])
    assert joined["a"].tolist() == [1, 2]
    assert list(joined.index) == [0, 1]


# names

TEXTS = [
    "deepfool",
    "fmn:steps=200",
    "fmn:steps=2",
    "a/b",
    "a\\b",
    "a%2Fb",
    "a:b",
    "a%3Ab",
    "a b",
    "a*b?",
    "[!.]*",
    "a/../up",
    "ü",
    "a.l2",
]


def test_filenames_are_safe_and_distinct(tmp_path: Path) -> None:
    units = [Unit(text, norm) for text in TEXTS for norm in ("l2", "linf")]
    names = [unit.filename for unit in units]
    assert len(set(names)) == len(units)
    folder = RunFolder(tmp_path)
    for unit in units:
        assert all(char not in unit.filename for char in '/\\:*?"<>|[] '), unit
        path = folder.margins(0, unit)
        assert path.parent == tmp_path / "margins" / "epoch-000"
        files.write_atomically(path, lambda temporary: temporary.write_bytes(b"x"))
        files.write_atomically(folder.witnesses(7, unit), lambda temporary: temporary.write_bytes(b"x"))
    assert len(folder.margin_parts()) == len(units)
    assert all(folder.witness_epochs(unit) == [7] for unit in units)
    assert Unit("fmn:steps=200", "l2").filename == "fmn%3Asteps=200.l2"
    assert folder.probes("a/b").name == "a%2Fb.safetensors"


def test_parts_are_listed_by_epoch_also_beyond_three_digits(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    unit, epochs = Unit("deepfool", "l2"), [0, 1, 2, 10, 999, 1000, 12345]
    for epoch in reversed(epochs):
        for path in (folder.margins(epoch, unit), folder.predictions(epoch), folder.witnesses(epoch, unit)):
            files.write_atomically(path, lambda temporary: temporary.write_bytes(b"x"))
    (folder.margins(3, unit).parent).mkdir()
    (folder.margins(3, unit).parent / f".{unit.filename}.parquet.99.tmp").write_bytes(b"half")
    assert folder.margin_parts() == [folder.margins(epoch, unit) for epoch in epochs]
    assert folder.prediction_parts() == [folder.predictions(epoch) for epoch in epochs]
    assert folder.witness_epochs(unit) == epochs
    assert folder.margins(7, unit).parent.name == "epoch-007"


# manifest and start


def manifest(**changes: Any) -> dict[str, Any]:
    config = resolve(dataclasses.replace(RunConfig(), **changes))
    entries = [{"estimator": text, "name": text, "parameters": {}} for text in config.estimator]
    fingerprint = config.fingerprint | {"data": {"images": "abc"}}
    return {"fingerprint": fingerprint, "digest": digest(fingerprint), "estimators": entries, "epochs": config.epochs}


def test_a_run_starts_in_a_new_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "new", tmp_path / "empty"):
        for resume in (False, True):
            folder = RunFolder(path)
            assert not folder.exists()
            folder.start(manifest(), resume=resume)
            assert folder.exists()
            written = folder.read_manifest()
            assert written["schema"] == 2
            assert written["created"].endswith("+00:00")
            assert {**manifest(), "schema": 2, "created": written["created"]} == written
            assert list(contents(path)) == ["manifest.json"]
            folder.manifest.unlink()


def test_a_foreign_folder_is_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = state(tmp_path)
    for name in ("thesis", "file"):
        for resume in (False, True):
            message = refused(RunFolder(tmp_path / name).start, manifest(), resume=resume)
            assert f"expected a new or empty folder, got {tmp_path / name}" in message
    message = refused(RunFolder(tmp_path / "file" / "below").start, manifest(), resume=False)
    assert f"expected a folder that can be written at {tmp_path / 'file' / 'below'}, got " in message
    assert state(tmp_path) == before


def test_a_run_needs_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(manifest(), resume=False)
    before = state(tmp_path)
    assert "add --resume" in refused(folder.start, manifest(), resume=False)
    assert state(tmp_path) == before
    folder.start(manifest(), resume=True)
    assert folder.read_manifest()["resumed"].endswith("+00:00")
    assert state(tmp_path) != before


def test_another_configuration_names_the_fields_and_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(manifest(), resume=False)
    tables.write_part(folder.margins(0, Unit("deepfool", "l2")), table(), weights="abc")
    before = state(tmp_path)
    message = refused(folder.start, manifest(seed=3, weight_decay=0.5, epochs=3), resume=True)
    assert message == (
        f"expected the options of the run in {folder.path}, got weight_decay 0.5 (the run has 0.0), "
        "seed 3 (the run has 0); use them or another folder"
    )
    data = manifest()
    data["fingerprint"]["data"] = {"images": "xyz"}
    message = refused(folder.start, data, resume=True)
    assert "got data {'images': 'xyz'} (the run has {'images': 'abc'}); " in message
    more = manifest()
    more["fingerprint"]["new"] = 1
    assert "got new 1 (the run has None); " in refused(folder.start, more, resume=True)
    assert state(tmp_path) == before


def test_estimators_norms_and_epochs_may_grow(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(manifest(norm=("l2",), epochs=2), resume=False)
    created = folder.read_manifest()["created"]
    folder.start(manifest(estimator=("fmn",), norm=("l2", "linf"), epochs=5), resume=True)
    written = folder.read_manifest()
    # deepfool's parts still exist, and so do their settings in the manifest
    assert [entry["estimator"] for entry in written["estimators"]] == ["deepfool", "fmn"]
    assert (written["epochs"], written["created"]) == (5, created)
    folder.start(manifest(estimator=("fmn", "deepfool"), epochs=5), resume=True)
    assert [entry["estimator"] for entry in folder.read_manifest()["estimators"]] == ["deepfool", "fmn"]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "No such file"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[]", "list"),
        (b'{"schema": 3}', "3"),
        (b'{"created": "x"}', "None"),
    ],
)
def test_an_unusable_manifest_gives_a_one_line_error(tmp_path: Path, content: bytes | None, got: str) -> None:
    folder = RunFolder(tmp_path)
    if content is not None:
        folder.manifest.write_bytes(content)
    before = state(tmp_path)
    message = refused(folder.read_manifest)
    assert str(folder.manifest) in message
    assert got in message.partition(", got ")[2]
    if content is not None:
        refused(folder.start, manifest(), resume=True)
    assert state(tmp_path) == before


def test_the_environment_names_versions_machine_and_command() -> None:
    facts = json.loads(json.dumps(manifests.environment(threads=3)))
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert set(manifests.LIBRARIES) | {"python"} <= set(facts["versions"])
    assert facts["machine"]["threads"] == 3
    assert facts["machine"]["cores"] == os.cpu_count()
    assert facts["command"]


# weights and checkpoints


class Tied(nn.Module):
    """Two layers with one weight, a buffer, batch norm and a buffer that is not saved."""

    shift: Tensor
    scratch: Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                nn.init.normal_(tensor)


def test_any_single_bit_of_any_weight_changes_the_checksum() -> None:
    model = Tied()
    plain, draw = tensors.weights_checksum(model), random.Random(0)
    for name, value in model.state_dict().items():
        raw = value.flatten().view(torch.uint8).numpy()
        for position in (0, len(raw) - 1, draw.randrange(len(raw))):
            bit = np.uint8(1 << draw.randrange(8))
            raw[position] ^= bit
            assert tensors.weights_checksum(model) != plain, name
            raw[position] ^= bit
    assert tensors.weights_checksum(model) == plain


def test_names_shapes_and_types_are_in_the_checksum_and_the_layout_is_not() -> None:
    def single(name: str, value: Tensor) -> str:
        module = nn.Module()
        module.register_buffer(name, value)
        return tensors.weights_checksum(module)

    values = torch.arange(6.0)
    distinct = [
        single("a", values),
        single("b", values),
        single("a", values.view(2, 3)),
        single("a", values.view(3, 2)),
        single("a", values.view(torch.int32)),
        single("a", values.double()),
        single("a", values[:5]),
        single("a", -values),
        single("a", torch.empty(0)),
        single("a", torch.tensor(0.0)),
    ]
    assert len(set(distinct)) == len(distinct)
    assert single("a", values.view(2, 3).T.contiguous().T) == single("a", values.view(2, 3))
    assert single("a", torch.stack([values, values], 1)[:, 0]) == single("a", values)
    model = Tied()
    before = tensors.weights_checksum(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train().requires_grad_(False)
    assert tensors.weights_checksum(model) == before
    if torch.cuda.is_available():
        assert tensors.weights_checksum(model.to("cuda")) == before


def test_a_checkpoint_gives_every_parameter_and_buffer_back(tmp_path: Path) -> None:
    path, model = tmp_path / "c" / "epoch-003.safetensors", Tied()
    tensors.save_checkpoint(path, model, 3)
    other = Tied()
    assert tensors.weights_checksum(other) != tensors.weights_checksum(model)
    tensors.load_checkpoint(path, other)
    wanted, found = model.state_dict(), other.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert other.second.weight is other.first.weight
    # tied weights are stored once
    raw = path.read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    facts = names.pop("__metadata__")
    assert (facts["epoch"], facts["weights"]) == ("3", tensors.weights_checksum(model))
    assert sum(name.endswith(("first.weight", "second.weight")) for name in names) == 1
    assert "scratch" not in names


def test_any_damage_to_a_checkpoint_gives_a_one_line_error(tmp_path: Path) -> None:
    path, model = tmp_path / "epoch-003.safetensors", Tied()
    tensors.save_checkpoint(path, model, 3)
    raw, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    refusals = 0
    positions = [*range(0, header, 9), *range(header, len(raw), 7)]
    for position in positions:
        flip(path, position, draw.randrange(8))
        other = Tied()
        message = error_line(tensors.load_checkpoint, path, other)
        if message is None:
            # only metadata such as the epoch
            assert position < header
            assert tensors.weights_checksum(other) == tensors.weights_checksum(model)
        else:
            refusals += 1
            assert str(path) in message
        path.write_bytes(raw)
    assert refusals > 0.9 * len(positions)
    for length in (0, 7, header - 1, header, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert f"expected a checkpoint of this model at {path}, got " in refused(tensors.load_checkpoint, path, Tied())
    path.write_bytes(raw)
    tensors.load_checkpoint(path, Tied())


def test_a_missing_or_foreign_checkpoint_gives_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "epoch-000.safetensors"
    assert "No such file" in refused(tensors.load_checkpoint, path, Tied())
    for other in (nn.Linear(6, 6), Tied(width=7), nn.Sequential(Tied())):
        tensors.save_checkpoint(path, other, 0)
        assert f"expected a checkpoint of this model at {path}, got " in refused(tensors.load_checkpoint, path, Tied())
        tensors.load_checkpoint(path, other)
    # weights of this model, written by another program
    model = nn.Linear(2, 2)
    save_file(model.state_dict(), path)
    assert "the weights are damaged" in refused(tensors.load_checkpoint, path, model)


def test_tensors_round_trip_and_damage_gives_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "probes" / "train.safetensors"
    saved = {"images": torch.rand(3, 1, 4, 4).transpose(2, 3), "ids": torch.tensor([4, 1, 7]), "none": torch.empty(0)}
    tensors.save_tensors(path, saved)
    loaded = tensors.load_tensors(path)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) and loaded[key].dtype == saved[key].dtype for key in saved)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"expected tensors at {path}, got " in refused(tensors.load_tensors, path)
    assert "got " in refused(tensors.load_tensors, tmp_path / "none")


# a trainer's state


def trainer_state() -> dict[str, Any]:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return {"epoch": 3, "optimizer": optimizer.state_dict()}


def test_a_trainers_state_round_trips(tmp_path: Path) -> None:
    path, state_before = tmp_path / "epoch-003.trainer.pt", trainer_state()
    tensors.save_trainer(path, state_before)
    loaded = tensors.load_trainer(path)
    assert loaded["epoch"] == 3
    assert loaded["optimizer"]["param_groups"] == state_before["optimizer"]["param_groups"]
    for key, moments in state_before["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], loaded["optimizer"]["state"][key][name]) for name in moments)
    assert torch.load(path, weights_only=True)["epoch"] == 3


class Malicious:
    """A pickle that runs code when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "epoch-003.trainer.pt", tmp_path / "harm"
    for write in (
        lambda: torch.save({"epoch": 3, "optimizer": Malicious(target)}, path),
        lambda: path.write_bytes(pickle.dumps({"epoch": 3, "optimizer": Malicious(target)})),
    ):
        write()
        assert f"expected a trainer's state at {path}, got a damaged or foreign file; " in refused(
            tensors.load_trainer, path
        )
        assert not target.exists()
    # control: it runs code when unpickling is unrestricted
    pickle.loads(path.read_bytes())
    assert target.is_dir()


def test_any_damage_to_a_trainers_state_gives_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "epoch-003.trainer.pt"
    tensors.save_trainer(path, trainer_state())
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        places = [raw_start(path, entry) for entry in entries]
    raw = path.read_bytes()
    for entry, start in zip(entries, places, strict=True):
        for position in (start, start + entry.file_size - 1):
            flip(path, position, 3)
            assert "got a damaged or foreign file" in refused(tensors.load_trainer, path)
            path.write_bytes(raw)
    for content in (b"", raw[: len(raw) // 2], raw[:-1], b"no archive"):
        path.write_bytes(content)
        assert "got a damaged or foreign file" in refused(tensors.load_trainer, path)
    torch.save([1, 2], path)
    assert "got a damaged or foreign file" in refused(tensors.load_trainer, path)
    assert "No such file" in refused(tensors.load_trainer, tmp_path / "none.pt")
    path.write_bytes(raw)
    assert tensors.load_trainer(path)["epoch"] == 3


def raw_start(path: Path, entry: zipfile.ZipInfo) -> int:
    """The offset of the data of an archive entry: after its local header, name and extra field."""
    header = path.read_bytes()[entry.header_offset : entry.header_offset + 30]
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
