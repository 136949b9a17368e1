"""Differences between two run folders that should hold the same run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from harness.store import LOCK, RunFolder
from harness.store.tables import read_part
from harness.store.tensors import load_tensors, load_trainer
from tests.forking import fork

# derived from the rows, or about the machine and the time
DERIVED = ("figures/", "report", "epochs.csv", "summary.csv", "brackets.csv", "manifest.json", LOCK)


@dataclass
class Comparison:
    """How much was compared, and the differences."""

    files: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)


def compare(folder: Path, whole: Path) -> Comparison:
    """Compare every part, checkpoint, trainer's state, witness and probe of two folders, bit for bit.

    Times are left out.
    """
    comparison = Comparison()
    ours, theirs = (_files(path) for path in (folder, whole))
    comparison.differences += [f"{name} is missing" for name in sorted(theirs - ours)]
    comparison.differences += [f"{name} is too many" for name in sorted(ours - theirs)]
    for name in sorted(ours & theirs):
        comparison.files += 1
        if name.endswith(".parquet"):
            comparison.rows += _compare_rows(name, folder, whole, comparison.differences)
            continue
        whole_files = load_file if name.startswith("checkpoints/") else load_tensors
        read = load_trainer if name.endswith(".trainer.pt") else whole_files
        if not _same(read(folder / name), read(whole / name)):
            comparison.differences.append(f"{name} has other values")
    for key in ("fingerprint", "config", "data", "seeds", "estimators", "certifiers"):
        if RunFolder(folder).read_manifest().get(key) != RunFolder(whole).read_manifest().get(key):
            comparison.differences.append(f"manifest.json has another {key}")
    return comparison


def compare_apart(folder: Path, whole: Path) -> Comparison:
    """Call `compare` in a forked process, as its libraries start threads and a process that forks must have none."""
    answer = folder.with_name(f"{folder.name}.compared") if folder.parent.exists() else whole.with_name("compared")
    child = fork()
    if child == 0:
        try:
            comparison = asdict(compare(folder, whole))
        except Exception as error:  # a file that cannot be read is a difference
            comparison = {"differences": [f"{type(error).__name__}: {error}"]}
        answer.write_text(json.dumps(comparison))
        os._exit(0)
    os.waitpid(child, 0)
    return Comparison(**json.loads(answer.read_text()))


def _files(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(DERIVED)}


def _compare_rows(name: str, folder: Path, whole: Path, differences: list[str]) -> int:
    (ours, our_facts), (theirs, their_facts) = read_part(folder / name), read_part(whole / name)
    if {**our_facts, "seconds": ""} != {**their_facts, "seconds": ""}:
        differences.append(f"{name} says other things of itself")
    ours, theirs = (table.drop(columns="seconds", errors="ignore") for table in (ours, theirs))
    if list(ours) != list(theirs) or len(ours) != len(theirs):
        differences.append(f"{name} has another shape")
        return len(theirs)
    for column in ours:
        one, other = ours[column].to_numpy(), theirs[column].to_numpy()
        equal = one == other
        if one.dtype.kind == "f":
            equal |= np.isnan(one) & np.isnan(other)
        if one.dtype != other.dtype or not equal.all():
            differences.append(f"{name} has other values of {column} in {int((~equal).sum())} rows")
    return len(theirs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
