"""Witnesses in the run folder: all of the latest epoch, the extremes of earlier epochs, and warm starts from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from attacks.estimator import Margins
from harness.data.probes import Probe
from harness.store import RunFolder, Unit
from harness.store.folder import WITNESSES_KEPT
from harness.store.identity import StoreError
from harness.store.parts import read_margins


def keep_witnesses(
    folder: RunFolder, epoch: int, unit: Unit, probes: Mapping[str, Probe], results: Mapping[str, Margins]
) -> None:
    """Write all witnesses that the unit found at the epoch."""
    tensors = {}
    for split, margins in results.items():
        found = torch.nonzero(margins.target >= 0).flatten()
        tensors[f"{split}.image"] = probes[split].ids[found]
        tensors[f"{split}.witness"] = margins.witness[found]
        tensors[f"{split}.distance"] = margins.distance[found]
    folder.save_tensors(folder.witnesses(epoch, unit), tensors)


def thin_witnesses(folder: RunFolder, unit: Unit, thinned: set[Path]) -> None:
    """Of every epoch before the unit's latest measured one, keep the smallest and largest distances only.

    Only epochs whose margins are written count as measured: an interrupted one will start from the whole witnesses
    of the epoch before it.

    Args:
        thinned: files that have been looked at; gets those that are now.
    """
    latest = max(folder.measured_epochs(unit), default=0)
    for epoch in folder.witness_epochs(unit):
        path = folder.witnesses(epoch, unit)
        if epoch < latest and path not in thinned:
            kept = folder.load_tensors(path)
            thinned.add(path)
            if any(len(value) > 2 * WITNESSES_KEPT for value in kept.values()):
                folder.save_tensors(path, _extremes(kept))


def starts(
    folder: RunFolder, epoch: int, unit: Unit, probes: Mapping[str, Probe]
) -> tuple[int | None, dict[str, Tensor]]:
    """The latest epoch before this one, which it has not measured yet, that the unit measured, and its witnesses.

    Returns:
        None and nothing where this is its first; else split -> ``(N, C, H, W)`` in the probe's order, NaN where the
        unit found no witness.

    Raises:
        StoreError: a later epoch was measured already, after which witnesses are no longer kept; or not all are there.
    """
    before = max(folder.measured_epochs(unit), default=None)
    if before is None:
        return None, {}
    if before > epoch:
        raise StoreError(
            f"expected epochs in order for {unit}, which starts from the witnesses of the epoch before, got {epoch} "
            f"after {before}; measure it in a run of its own, or without a warm start"
        )
    rows, _ = read_margins(folder, folder.margins(before, unit))
    kept = folder.load_tensors(folder.witnesses(before, unit))
    found = {}
    for split, probe in probes.items():
        wanted = int(((rows["split"] == split) & (rows["target"] >= 0)).sum())
        images = kept.get(f"{split}.image", torch.empty(0)).tolist()
        if len(images) != wanted:
            raise StoreError(
                f"expected {wanted} {split} witnesses of {unit} at epoch {before} to start from, got {len(images)}; "
                "delete all its parts in margins/ and continue with --resume"
            )
        place = {image: row for row, image in enumerate(probe.ids.tolist())}
        found[split] = torch.full_like(probe.images, torch.nan)
        found[split][[place[image] for image in images]] = kept[f"{split}.witness"]
    return before, found


def _extremes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for split in (name.removesuffix(".distance") for name in tensors if name.endswith(".distance")):
        order = torch.arange(len(tensors[f"{split}.distance"]))
        if len(order) > 2 * WITNESSES_KEPT:
            order = tensors[f"{split}.distance"].argsort(stable=True)
            order = torch.cat([order[:WITNESSES_KEPT], order[-WITNESSES_KEPT:]])
        kept |= {f"{split}.{name}": tensors[f"{split}.{name}"][order] for name in ("image", "witness", "distance")}
    return kept
