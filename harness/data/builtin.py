"""Built-in data sets: digits, MNIST, Fashion-MNIST and CIFAR-10, as uint8 tensors.

``digits`` comes with scikit-learn. The others are read from torchvision's folder layout, each file plain or packed as
``.gz`` or ``.xz``. Files are unpacked in memory, so the folder may be read-only. Where torchvision lists an MD5 (for
MNIST's packed files and CIFAR-10's batches), it is checked before the bytes are interpreted.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import math
import os
import pickle
import pickletools
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from harness.config.registry import DATASETS, definition
from harness.data.dataset import CLASSES, DataError, Dataset, Split

_MNIST_SOURCES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}


def load(name: str, root: Path | None = None, download: bool = False) -> Dataset:
    """Load a built-in data set.

    Args:
        name: one of `harness.config.registry.DATASETS`.
        root: folder with ``MNIST/raw``, ``FashionMNIST/raw`` or ``cifar-10-batches-py``; by default ``data``.
        download: fetch missing files from the addresses that torchvision lists.

    Raises:
        DataError: unknown name; files are missing or damaged, or cannot be downloaded.
    """
    if name not in DATASETS:
        raise DataError(f"expected a data set of {', '.join(DATASETS)}, got {name!r}; choose one of them")
    dataset: Dataset = definition(DATASETS[name])(Path("data") if root is None else root, download)
    return dataset


@dataclass(frozen=True)
class _Folder:
    """The verified files of one data set; ``checksums`` collects the SHA-256 of each file read."""

    path: Path
    md5: Mapping[str, str]
    checksums: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """The path of ``name``, plain or packed, preferably one with an MD5; None if there is no such file."""
        forms = sorted((name + suffix for suffix in _UNPACK), key=lambda form: form not in self.md5)
        return next((self.path / form for form in forms if os.path.isfile(self.path / form)), None)

    def read(self, name: str) -> bytes:
        """The unpacked content of ``name``.

        Raises:
            DataError: the file is missing or damaged.
        """
        stored = self.find(name)
        if stored is None:
            raise DataError(
                f"expected {name} or its .gz or .xz in {self.path}, got no such file; "
                "place torchvision's files there, use --download, or use --dataset digits"
            )
        try:
            packed = stored.read_bytes()
            self._verify(stored, packed)
            content = _UNPACK[stored.suffix](packed)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(stored, str(error)) from error
        self._verify(self.path / name, content)
        self.checksums[name] = hashlib.sha256(content).hexdigest()
        return content

    def _verify(self, path: Path, content: bytes) -> None:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        expected = self.md5.get(path.name, md5)
        if md5 != expected:
            raise _damaged(path, f"MD5 {md5} where torchvision lists {expected}")


def _damaged(path: Path, reason: str) -> DataError:
    reason = " ".join(reason.split())
    return DataError(f"{path} is damaged: {reason}; delete it and copy or --download it again")


def digits(root: Path, download: bool) -> Dataset:
    """scikit-learn's digits, split 1397/400: every 4.5th image of each class is a test image."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype(np.uint8).reshape(-1, 1, 8, 8), labels.astype(np.int64)
    # systematic sampling along the classes is stratified and, unlike a seeded shuffle, the same on every machine
    ranks = ((np.arange(400) + 0.5) * len(labels) / 400).astype(int)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[np.argsort(labels, kind="stable")[ranks]] = True
    train, test = (_split(images[rows], labels[rows], levels=16) for rows in (~held_out, held_out))
    arrays = {"digits.images": images, "digits.labels": labels}
    checksums = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
    return Dataset("digits", CLASSES, train, test, checksums)


def _mnist(name: str, root: Path, download: bool) -> Dataset:
    from torchvision import datasets

    source = getattr(datasets, _MNIST_SOURCES[name])
    folder = _Folder(root / source.__name__ / "raw", dict(source.resources))
    for archive, md5 in source.resources if download else ():
        if folder.find(archive.removesuffix(".gz")) is None:
            _fetch([mirror + archive for mirror in source.mirrors], md5, folder.path)
    train, test = (_mnist_split(folder, stem) for stem in ("train", "t10k"))
    return Dataset(name, CLASSES, train, test, folder.checksums)


mnist, fashion_mnist = partial(_mnist, "mnist"), partial(_mnist, "fashion-mnist")


def _mnist_split(folder: _Folder, stem: str) -> Split:
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", dimensions=3)
    name = f"{stem}-labels-idx1-ubyte"
    labels = _read_idx(folder, name, dimensions=1)
    if len(labels) != len(images) or labels.max(initial=0) > 9:
        reason = f"{len(labels)} labels up to {labels.max(initial=0)} for {len(images)} images of 10 classes"
        raise _damaged(folder.path / name, reason)
    return _split(images[:, None], labels, levels=255)


def _read_idx(folder: _Folder, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Read a uint8 array in the IDX format (http://yann.lecun.com/exdb/mnist/)."""
    content = folder.read(name)
    start = 4 * (1 + dimensions)
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != math.prod(shape):
        raise _damaged(folder.path / name, f"{len(content)} bytes that are not an IDX array of its kind")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def cifar10(root: Path, download: bool) -> Dataset:
    """CIFAR-10, from the batches in ``cifar-10-batches-py``."""
    from torchvision.datasets import CIFAR10 as source

    folder = _Folder(root / source.base_folder, dict([*source.train_list, *source.test_list]))
    if download and not all(folder.find(batch) for batch in folder.md5):
        _fetch([source.url], source.tgz_md5, folder.path)
    train, test = (_cifar10_split(folder, batches) for batches in (source.train_list, source.test_list))
    return Dataset("cifar10", 10, train, test, folder.checksums)


def _cifar10_split(folder: _Folder, batches: Sequence[tuple[str, str]]) -> Split:
    images, labels = zip(*(_read_batch(folder, batch) for batch, _ in batches), strict=True)
    return _split(np.concatenate(images), np.concatenate(labels), levels=255)


def _read_batch(folder: _Folder, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read a CIFAR-10 batch, a pickle of Python 2: ``(N, 3, 32, 32)`` uint8 images and ``(N,)`` int64 labels."""
    content = folder.read(name)
    try:
        _check_memo(content)
        entry = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        images = np.asarray(entry["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(entry["labels"], dtype=np.int64).reshape(len(images))
    except Exception as error:  # a damaged pickle may raise anything, also MemoryError
        raise _damaged(folder.path / name, f"not a batch of images ({error})") from error
    return images, labels


def _check_memo(content: bytes) -> None:
    """Check that a pickle's memo has no more entries than the pickle has bytes; the unpickler allocates it at once.

    Raises:
        ValueError: the memo is larger.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name.endswith("PUT") and argument is not None and int(argument) > len(content):
            raise ValueError(f"it asks for a memo of {argument} entries")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle plain containers and NumPy arrays; refuse every other function or class."""

    _ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
        ("numpy", "ndarray"): np.ndarray,
        # not NumPy's own functions, which warn about the old module path and an integer ``align``
        ("numpy", "dtype"): lambda code, align, copy: np.dtype(code),
        # empty until its state is set, so that no shape can take memory
        ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: np.empty(0, code),
        ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: np.empty(0, code),
        # used by Python 3 to write bytes for Python 2
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._ALLOWED[module, name]


def _split(images: NDArray[np.uint8], labels: NDArray[np.integer], levels: int) -> Split:
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), levels)


def _fetch(urls: Sequence[str], md5: str, folder: Path) -> None:
    """Download an archive from the first address that answers and unpack it into ``folder``.

    An interrupted download leaves no file there.

    Raises:
        DataError: no address gives an archive with this MD5.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    reasons = []
    for url in urls:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
                # a single packed file stays next to its content, since only the packed form has an MD5
                download_and_extract_archive(url, scratch, md5=md5, remove_finished=url.endswith(".tar.gz"))
                for file in filter(Path.is_file, Path(scratch).rglob("*")):
                    file.replace(folder / file.name)
            return
        except (OSError, RuntimeError, HTTPException) as error:
            reasons.append(" ".join(f"{url}: {error}".split()))
    raise DataError(
        f"expected to download into {folder}, got {'; '.join(reasons)}; "
        "place torchvision's files there, or use --dataset digits"
    )
