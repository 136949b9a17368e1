"""Everything that reads what it did not just write: a whole file of each kind, and how it may be refused."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from attacks.certify.cache import Record, read_record, write_record
from attacks.certify.search import Budget
from attacks.estimator import EstimatorError
from attacks.registry import create, create_certifier
from benchmarks.reproduce.study import read_study
from harness.config import RunConfig, from_namespace
from harness.data import DataError, _cifar10_split, _Folder, _mnist_split
from harness.files import (
    StoreError,
    load_checkpoint,
    load_tensors,
    load_trainer,
    read_part,
    save_checkpoint,
    save_tensors,
    save_trainer,
    write_part,
)
from harness.objectives import TrainingOptions
from harness.options import ConfigError, OneLineParser, add_options
from harness.runs import read_run
from harness.store import RunFolder
from harness.tracker import MarginTracker
from harness.training import Trainer


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        make: writes a whole one into an empty folder and returns its path.
        read: reads what lies at a path; `fingerprint` tells two results apart.
        refuses: what it may raise, in one line.
        checked: a damaged file that is read has to give the same as the whole one.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    checked: bool = False


def fingerprint(value: object) -> str:
    """A text that is the same for equal values of what readers return."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        content = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(content).hexdigest()}"
    if isinstance(value, nn.Module):
        return fingerprint(dict(value.state_dict()))
    if isinstance(value, pd.DataFrame):
        return value.to_csv(index=False, float_format="%r")
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{fingerprint(one)}" for key, one in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(fingerprint, value)) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fingerprint({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return repr(value)


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
    from harness.data import Split

    split = Split(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 3, 255)
    trainer = Trainer(_model(), split, TrainingOptions(batch_size=4), torch.device("cpu"))
    trainer.run_epoch()
    save_trainer(folder / "epoch-001.trainer.pt", trainer.state_dict())
    return folder / "epoch-001.trainer.pt"


def _tensors(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    save_tensors(
        folder / "test.safetensors", {"images": torch.rand(3, 1, 4, 4, generator=draw), "ids": torch.arange(3)}
    )
    return folder / "test.safetensors"


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
    """The run that the file is of."""
    place = next(parent for parent in path.parents if (parent / "manifest.json").exists())
    run = read_run(place)
    return {"margins": run.margins, "epochs": run.epochs}


def _config(folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(
        'dataset = "digits"\nmodel = "dense"\nepochs = 3\nlearning-rate = 1e-3\n'
        'estimator = ["deepfool", "fmn:steps=5"]\n'
        'norm = ["l2"]\nprobe = 20\npgd_epsilon = 0.1\nwarm_start = false\n',
        encoding="utf-8",
    )
    return path


def _read_config(path: Path) -> object:
    parser = OneLineParser()
    add_options(parser, dataclasses.fields(RunConfig))
    return from_namespace(parser.parse_args(["--config", str(path)]))


def _study(folder: Path) -> Path:
    path = folder / "study.toml"
    path.write_text(Path("benchmarks/reproduce.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _text_of(content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "text").write_text(content, encoding="utf-8")
        return folder / "text"

    return make


NESTED = "best:of=cascade+fmn:steps=20/gamma=0.1"


def _read_estimator(path: Path) -> object:
    return create(_word(path))


def _read_certifier(path: Path) -> object:
    return create_certifier(_word(path))


def _word(path: Path) -> str:
    """What a command line can carry: no zero byte, and bytes that are no text as Python takes them in."""
    return path.read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape")


_QUESTION = {"weights": "ab", "image": "cd", "norm": "l2", "gap": 1e-5}


def _record(folder: Path) -> Path:
    record = Record(lower=0.5, upper=0.5, move=(0.25, -0.5), nodes=7, seconds=0.5, budget=Budget(nodes=9, seconds=1.0))
    write_record(folder / "answer.json", _QUESTION, record)
    return folder / "answer.json"


def _read_answer(path: Path) -> object:
    # what is damaged is found anew, which is as good as refused
    found = read_record(path, _QUESTION)
    if found is None:
        raise StoreError("expected an answer, got none; search again")
    return found


def _idx(folder: Path) -> Path:
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]))
    (folder / "t10k-images-idx3-ubyte").write_bytes(head + images.tobytes())
    return folder / "t10k-images-idx3-ubyte"


def _read_idx(path: Path) -> object:
    # without the MD5 that torchvision lists, which damage never gets past
    split = _mnist_split(_Folder(path.parent, {}), "t10k")
    return split.images, split.labels


def _batch(folder: Path) -> Path:
    entry = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, 2]}
    (folder / "test_batch").write_bytes(pickle.dumps(entry, protocol=2))
    return folder / "test_batch"


def _read_cifar(path: Path) -> object:
    split = _cifar10_split(_Folder(path.parent, {}), [(path.name, "")])
    return split.images, split.labels


READERS = (
    Reader("manifest", _manifest, _read_manifest, (StoreError,), checked=True),
    Reader("margin part", _part, lambda path: read_part(path), (StoreError,), checked=True),
    Reader("checkpoint", _checkpoint, _read_checkpoint, (StoreError,), checked=True),
    Reader("trainer's state", _trainer, load_trainer, (StoreError,), checked=True),
    Reader("witnesses and probes", _tensors, load_tensors, (StoreError,), checked=True),
    Reader("run folder, a part", _margins, _read_run_of, (StoreError,), checked=True),
    Reader("run folder, epochs.csv", _epochs, _read_run_of, (StoreError,)),
    Reader("options file", _config, _read_config, (ConfigError,)),
    Reader("study file", _study, lambda path: read_study(path), (ValueError,)),
    Reader("estimator text", _text_of("fmn:steps=30,gamma=0.05,warm=4"), _read_estimator, (EstimatorError,)),
    Reader("estimator text, nested", _text_of(NESTED), _read_estimator, (EstimatorError,)),
    Reader("certifier text", _text_of("crown:rounds=2,cuts=3"), _read_certifier, (EstimatorError,)),
    Reader("exact margins' cache", _record, _read_answer, (StoreError,), checked=True),
    Reader("MNIST images", _idx, _read_idx, (DataError,)),
    Reader("CIFAR-10 batch", _batch, _read_cifar, (DataError,)),
)
