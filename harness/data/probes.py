"""Probes: the tracked images of each split, the same in every epoch and for every estimator."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import data

from attacks.arguments import shown
from attacks.checks import FEW, ModelWarning, check_images, check_model, look_channels_last
from attacks.isolation import frozen_view
from attacks.measure import MeasureOptions
from attacks.seeds import forked_generators
from attacks.types import InputError, one_line
from harness.config.devices import device_of
from harness.store import RunFolder
from harness.store.identity import StoreError
from harness.store.manifest import probe_checksums

# names of the parts of a split, in dicts
KEYS = {
    "images": ("images", "image", "pixel_values"),
    "labels": ("labels", "label", "target"),
    "ids": ("ids", "id"),
}


class LayoutWarning(ModelWarning):
    """Images that look like ``(N, H, W, C)`` although the model accepts them."""


@dataclass(frozen=True)
class Probe:
    """The tracked images of one split: ``(N, C, H, W)`` float, ``(N,)`` int64 labels, ``(N,)`` int64 ids."""

    images: Tensor
    labels: Tensor
    ids: Tensor


# a split as a caller may give it: images, labels and optionally ids, or an object that holds them
Given: TypeAlias = "Sequence[Any] | Mapping[str, Any] | Probe | data.Dataset[Any] | data.DataLoader[Any]"


def as_probes(given: Mapping[str, Given], bounds: tuple[float, float]) -> dict[str, Probe]:
    """Call `as_probe` for every split.

    Raises:
        InputError: not a dict, no split, a name that is not a text, or what `as_probe` raises.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"expected probes as a dict of splits, got {type(given).__name__}; give {{'test': (images, labels)}}"
        )
    if not given:
        raise InputError("expected at least one split of probes, got none; give images and labels")
    for name in given:
        if not isinstance(name, str) or not name:
            raise InputError(f"expected names of splits as texts, got {shown(name)}; call it 'test', for example")
    return {name: as_probe(name, split, bounds) for name, split in given.items()}


def as_probe(name: str, given: Given, bounds: tuple[float, float]) -> Probe:
    """Check the images, labels and ids of a split and copy them to the CPU.

    Args:
        name: of the split, for messages.
        given: one of these:

            - ``(images, labels)`` or ``(images, labels, ids)``, each a tensor, a NumPy array, a pandas column, or a
              list of tensors or numbers;
            - a dict of them with these names as keys;
            - a map-style Dataset with items ``(image, label)`` or such dicts;
            - a DataLoader of batches of such items, which must neither shuffle nor drop items.

            Images are ``(N, C, H, W)`` floating, labels and ids ``(N,)`` integers. Ids default to row numbers; for a
            `torch.utils.data.Subset` they default to its indices.
        bounds: smallest and largest pixel value.

    Raises:
        InputError: wrong shapes or types, images outside ``bounds``, an id given twice, or a loader that shuffles or
            drops items.
    """
    if isinstance(given, data.Dataset | data.DataLoader):
        items: Sequence[Tensor] = _collected(name, given)
    else:
        items = tuple(_plain(name, part, value) for part, value in zip(KEYS, _parts(name, given), strict=False))
    images, labels, *rest = items
    check_images(images, bounds)
    ids = rest[0] if rest else torch.arange(len(images))
    for part, value in (("labels", labels), ("ids", ids)):
        if value.shape != (len(images),) or value.is_floating_point() or value.is_complex():
            raise InputError(
                f"expected {part} of {name} as ({len(images)},) integers, got {tuple(value.shape)} {value.dtype}; "
                "give one per image"
            )
    if len(set(ids.tolist())) < len(ids):
        raise InputError(f"expected each id of {name} once, got repeated ids; give every image its own")
    return Probe(images, labels.long(), ids.long())


def _parts(name: str, given: object) -> Sequence[Any]:
    """Images, labels and optionally ids of a tuple, dict or probe."""
    if isinstance(given, Probe):
        return given.images, given.labels, given.ids
    if isinstance(given, Mapping):
        parts = [next((given[key] for key in keys if key in given), None) for keys in KEYS.values()]
        if parts[0] is None or parts[1] is None:
            raise InputError(
                f"expected images and labels by these names in {name}, got {shown(list(given))}; rename them"
            )
        return parts if parts[2] is not None else parts[:2]
    if not isinstance(given, list | tuple):
        raise InputError(
            f"expected (images, labels) or (images, labels, ids) for {name}, got {type(given).__name__}; give them so"
        )
    if len(given) not in (2, 3):
        raise InputError(
            f"expected (images, labels) or (images, labels, ids) for {name}, got {len(given)} items; give two or three"
        )
    return given


def _plain(name: str, part: str, value: Any) -> Tensor:
    """A dense copy of the values on the CPU; a copy, as the caller may change the original later."""
    try:
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        if not isinstance(value, Tensor):
            array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
            if array.dtype.kind == "u" and array.itemsize > 1:
                if array.size and int(array.max()) >= 2**63:
                    raise ValueError(f"{array.max()} of {array.dtype}")
                array = array.astype(np.int64)
            # torch accepts neither negative strides nor a foreign byte order
            value = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        copied: Tensor = value.detach().to_dense().cpu().clone()
        return copied
    except Exception as error:  # arrays of other libraries may raise anything
        kind = getattr(value, "dtype", None)
        got = f"{type(value).__name__}{'' if kind is None else f' of {kind}'} ({type(error).__name__})"
        raise InputError(
            f"expected {part} of {name} as a tensor or an array of numbers, got {got}; convert them"
        ) from error


def _collected(name: str, given: data.Dataset[Any] | data.DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All images, labels and ids of a data set or loader, in order; the caller's generators are not advanced."""
    source = given.dataset if isinstance(given, data.DataLoader) else given
    if isinstance(source, data.IterableDataset):
        raise InputError(
            f"expected a Dataset with numbered items for {name}, got the IterableDataset {type(source).__name__}, "
            "which need not repeat itself; give its images and labels as tensors"
        )
    if isinstance(given, data.DataLoader):
        _check_order(name, given)
    images, labels = [], []
    try:
        with forked_generators(), _state_restored(getattr(given, "generator", None)):
            for batch in given if isinstance(given, data.DataLoader) else data.DataLoader(given, 64):
                if isinstance(batch, Tensor) or len(batch) < 2:
                    raise InputError(
                        f"expected items (image, label) of {name}, got {type(batch).__name__} alone; give both"
                    )
                pair = _parts(name, batch if isinstance(batch, Mapping) else tuple(batch)[:2])
                images.append(torch.as_tensor(pair[0]))
                labels.append(torch.as_tensor(pair[1]))
        if not images:
            raise InputError(f"expected images in {name}, got none; give at least one")
        whole, classes, count = torch.cat(images), torch.cat(labels), len(source)  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:  # a data set may raise anything
        raise InputError(
            f"expected items (image, label) of {name}, images as tensors, got "
            f"{one_line(error, most=200)}; add a transform such as ToTensor()"
        ) from error
    if len(whole) != count:
        raise InputError(
            f"expected all {count} images of {name}, got {len(whole)} from its DataLoader; give drop_last=False, or a "
            "Subset of the images to measure"
        )
    ids = list(source.indices) if isinstance(source, data.Subset) else range(count)
    return _plain(name, "images", whole), _plain(name, "labels", classes), _plain(name, "ids", ids)


def _check_order(name: str, loader: data.DataLoader[Any]) -> None:
    """Check that a loader yields its images in the same order every time.

    Raises:
        InputError: its sampler is not torch's sequential one.
    """
    # a batch sampler given by the caller decides the order instead of the loader's own sampler
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else batches
    sampler = sampler.sampler if type(sampler) is data.BatchSampler else sampler
    if not isinstance(sampler, data.SequentialSampler):
        raise InputError(
            f"expected a DataLoader in order for {name}, got one with {type(sampler).__name__}; "
            "give shuffle=False, as the same images are measured every time"
        )


@contextlib.contextmanager
def _state_restored(generator: torch.Generator | None) -> Iterator[None]:
    """Restore the state of a loader's own generator at the end."""
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


def check_probes(probes: Mapping[str, Probe], model: nn.Module, options: MeasureOptions) -> list[ModelWarning]:
    """Check that the model is a fixed function of the image and has a logit for each label of the probes.

    Returns:
        Warnings about other properties that distort margins (see `attacks.checks.check_model`), and about images that
        look like ``(N, H, W, C)``.

    Raises:
        InputError: two passes of the same images differ, or a label has no logit; the message names the values.
    """
    device = device_of(model)
    few = next(iter(probes.values())).images[:FEW].to(device)
    with forked_generators(), frozen_view(model, options.bounds, options.domain, device) as view:
        view.draws, view.binary = options.expect_over, options.binary
        warnings, classes = check_model(view, few), view.classes
    if not classes:
        return warnings
    for split, probe in probes.items():
        if look_channels_last(probe.images):
            warnings.append(
                LayoutWarning(
                    f"the images of {split} look like (N, H, W, C), being {tuple(probe.images.shape)}; the model "
                    "takes them, but give images.permute(0, 3, 1, 2) if it was trained on (N, C, H, W)"
                )
            )
        wrong = probe.labels[(probe.labels < 0) | (probe.labels >= classes)]
        if len(wrong):
            raise InputError(
                f"expected labels of {split} in 0..{classes - 1}, got {int(wrong[0])}; fix them, or give a model "
                "with one logit per class"
            )
    return warnings


def checksum(probe: Probe) -> str:
    """SHA-256 of the images, labels and ids."""
    digester = hashlib.sha256()
    for value in (probe.images, probe.labels, probe.ids):
        digester.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digester.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digester.hexdigest()


def read_probe(folder: RunFolder, split: str) -> Probe:
    """Read the probe images that a run has stored for a split.

    Raises:
        StoreError: the file is damaged, or its images are not those of the manifest.
    """
    path = folder.probes(split)
    tensors = folder.load_tensors(path)
    try:
        probe = Probe(tensors["images"], tensors["labels"], tensors["ids"])
    except KeyError as error:
        raise StoreError(f"expected probe images at {path}, got no {error}; restore the file") from None
    wanted = probe_checksums(folder.read_manifest()).get(split)
    if wanted is not None and checksum(probe) != wanted:
        raise StoreError(
            f"checksum mismatch in {path}: not the probe images of {split} that the manifest names; restore the file, "
            "or delete it and --resume"
        )
    return probe
