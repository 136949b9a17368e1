"""Read and write tensors, checkpoints and trainers' states, with checksums that are verified when a file is read.

Tensors and checkpoints are safetensors, and a trainer's state is a torch file of tensors and plain values. Neither
format contains code.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from attacks.types import one_line
from harness.store.files import write_atomically
from harness.store.identity import (
    CHECKSUM,
    FACTS_OF,
    IDENTITY,
    StoreError,
    check_identity,
    check_regular,
    check_tensors,
    expanded,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

# names of tensors that earlier versions wrote without facts
NAMES = {"images", "labels", "ids", "image", "witness", "distance", "label", "lower", "upper"}
# most tensors of a file other than a checkpoint; reading more would take hours
TENSORS = 1_000


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers; of the network inside wrappers.

    Raises:
        InputError: some weights of the model are elsewhere (sharded or on the meta device).
    """
    import torch

    from attacks.isolation.unwrapping import check_whole, unwrapped

    check_whole(model)
    state = unwrapped(model).state_dict()
    return _tensors_checksum({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})


def _tensors_checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    import torch

    digest = hashlib.sha256(_facts_text(facts).encode() if facts else b"")
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _facts_text(facts: Mapping[str, str]) -> str:
    return json.dumps(dict(facts), sort_keys=True)


def save_checkpoint(path: Path, model: nn.Module, epoch: int, facts: Mapping[str, str] | None = None) -> None:
    """Write the network's parameters and buffers as safetensors, with a checksum and facts; tied weights once."""
    from safetensors.torch import save_model

    from attacks.isolation.unwrapping import unwrapped

    metadata = {**(facts or {}), "epoch": str(epoch), "weights": weights_checksum(model)}
    metadata[CHECKSUM] = hashlib.sha256(_facts_text(metadata).encode()).hexdigest()
    network = unwrapped(model)
    write_atomically(path, lambda temporary: save_model(network, str(temporary), metadata=metadata))


def load_checkpoint(path: Path, model: nn.Module, place: Mapping[str, str] | None = None) -> None:
    """Load a checkpoint into ``model``, or into the network inside its wrappers.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, is of another model, or belongs to another place.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    from attacks.isolation.unwrapping import unwrapped

    network = unwrapped(model)
    # more than any checkpoint of this model has
    check_tensors(path, 2 * len(network.state_dict()) + TENSORS)
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
        # safetensors also stores there which weights are tied
        facts = {name: value for name, value in metadata.items() if name in (*IDENTITY, "weights")}
        check_identity(path, facts, place or {})
        load_model(network, str(path))
    except StoreError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StoreError(
            f"expected a checkpoint of this model at {path}, got {one_line(error, most=200)}; delete it and --resume"
        ) from None
    wanted = facts.get("weights")
    if weights_checksum(model) != wanted:
        raise StoreError(f"checksum mismatch in {path}: the weights are damaged; delete it and --resume")
    # checkpoints of version 0.1.0 have no checksum of their facts
    digest = hashlib.sha256(_facts_text(facts).encode()).hexdigest()
    if metadata.get(CHECKSUM, "" if "kind" in facts else digest) != digest:
        raise StoreError(f"checksum mismatch in {path}: the metadata is damaged; delete it and --resume")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Write named tensors as safetensors, with facts and a checksum of both."""
    from safetensors.torch import save_file

    dense = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = _facts_text({**facts, CHECKSUM: _tensors_checksum(dense, facts)})
    # one entry: safetensors writes several in random order, but the same tensors should give the same bytes
    write_atomically(path, lambda temporary: save_file(dense, str(temporary), metadata={FACTS_OF: text}))


def load_tensors(path: Path, place: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Read named tensors.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, or belongs to another place.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_tensors(path, TENSORS)
    try:
        tensors = load_file(str(path))
        with safe_open(str(path), framework="pt") as handle:
            facts = expanded(handle.metadata() or {})
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"expected tensors at {path}, got {one_line(error, most=200)}; restore the file, or delete it and --resume"
        ) from None
    # files of earlier versions have no facts, but these names of tensors
    earlier = not facts and {name.rpartition(".")[2] for name in tensors} <= NAMES
    wanted = facts.pop(CHECKSUM, None)
    if not earlier and wanted != _tensors_checksum(tensors, facts):
        raise StoreError(
            f"checksum mismatch in {path}: the tensors are damaged; restore the file, or delete it and --resume"
        )
    check_identity(path, facts, place or {})
    return tensors


def save_trainer(path: Path, state: Mapping[str, object], **facts: str) -> None:
    """Write a trainer's state (tensors and plain values only) with facts."""
    import torch

    def save(temporary: Path) -> None:
        try:
            torch.save({**state, "facts": facts}, temporary)
        except RuntimeError as error:  # torch raises it when the disk is full
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error

    write_atomically(path, save)


def load_trainer(path: Path, place: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a trainer's state; no code in the file is run.

    Args:
        place: the expected identity (see `check_identity`).

    Raises:
        StoreError: the file is missing or damaged, or belongs to another place.
    """
    state, facts = trainer_and_facts(path)
    check_identity(path, facts, place or {})
    return state


def trainer_and_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A trainer's state and its facts."""
    import torch

    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums that it writes
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StoreError(f"expected a trainer's state at {path}, got {error}; delete it and --resume") from None
    except Exception:  # torch raises many types for a damaged file, most with advice that does not apply
        state = None
    # version 0.1.0 wrote no facts
    facts = state.pop("facts", {}) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(facts, dict) or state.keys() != {"epoch", "optimizer"}:
        raise StoreError(f"expected a trainer's state at {path}, got a damaged or foreign file; delete it and --resume")
    return state, {**facts, "epoch": str(state["epoch"])}
