"""Readers of what the user gives: options, studies, sweeps, names of estimators, data sets and weights."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from attacks.registry import create, create_certifier
from attacks.types import EstimatorError
from benchmarks.reproduce.study import read_study
from harness.config.options import ConfigError, OneLineParser, add_options
from harness.config.run_config import RunConfig, from_namespace
from harness.data.builtin import _cifar10_split, _Folder, _mnist_split
from harness.data.dataset import DataError
from harness.data.sources import load_source
from harness.models.weights import load_weights
from harness.sweep import read_sweep
from tests.fuzz.reading import Reader

ROOT = Path(__file__).parents[2]


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
    path.write_text((ROOT / "benchmarks" / "reproduce.toml").read_text(encoding="utf-8"), encoding="utf-8")
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
    """Return the content as a command-line argument: without zero bytes, undecodable bytes as surrogates."""
    return path.read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape")


def _sweep(folder: Path) -> Path:
    path = folder / "sweep.toml"
    path.write_text(
        '[options]\ndataset = "digits"\nepochs = 2\n[grid]\nloss = ["hinge", "cross-entropy"]\nseed = [0, 1]\n'
        '[[run]]\ntraining = "pgd"\npgd_epsilon = 0.1\n',
        encoding="utf-8",
    )
    return path


def _read_sweep(path: Path) -> object:
    return [(entry.name, dict(entry.options)) for entry in read_sweep(path)]


def _idx(folder: Path) -> Path:
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]))
    (folder / "t10k-images-idx3-ubyte").write_bytes(head + images.tobytes())
    return folder / "t10k-images-idx3-ubyte"


def _read_idx(path: Path) -> object:
    # without the MD5 of torchvision's list, which would refuse every damaged file
    split = _mnist_split(_Folder(path.parent, {}), "t10k")
    return split.images, split.labels


def _batch(folder: Path) -> Path:
    entry = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, 2]}
    (folder / "test_batch").write_bytes(pickle.dumps(entry, protocol=2))
    return folder / "test_batch"


def _read_cifar(path: Path) -> object:
    split = _cifar10_split(_Folder(path.parent, {}), [(path.name, "")])
    return split.images, split.labels


def _arrays(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    arrays = {f"x_{name}": draw.integers(0, 256, (3, 4, 4), dtype=np.uint8) for name in ("train", "test")}
    labels = {f"y_{name}": np.arange(3) for name in ("train", "test")}
    np.savez(folder / "mine.npz", **arrays, **labels)  # type: ignore[arg-type]
    return folder / "mine.npz"


def _read_arrays(path: Path) -> object:
    data = load_source(f"npz:{path}", path.parent, download=False)
    return data.train.images, data.train.labels, data.test.images, data.test.labels


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def _weights(folder: Path) -> Path:
    torch.save({"state_dict": _layer().state_dict(), "epoch": 3}, folder / "weights.pt")
    return folder / "weights.pt"


def _safe_weights(folder: Path) -> Path:
    save_file(_layer().state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _read_weights(path: Path) -> object:
    model = _layer()
    load_weights(path, model)
    return model


INPUTS = (
    Reader("options file", _config, _read_config, (ConfigError,)),
    Reader("study file", _study, lambda path: read_study(path), (ValueError,)),
    Reader("sweep file", _sweep, _read_sweep, (ConfigError,)),
    Reader("estimator text", _text_of("fmn:steps=30,gamma=0.05,warm=4"), _read_estimator, (EstimatorError,)),
    Reader("estimator text, nested", _text_of(NESTED), _read_estimator, (EstimatorError,)),
    Reader("certifier text", _text_of("crown:rounds=2,cuts=3"), _read_certifier, (EstimatorError,)),
    Reader("MNIST images", _idx, _read_idx, (DataError,)),
    Reader("CIFAR-10 batch", _batch, _read_cifar, (DataError,)),
    Reader("arrays of the user's", _arrays, _read_arrays, (DataError,)),
    Reader("weights of others", _weights, _read_weights, (ValueError,)),
    Reader("weights of others, safetensors", _safe_weights, _read_weights, (ValueError,)),
)
