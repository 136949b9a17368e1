"""An interrupted run resumes to the same rows and the same network, and repeats no finished work."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import harness.tasks
import harness.tracking.training_run
from harness.data.builtin import load
from harness.data.dataset import Dataset, draw_probe
from harness.models.build import build
from harness.store import RunFolder, files, tables, tensors
from harness.store import folder as store
from harness.store.tables import read_part
from harness.store.tensors import weights_checksum
from harness.track import main
from harness.tracking.terminal import Terminal
from harness.training.objectives import TrainingOptions
from harness.training.trainer import Trainer, epochs
from tests.runs import contents, net, state

IMAGES = ["--train-images", "96", "--test-images", "40", "--device", "cpu"]
ESTIMATORS = ["--estimator", "deepfool:steps=5", "--estimator", "fmn:steps=10"]
# 20 images: more than the 16 witnesses that an epoch keeps once the next one exists
SMALL = ["--model", "tests.runs:net", *IMAGES, "--probe", "20", "--noise-retries", "1", *ESTIMATORS]
UNITS = 4


def run(folder: Path, *more: str) -> int:
    return main([*SMALL, "--out", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert run(folder, "--epochs", "2") == 0
    return folder


DRAWN = ("figures/", "report")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing, which takes most of the time of a resumed run; one slow test here and test_cli.py draw."""
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])


def copy_of(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder / "run")
    return folder / "run"


def all_rows(folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of every part and table without the seconds."""
    paths = [*RunFolder(folder).margin_parts(), *RunFolder(folder).prediction_parts()]
    rows = {str(path.relative_to(folder)): read_part(path)[0] for path in paths}
    rows |= {name: pd.read_csv(folder / name) for name in ("epochs.csv", "summary.csv")}
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in rows.items()}


def checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and metadata: safetensors writes the metadata in random order."""
    with safe_open(path, framework="pt") as handle:
        return {"facts": handle.metadata(), **load_file(path)}


def same_values(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_values(first[key], second[key]) for key in first)
    return bool(first == second)


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same files, the same rows, and bit for bit the same networks, optimizers, witnesses and probes."""
    ours, theirs = contents(folder), contents(whole)
    drawn = {name for name in theirs if name.startswith(DRAWN)}
    assert ours.keys() | drawn == theirs.keys()
    for name in theirs:
        if name.startswith("checkpoints/"):
            read = tensors.load_trainer if name.endswith(".trainer.pt") else checkpoint
            assert same_values(read(folder / name), read(whole / name)), name
        elif name.startswith(("witnesses/", "probes/")):
            assert ours[name] == theirs[name], name
    rows, wanted = all_rows(folder), all_rows(whole)
    assert rows.keys() == wanted.keys()
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(rows[name], table, check_exact=True, obj=name)


@contextmanager
def writing(act: Callable[[Path, Callable[[Path], object]], None]) -> Iterator[None]:
    """Replace the writing of files by ``act``."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, store, tables, tensors):
            patch.setattr(module, "write_atomically", act)
        yield


really_write = files.write_atomically


def half_written(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def write_and_stop(temporary: Path) -> None:
        write(temporary)
        raise KeyboardInterrupt

    return write_and_stop


# interrupts


@pytest.mark.slow
def test_a_run_interrupted_at_every_file_gives_the_same_result(tmp_path: Path, whole: Path) -> None:
    folder, stopped = tmp_path / "run", list[Path]()

    def stop_at_what_is_new(path: Path, write: Callable[[Path], object]) -> None:
        """Interrupt before the first file, after the second, before the third and so on, each once."""
        if path in stopped:
            really_write(path, write)
            return
        stopped.append(path)
        really_write(path, half_written(write) if len(stopped) % 2 else write)
        raise KeyboardInterrupt

    codes = []
    with writing(stop_at_what_is_new):
        while not codes or codes[-1] == 130:
            codes.append(run(folder, "--epochs", "2", "--resume"))
    files = {str(path.relative_to(folder)) for path in stopped}
    # every file of a run, and the state of epoch 0, which is deleted at the end
    expected = {name for name in contents(whole) if not name.startswith(DRAWN)}
    assert files == expected | {"checkpoints/epoch-000.trainer.pt"}
    assert codes == [130] * len(files) + [0]
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("count", "half"),
    [
        (3, True),
        pytest.param(10, False, marks=pytest.mark.slow),
        pytest.param(18, True, marks=pytest.mark.slow),
        pytest.param(33, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_once_gives_the_same_result(
    tmp_path: Path, whole: Path, count: int, half: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, written = tmp_path / "run", list[Path]()

    def stop_once(path: Path, write: Callable[[Path], object]) -> None:
        if path.suffix in (".parquet", ".safetensors", ".pt"):
            written.append(path)
        stop = len(written) == count
        really_write(path, half_written(write) if stop and half else write)
        if stop:
            raise KeyboardInterrupt

    with writing(stop_once):
        assert run(folder, "--epochs", "2") == 130
    assert written[-1].exists() != half or written[-1] in written[:-1]
    stderr = capsys.readouterr().err
    assert stderr == "track: interrupted; to resume, run the same command with --resume and its --out\n"
    assert not [name for name in contents(folder) if name.endswith(".tmp")]
    if count == 33:  # during the measurement of the last epoch
        assert [RunFolder(folder).trainer(epoch).exists() for epoch in range(3)] == [False, True, True]
    kept = {name: one for name, one in state(folder).items() if "margins/" in name and one[1]}
    assert run(folder, "--epochs", "2", "--resume") == 0
    assert_same_run(folder, whole)
    # existing files were not written again
    assert {name: state(folder)[name] for name in kept} == kept


@pytest.mark.slow
def test_a_run_interrupted_in_a_batch_and_in_a_measurement_gives_the_same_result(tmp_path: Path, whole: Path) -> None:
    folder, calls = tmp_path / "run", iter(())

    def stop(*_: object, **__: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    # how often each call succeeds first
    for place, what, count in (
        (Terminal, "batch_done", 1),
        (Terminal, "images_done", 1),
        (harness.tracking.training_run, "evaluate", 0),
    ):
        calls = iter(range(count))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, what, stop)
            assert run(folder, "--epochs", "2", "--resume") == 130
    assert run(folder, "--epochs", "2", "--resume") == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path: Path, whole: Path) -> None:
    # control for the comparison, and differences that it must ignore
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "1", "--seed", "1", "--norm", "l2", "--estimator", "ddn:steps=3") == 0
    for epoch in (0, 1):
        ours, theirs = (read_part(RunFolder(path).predictions(epoch))[0] for path in (folder, whole))
        assert ours["label"].tolist() == theirs["label"].tolist()
        assert not ours["confidence"].equals(theirs["confidence"])
        name = f"checkpoints/epoch-{epoch:03d}.safetensors"
        assert not same_values(checkpoint(folder / name), checkpoint(whole / name))
    probes = [name for name in contents(whole) if name.startswith("probes/")]
    assert len(probes) == 2
    assert all(same_values(tensors.load_tensors(folder / name), tensors.load_tensors(whole / name)) for name in probes)
    with pytest.raises(AssertionError):
        assert_same_run(folder, whole)


# deleted parts

PARTS = [
    "checkpoints/epoch-000.safetensors",
    "checkpoints/epoch-001.safetensors",
    "checkpoints/epoch-002.safetensors",
    "predictions/epoch-002.parquet",
    "margins/epoch-000/fmn%3Asteps=10.l2.parquet",
    "margins/epoch-001/deepfool%3Asteps=5.linf.parquet",
    "probes/test.safetensors",
    "epochs.csv",
]


@pytest.mark.parametrize(
    "part",
    [part if number % 8 == 5 else pytest.param(part, marks=pytest.mark.slow) for number, part in enumerate(PARTS)],
)
def test_a_deleted_part_is_restored_and_nothing_else_changes(
    tmp_path: Path, whole: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured, trained = copy_of(whole, tmp_path), [], []
    measure, run_epoch = harness.tasks.measure_with, Trainer.run_epoch
    monkeypatch.setattr(harness.tasks, "measure_with", lambda *a, **k: measured.append(a) or measure(*a, **k))
    monkeypatch.setattr(Trainer, "run_epoch", lambda *a: trained.append(a) or run_epoch(*a))
    (folder / part).unlink()
    assert run(folder, "--epochs", "2", "--resume") == 0
    before, after = contents(whole), contents(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # the seconds of a restored part, and the tables that repeat them
    allowed = {"manifest.json", "summary.csv", "epochs.csv"}
    if part.startswith("checkpoints/"):
        allowed |= {part, *(f"checkpoints/epoch-{epoch:03d}.trainer.pt" for epoch in (1, 2))}
    assert changed <= allowed | ({part} if part.endswith(".parquet") else set())
    assert_same_run(folder, whole)
    assert len(measured) == (2 if part.startswith("margins/") else 0)
    # from the last existing state: that of epoch 1, and of no earlier epoch
    needed = {"checkpoints/epoch-001.safetensors": 1, "checkpoints/epoch-002.safetensors": 1}
    assert len(trained) == needed.get(part, 0)


@pytest.mark.slow
def test_a_finished_run_resumes_to_itself(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # draws the figures
    folder = copy_of(whole, tmp_path)
    assert run(folder, "--epochs", "2", "--resume") == 0
    whole = copy_of(folder, tmp_path / "before")
    monkeypatch.setattr(harness.tasks, "measure_with", None)
    monkeypatch.setattr(Trainer, "run_epoch", None)
    assert run(folder, "--epochs", "2", "--resume") == 0
    before, after = contents(whole), contents(folder)
    assert before.keys() == after.keys()
    # the page holds the manifest and the time
    assert {name for name in before if before[name] != after[name]} == {"manifest.json", "report.html"}


@pytest.mark.slow
def test_all_margins_and_predictions_are_recomputed_from_the_checkpoints(tmp_path: Path, whole: Path) -> None:
    folder = copy_of(whole, tmp_path)
    for name in ("margins", "predictions", "witnesses", "probes"):
        shutil.rmtree(folder / name)
    assert run(folder, "--epochs", "2", "--resume") == 0
    assert_same_run(folder, whole)


def last_value(path: Path) -> int:
    """The offset of the last value of a part's column: other bytes may not affect the values."""
    group = pq.read_metadata(path).row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "confidence")
    first: int = column.dictionary_page_offset or column.data_page_offset
    return first + int(column.total_compressed_size) - 3


def test_a_damaged_file_gives_a_one_line_error_that_names_it(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(whole, tmp_path)
    for name in (
        "checkpoints/epoch-001.safetensors",
        "predictions/epoch-001.parquet",
        "margins/epoch-001/fmn%3Asteps=10.l2.parquet",
    ):
        path = folder / name
        whole_file = path.read_bytes()
        place = last_value(path) if path.suffix == ".parquet" else len(whole_file) // 3
        path.write_bytes(whole_file[:place] + bytes([whole_file[place] ^ 1]) + whole_file[place + 1 :])
        before = {key: one for key, one in state(folder).items() if one[1] and not key.endswith((".json", ".csv"))}
        capsys.readouterr()
        assert run(folder, "--epochs", "2", "--resume") == 1
        stderr = capsys.readouterr().err
        # Parquet's own checksum is checked by the library
        assert stderr.startswith(
            (f"track: error: checksum mismatch in {path}: ", f"track: error: expected a Parquet part at {path}, ")
        )
        assert stderr.endswith("delete it and --resume\n")
        assert stderr.count("\n") == 1
        assert {key: state(folder)[key] for key in before} == before
        path.write_bytes(whole_file)
    assert_same_run(folder, whole)


def test_another_network_than_the_one_that_was_measured_is_refused(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(whole, tmp_path)
    paths, other = RunFolder(folder), net()
    paths.load_checkpoint(1, other)
    paths.save_checkpoint(0, other)
    before = {key: one for key, one in state(folder).items() if not key.endswith((".json", ".csv"))}
    assert run(folder, "--epochs", "2", "--resume") == 1
    stderr = capsys.readouterr().err
    assert "that deepfool:steps=5 l2 measured at epoch 0, got " in stderr
    assert stderr.count("\n") == 1
    assert {key: one for key, one in state(folder).items() if not key.endswith((".json", ".csv"))} == before


# growing


@pytest.mark.slow
def test_adding_epochs_gives_the_same_run_as_a_longer_one(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "0") == 0
    assert run(folder, "--epochs", "1", "--resume") == 0
    assert len(RunFolder(folder).margin_parts()) == 2 * UNITS
    assert run(folder, "--epochs", "2", "--resume") == 0
    assert_same_run(folder, whole)
    # a resumed run with fewer epochs keeps the existing ones
    assert run(folder, "--epochs", "1", "--resume") == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(2,), (1, 2)])
def test_epochs_may_be_added_when_the_trainers_states_are_lost(tmp_path: Path, whole: Path, lost: tuple[int]) -> None:
    longer, folder = tmp_path / "longer", copy_of(whole, tmp_path)
    for epoch in lost:
        RunFolder(folder).trainer(epoch).unlink()
    assert run(folder, "--epochs", "3", "--resume") == 0
    paths = RunFolder(folder)
    tensors.save_checkpoint(longer, trained(3), 3, paths.facts(paths.place(paths.checkpoint(3))))
    assert same_values(checkpoint(paths.checkpoint(3)), checkpoint(longer))
    # the states of the last two epochs, as in a run that lost none
    assert [RunFolder(folder).trainer(epoch).exists() for epoch in range(4)] == [False, False, True, True]


# training


def small(dataset: Dataset) -> tuple[Any, Any]:
    """The images that the command trains and tests on."""
    return tuple(
        split.subset(draw_probe(split, count, 0)) for split, count in ((dataset.train, 96), (dataset.test, 40))
    )


def trained(last: int, **options: Any) -> torch.nn.Module:
    """The command's network, trained without any tracking."""
    model = build("tests.runs:net", (1, 8, 8), 10, options.get("seed", 0))
    run = TrainingOptions(batch_size=32, pgd_epsilon=0.1, pgd_step_size=2.5 * 0.1 / 10, **options)
    for _ in epochs(Trainer(model, small(load("digits"))[0], run, torch.device("cpu")), last):
        pass
    return model


@pytest.mark.slow
def test_a_tracked_run_trains_the_same_network_as_one_without_tracking(tmp_path: Path, whole: Path) -> None:
    weights = dict[str, str]()
    for training, folder in (("standard", whole), ("pgd", tmp_path / "pgd")):
        if training == "pgd":
            assert run(folder, "--epochs", "2", "--training", "pgd") == 0
        for epoch in range(3):
            model = build("tests.runs:net", (1, 8, 8), 10, 9)
            tensors.load_checkpoint(RunFolder(folder).checkpoint(epoch), model)
            weights[f"{training} {epoch}"] = weights_checksum(model)
            assert weights[f"{training} {epoch}"] == weights_checksum(trained(epoch, training=training))
    # both start from the same network and then differ
    assert weights["standard 0"] == weights["pgd 0"]
    assert len(set(weights.values())) == 5
    assert weights_checksum(trained(2, seed=1)) not in weights.values()


@pytest.mark.slow
def test_unrequested_epochs_are_trained_and_not_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--model", "tests.runs:net", *IMAGES, "--probe", "5", "--norm", "linf", "--estimator", "fmn:steps=3"]
    assert main([*options, "--epochs", "5", "--every", "3", "--out", str(folder)]) == 0
    measured = [read_part(path)[0]["epoch"].unique().tolist() for path in RunFolder(folder).margin_parts()]
    assert measured == [[0], [1], [3], [5]]
    table = pd.read_csv(folder / "epochs.csv")
    assert table["epoch"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert main([*options, "--epochs", "5", "--every", "2", "--resume", "--out", str(folder)]) == 0
    assert pd.read_csv(folder / "summary.csv")["epoch"].unique().tolist() == [0, 1, 2, 3, 4, 5]
