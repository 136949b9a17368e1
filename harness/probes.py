"""The tracked images: the same in every epoch and for every estimator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.checks import check_images, clean_logits
from attacks.estimator import Domain, InputError
from attacks.isolation import forked_generators, frozen_view
from harness.devices import device_of


@dataclass(frozen=True)
class Probe:
    """The tracked images of one split: ``(N, C, H, W)`` float, ``(N,)`` int64 labels, ``(N,)`` int64 ids."""

    images: Tensor
    labels: Tensor
    ids: Tensor


def as_probe(name: str, given: tuple[Tensor, ...] | Probe, bounds: tuple[float, float]) -> Probe:
    """Check what a caller gives for the split ``name`` and copy it to the CPU.

    Args:
        given: ``(images, labels)`` or ``(images, labels, ids)``; ids default to row numbers.

    Raises:
        InputError: wrong shapes or types, images outside ``bounds``, or an id given twice.
    """
    if isinstance(given, Probe):
        given = (given.images, given.labels, given.ids)
    if len(given) not in (2, 3):
        raise InputError(
            f"expected (images, labels) or (images, labels, ids) for {name}, got {len(given)} items; give two or three"
        )
    # copies: the caller may go on writing its own
    images, labels, *rest = (torch.as_tensor(value).detach().cpu().clone() for value in given)
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


def check_labels(probes: Mapping[str, Probe], model: nn.Module, bounds: tuple[float, float], domain: Domain) -> None:
    """Refuse labels that the model has no logit for.

    Raises:
        InputError: names the split and the label; or a model that cannot be measured.
    """
    device = device_of(model)
    for split, probe in probes.items():
        with forked_generators(), frozen_view(model, bounds, domain, device) as view:
            view.start_chunk(1)
            clean_logits(view, probe.images[:1].to(device))
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
