"""Keep finished shards of unfinished units in the run folder, so that a killed run does not lose them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from attacks.estimator import Margins, Status, revision_of
from harness.store import RunFolder, Unit
from harness.store.identity import StoreError
from harness.store.places import Place
from harness.store.tensors import load_tensors, save_tensors
from harness.tasks import Outcome, Task

TEXTS = "texts"  # what is not a tensor, as the bytes of JSON


def keep_shard(folder: RunFolder, epoch: int, task: Task, outcome: Outcome, weights: str) -> None:
    """Write a shard's outcome."""
    values = vars(outcome.margins)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    texts = {name: list(map(str, value)) for name, value in values.items() if name not in tensors}
    said = json.dumps({**texts, "of": _identity(task, weights), "seconds": outcome.seconds})
    tensors[TEXTS] = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)
    save_tensors(_path(folder, epoch, task), tensors, **_facts(folder, epoch, task))


def find_shard(folder: RunFolder, epoch: int, task: Task, weights: str) -> Outcome | None:
    """A shard's outcome, if it is there, whole, and of this task and these weights."""
    path = _path(folder, epoch, task)
    if not path.exists():
        return None
    try:
        tensors = load_tensors(path, _facts(folder, epoch, task))
        said = json.loads(bytes(tensors.pop(TEXTS).tolist()))
        if said.pop("of") != _identity(task, weights):
            return None
        seconds, status = float(said.pop("seconds")), tuple(map(Status, said.pop("status")))
        margins = Margins(**tensors, status=status, message=tuple(said.pop("message")))
    except (StoreError, KeyError, ValueError, TypeError):
        return None  # it is only time that is lost
    return Outcome(margins, seconds)


def drop_shards(folder: RunFolder, epoch: int, unit: Unit) -> None:
    """Delete the shards of a unit, which is whole."""
    for path in folder.shards(epoch).glob(f"{_short(unit.filename)}.*.safetensors"):
        path.unlink(missing_ok=True)
    _drop_empty(folder.shards(epoch))


def drop_stale_shards(folder: RunFolder) -> None:
    """Delete shards of units that are whole: who wrote the last one was killed before it could."""
    for part in folder.margin_parts() if folder.shards(0).parent.exists() else ():
        shards = folder.shards(0).parent / part.parent.name
        for path in shards.glob(f"{_short(part.stem)}.*.safetensors"):
            path.unlink(missing_ok=True)
        _drop_empty(shards)


def _drop_empty(shards: Path) -> None:
    with contextlib.suppress(OSError):
        shards.rmdir()
        shards.parent.rmdir()


def _short(filename: str) -> str:
    """A unit in a shard's name, which is longer than a part's: some file systems end at 255 bytes."""
    return hashlib.sha256(filename.encode()).hexdigest()[:16]


def _identity(task: Task, weights: str) -> str:
    """The images' own seeds are those of the run's seed, the epoch, the split and the unit."""
    revision = revision_of(task.estimator)
    said = f"{weights} {task} {task.seeds} {task.options.batch_size} {task.options.noise_retries} {revision}"
    digest = hashlib.sha256(said.encode())
    if task.start is not None:
        digest.update(task.start.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _facts(folder: RunFolder, epoch: int, task: Task) -> dict[str, str]:
    return folder.facts(Place("shard", epoch, task.unit, task.split))


def _path(folder: RunFolder, epoch: int, task: Task) -> Path:
    place = f"{quote(task.split, safe='')}-{task.first}-{len(task.images)}"
    return folder.shards(epoch) / f"{_short(task.unit.filename)}.{place}.safetensors"
