"""The tracked images: the same in every epoch and for every estimator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import data

from attacks.checks import check_images, clean_logits
from attacks.estimator import Domain, InputError
from attacks.isolation import forked_generators, frozen_view
from harness.devices import device_of
from harness.identity import StoreError
from harness.store import RunFolder, probe_checksums


@dataclass(frozen=True)
class Probe:
    """The tracked images of one split: ``(N, C, H, W)`` float, ``(N,)`` int64 labels, ``(N,)`` int64 ids."""

    images: Tensor
    labels: Tensor
    ids: Tensor


# a split as a caller may give it: arrays or tensors of images, labels and perhaps ids, or something that holds them
Given: TypeAlias = "Sequence[Any] | Probe | data.Dataset[Any] | data.DataLoader[Any]"


def as_probe(name: str, given: Given, bounds: tuple[float, float]) -> Probe:
    """Check what a caller gives for the split ``name`` and copy it to the CPU.

    Args:
        given: ``(images, labels)`` or ``(images, labels, ids)``, tensors or NumPy arrays; a map-style Dataset of
            ``(image, label)``, or a DataLoader of batches of them, which may not shuffle. Ids default to row numbers,
            of a `torch.utils.data.Subset` to its indices.

    Raises:
        InputError: wrong shapes or types, images outside ``bounds``, an id given twice, or a loader that shuffles.
    """
    items: Sequence[Any]
    if isinstance(given, data.Dataset | data.DataLoader):
        items = _collected(name, given)
    else:
        items = (given.images, given.labels, given.ids) if isinstance(given, Probe) else given
    if len(items) not in (2, 3):
        raise InputError(
            f"expected (images, labels) or (images, labels, ids) for {name}, got {len(items)} items; give two or three"
        )
    # copies: the caller may go on writing its own
    images, labels, *rest = (torch.as_tensor(value).detach().cpu().clone() for value in items)
    ids = rest[0] if rest else torch.arange(len(images))
    check_images(images, bounds)
    for what, value in (("labels", labels), ("ids", ids)):
        if value.shape != (len(images),) or value.is_floating_point():
            raise InputError(
                f"expected {what} of {name} as ({len(images)},) integers, got {tuple(value.shape)} {value.dtype}; "
                "give one an image"
            )
    if len(set(ids.tolist())) < len(ids):
        raise InputError(f"expected each id of {name} once, got repeated ids; give every image its own")
    return Probe(images, labels.long(), ids.long())


def _collected(name: str, given: data.Dataset[Any] | data.DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All images, labels and ids of a data set or loader, in order."""
    source = given.dataset if isinstance(given, data.DataLoader) else given
    batches: Iterable[Any]
    if isinstance(given, data.DataLoader):
        if not isinstance(given.sampler, data.SequentialSampler):
            raise InputError(
                f"expected a DataLoader in order for {name}, got one with {type(given.sampler).__name__}; "
                "give shuffle=False, as the same images are measured every time"
            )
        batches = given
    else:
        batches = data.DataLoader(given, batch_size=64)
    images, labels = [], []
    try:
        for batch in batches:
            images.append(torch.as_tensor(batch[0]))
            labels.append(torch.as_tensor(batch[1]))
    except (TypeError, IndexError, KeyError, RuntimeError) as error:
        raise InputError(
            f"expected items (image, label) of {name}, images as tensors, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; add a transform such as ToTensor()"
        ) from error
    if not images:
        raise InputError(f"expected images in {name}, got none; give at least one")
    whole = torch.cat(images)
    ids = torch.as_tensor(source.indices) if isinstance(source, data.Subset) else torch.arange(len(whole))
    return whole, torch.cat(labels), ids


def check_labels(probes: Mapping[str, Probe], model: nn.Module, bounds: tuple[float, float], domain: Domain) -> None:
    """Refuse labels that the model has no logit for.

    Raises:
        InputError: names the split and the label.
    """
    device = device_of(model)
    for split, probe in probes.items():
        with forked_generators(), frozen_view(model, bounds, domain, device) as view:
            view.start_chunk(1)
            try:
                clean_logits(view, probe.images[:1].to(device))
            except InputError:  # measuring says of how many images
                return
        wrong = probe.labels[(probe.labels < 0) | (probe.labels >= view.classes)]
        if len(wrong):
            raise InputError(
                f"expected labels of {split} in 0..{view.classes - 1}, got {int(wrong[0])}; mend them, or give a model "
                "with a logit for each class"
            )


def checksum(probe: Probe) -> str:
    """SHA-256 of the images, labels and ids."""
    digester = hashlib.sha256()
    for value in (probe.images, probe.labels, probe.ids):
        digester.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digester.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digester.hexdigest()


def read_probe(folder: RunFolder, split: str) -> Probe:
    """The images that a run keeps of a split.

    Raises:
        StoreError: damaged, or others than the manifest says.
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
            f"expected the probe images {wanted[:12]} of {split} at {path}, got {checksum(probe)[:12]}; "
            "restore the file, or delete it and --resume"
        )
    return probe
