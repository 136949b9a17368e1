"""The user's own data: an ``.npz`` of arrays, folders of pictures, or a torchvision data set by name."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from attacks.types import one_line
from harness.config.registry import SOURCES, definition
from harness.data.dataset import DataError, Dataset, Split

SPLITS = ("train", "test")
# images and labels of each split, as a source reads them
Arrays: TypeAlias = dict[str, tuple[NDArray[Any], NDArray[Any]]]
# torchvision reads these with pickle, which could run code in the file
PICKLED = ("CIFAR10", "CIFAR100")
# a larger label is not a class number; a model with one logit per class would take all memory
MOST_CLASSES = 100_000


def load_source(text: str, root: Path, download: bool) -> Dataset:
    """Load ``npz:FILE``, ``folder:DIR``, ``torchvision:NAME`` or another of `harness.config.registry.SOURCES`.

    Args:
        text: the source and its place.
        root: folder of torchvision's data sets.
        download: whether torchvision may download missing files.

    Raises:
        DataError: the data is missing or damaged, or its images or labels cannot be used.
    """
    kind, _, name = text.partition(":")
    return _dataset(text, definition(SOURCES[kind])(name, root, download))


def _dataset(text: str, splits: Arrays) -> Dataset:
    """Check the arrays, count the classes, and compute the checksums."""
    labels = {name: _labels(text, name, images, array) for name, (images, array) in splits.items()}
    images = {name: _images(text, name, array) for name, (array, _) in splits.items()}
    shapes = {name: value.shape[1:] for name, value in images.items()}
    if shapes["train"] != shapes["test"]:
        raise DataError(
            f"expected images of one size in {text}, got {shapes['train']} and {shapes['test']}; resize them"
        )
    classes = 1 + max(int(value.max(initial=0)) for value in labels.values())
    if classes > MOST_CLASSES:
        raise DataError(
            f"expected labels of at most {MOST_CLASSES} classes in {text}, got {classes - 1}; number the classes from 0"
        )
    if classes < 2:
        raise DataError(f"expected labels of at least 2 classes in {text}, got one; add another")
    checksums = {
        f"{name} {part}": hashlib.sha256(np.ascontiguousarray(arrays[name]).tobytes()).hexdigest()
        for name in SPLITS
        for part, arrays in (("images", images), ("labels", labels))
    }
    train, test = (_split(images[name], labels[name]) for name in SPLITS)
    return Dataset(text, classes, train, test, checksums)


def _split(images: NDArray[Any], labels: NDArray[Any]) -> Split:
    levels = 255 if images.dtype == np.uint8 else 1
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), levels)


def _images(text: str, split: str, array: NDArray[Any]) -> NDArray[Any]:
    """Images as ``(N, C, H, W)``, uint8 or float32 in ``[0, 1]``, from that, ``(N, H, W)`` or ``(N, H, W, C)``."""
    images = array[:, None] if array.ndim == 3 else array
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    fits = images.ndim == 4 and len(images) > 0 and min(images.shape) > 0
    if not fits or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise DataError(
            f"expected {split} images of {text} as (N, H, W), (N, C, H, W) or (N, H, W, C), uint8 or floating, got "
            f"{array.shape} {array.dtype}; convert them"
        )
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
            raise DataError(
                f"expected floating {split} images of {text} in [0, 1], got others; divide them by 255, or undo their "
                "normalisation and give --normalize"
            )
    return images


def _labels(text: str, split: str, images: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    """Labels as ``(N,)`` integers, from that or ``(N, 1)``."""
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.shape != images.shape[:1] or flat.dtype.kind not in "iu" or flat.min(initial=0) < 0:
        raise DataError(
            f"expected {split} labels of {text} as {images.shape[:1]} integers of at least 0, got {array.shape} "
            f"{array.dtype}; give one per image"
        )
    return flat


def read_npz(place: str, root: Path, download: bool) -> Arrays:
    """Read ``x_train, y_train, x_test, y_test``; pickled arrays are refused."""
    path = Path(place)
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as content:
            if missing := [name for name in names if name not in content]:
                raise DataError(f"expected {', '.join(names)} in {path}, got no {', '.join(missing)}; save them so")
            arrays = {name: content[name] for name in names}
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DataError(
            f"expected an .npz of arrays at {path}, got {one_line(error, most=200)}; save it with numpy.savez"
        ) from None
    return {name: (arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in SPLITS}


def read_folder(place: str, root: Path, download: bool) -> Arrays:
    """Read ``train/CLASS/picture`` and ``test/CLASS/picture``, classes in alphabetical order."""
    from torchvision.datasets import ImageFolder

    path, splits, classes = Path(place), {}, {}
    for split in SPLITS:
        try:
            pictures = ImageFolder(str(path / split))
            splits[split] = _stacked(pictures, f"{path / split}")
        except OSError as error:
            raise DataError(
                f"expected pictures in {path / split}/CLASS/, got {one_line(error, most=200)}; put them there"
            ) from None
        classes[split] = pictures.classes
    if classes["train"] != classes["test"]:
        raise DataError(
            f"expected the same classes in {path}/train and {path}/test, got {', '.join(classes['train'])} and "
            f"{', '.join(classes['test'])}; rename or move them"
        )
    return splits


def read_torchvision(name: str, root: Path, download: bool) -> Arrays:
    """Read the training and test split of a torchvision classification data set by its class name."""
    from torchvision import datasets

    if name in PICKLED:
        raise DataError(
            f"expected a data set that is not stored as pickles, got torchvision:{name}; use --dataset cifar10, or "
            "save the arrays and give npz:FILE"
        )
    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or kind is None:
        raise DataError(f"expected a data set of torchvision.datasets, got {name!r}; choose one, such as KMNIST")
    parameters = inspect.signature(kind.__init__).parameters
    splits = {}
    for split in SPLITS:
        chosen = {"train": split == "train"} if "train" in parameters else {"split": split}
        fetch = {"download": download} if "download" in parameters else {}
        try:
            splits[split] = _stacked(kind(str(root), **chosen, **fetch), f"torchvision:{name}")
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"expected the {split} split of torchvision:{name} under {root}, got {one_line(error, most=200)}; "
                "place it there, or use --download"
            ) from None
    return splits


def _stacked(pictures: Any, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """All images and labels of a map-style data set of PIL images, as arrays."""
    arrays, labels = [], []
    for picture, label in (pictures[row] for row in range(len(pictures))):
        arrays.append(np.asarray(picture, dtype=np.uint8))
        labels.append(label)
    sizes = sorted({array.shape for array in arrays})
    if len(sizes) != 1:
        raise DataError(f"expected pictures of one size in {name}, got {sizes[:3]}; resize them to one")
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(
            f"expected one label per picture in {name}, got {labels[0]!r}; choose a classification data set"
        )
    return np.stack(arrays), np.asarray(labels, dtype=np.int64)
