"""The readers of a run folder's files, and all readers together.

The readers of the user's files are in `tests.fuzz.inputs`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from attacks.certify.branch_and_bound.bracket import Budget
from attacks.certify.branch_and_bound.cache import Record, read_record, write_record
from attacks.measure import MeasureOptions
from attacks.registry import create
from harness.measuring.shards import find_shard, keep_shard
from harness.runs import read_run
from harness.store import RunFolder, Unit
from harness.store.identity import StoreError
from harness.store.tables import read_part, write_part
from harness.store.tensors import (
    load_checkpoint,
    load_tensors,
    load_trainer,
    save_checkpoint,
    save_tensors,
    save_trainer,
)
from harness.tasks import Task, run_task
from harness.tracking.tracker import MarginTracker
from harness.training.objectives import TrainingOptions
from harness.training.trainer import Trainer
from tests.fuzz.inputs import INPUTS
from tests.fuzz.reading import Reader


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _checkpoint(folder: Path) -> Path:
    save_checkpoint(folder / "epoch-000.safetensors", _model(), 0)
    return folder / "epoch-000.safetensors"


def _read_checkpoint(path: Path) -> object:
    model = _model()
    load_checkpoint(path, model)
    return model


def _trainer(folder: Path) -> Path:
    from harness.data.dataset import Split

    split = Split(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 3, 255)
    trainer = Trainer(_model(), split, TrainingOptions(batch_size=4), torch.device("cpu"))
    trainer.run_epoch()
    save_trainer(folder / "epoch-001.trainer.pt", trainer.state_dict())
    return folder / "epoch-001.trainer.pt"


_PLACE = {"kind": "probes", "split": "test"}


def _tensors(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    probe = {"images": torch.rand(3, 1, 4, 4, generator=draw), "ids": torch.arange(3)}
    save_tensors(folder / "test.safetensors", probe, **_PLACE)
    return folder / "test.safetensors"


def _read_tensors(path: Path) -> object:
    # an undamaged file of another place, such as a shard, is refused by its place
    return load_tensors(path, _PLACE)


def _part(folder: Path) -> Path:
    table = pd.DataFrame(
        {"epoch": 1, "split": ["train", "test"], "distance": [0.25, np.inf], "correct": [True, False], "image": [3, 4]}
    )
    write_part(folder / "part.parquet", table, weights="ab" * 32, epoch="1")
    return folder / "part.parquet"


def _run(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    probe = torch.rand(4, 1, 4, 4, generator=draw), torch.tensor([0, 1, 2, 0])
    tracker = MarginTracker(folder / "run", {"test": probe}, ["linear"], ["l2"])
    for epoch in range(2):
        tracker.update(epoch, _model())
    rows = "epoch,split,loss,error,seconds\n0,test,1.5,0.75,0.25\n1,test,1.25,0.5,0.25\n"
    tracker.folder.epochs_csv.write_text(rows, encoding="utf-8")
    return tracker.folder.path.resolve()


def _manifest(folder: Path) -> Path:
    return RunFolder(_run(folder)).manifest


def _read_manifest(path: Path) -> object:
    return RunFolder(path.parent).read_manifest()


def _margins(folder: Path) -> Path:
    return RunFolder(_run(folder)).margin_parts()[0]


def _epochs(folder: Path) -> Path:
    return RunFolder(_run(folder)).epochs_csv


def _read_run_of(path: Path) -> object:
    """Read the run folder that holds the file."""
    place = next(parent for parent in path.parents if (parent / "manifest.json").exists())
    run = read_run(place)
    return {"margins": run.margins, "epochs": run.epochs}


_QUESTION = {"weights": "ab", "image": "cd", "norm": "l2", "gap": 1e-5}


def _record(folder: Path) -> Path:
    record = Record(lower=0.5, upper=0.5, move=(0.25, -0.5), nodes=7, seconds=0.5, budget=Budget(nodes=9, seconds=1.0))
    write_record(folder / "answer.json", _QUESTION, record)
    return folder / "answer.json"


def _read_answer(path: Path) -> object:
    # a damaged answer is computed again, which counts as refused
    record = read_record(path, _QUESTION)
    if record is None:
        raise StoreError("expected an answer, got none; search again")
    return record


def _task() -> Task:
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    unit = Unit("linear", "l2")
    return Task(
        unit, "test", 0, create("linear"), images, (0, 1, 2), None, MeasureOptions(noise_retries=0, batch_size=8)
    )


def _shard(folder: Path) -> Path:
    keep_shard(RunFolder(folder), 0, _task(), run_task(_model(), _task()), "ab")
    return next(folder.rglob("*.safetensors"))


def _read_shard(path: Path) -> object:
    # a damaged shard is measured again, which counts as refused
    shard = find_shard(RunFolder(path.parents[2]), 0, _task(), "ab")
    if shard is None:
        raise StoreError("expected a shard, got none; measure it again")
    return shard.margins


READERS = (
    Reader("manifest", _manifest, _read_manifest, (StoreError,), checked=True),
    Reader("margin part", _part, lambda path: read_part(path), (StoreError,), checked=True),
    Reader("checkpoint", _checkpoint, _read_checkpoint, (StoreError,), checked=True),
    Reader("trainer's state", _trainer, load_trainer, (StoreError,), checked=True),
    Reader("witnesses and probes", _tensors, _read_tensors, (StoreError,), checked=True),
    Reader("shard", _shard, _read_shard, (StoreError,), checked=True),
    Reader("run folder, a part", _margins, _read_run_of, (StoreError,), checked=True),
    Reader("run folder, epochs.csv", _epochs, _read_run_of, (StoreError,)),
    Reader("exact margins' cache", _record, _read_answer, (StoreError,), checked=True),
    *INPUTS,
)
