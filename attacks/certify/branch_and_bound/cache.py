"""Cache of brackets in a folder, one small JSON file each, checked when read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attacks.certify.branch_and_bound.bracket import Bracket, Budget

# raise with every change of the solver that may change its brackets
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a search, its wall time in seconds and its budget.

    Attributes:
        lower, upper, move, nodes: see `Bracket`; ``move`` is empty where ``upper`` is inf.
    """

    lower: float
    upper: float
    move: tuple[float, ...]
    nodes: int
    seconds: float
    budget: Budget

    @classmethod
    def of(cls, bracket: Bracket, seconds: float, budget: Budget) -> Record:
        """The record of a bracket."""
        return cls(
            lower=bracket.lower,
            upper=bracket.upper,
            move=tuple(bracket.move.tolist()) if math.isfinite(bracket.upper) else (),
            nodes=bracket.nodes,
            seconds=seconds,
            budget=budget,
        )

    def bracket(self) -> Bracket:
        """The recorded bracket."""
        return Bracket(lower=self.lower, upper=self.upper, move=np.array(self.move), nodes=self.nodes)


def path_of(folder: Path, question: Mapping[str, Any]) -> Path:
    """The file of a question: network, image, norm, domain and other arguments as plain values."""
    return folder / f"{_checksum(question)[:32]}.json"


def read_record(path: Path, question: Mapping[str, Any]) -> Record | None:
    """The record in a file; None if the file is missing, damaged or answers another question."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        body = content["body"]
        if content["checksum"] != _checksum(body) or body["question"] != dict(question):
            return None
        answer = body["answer"]
        return Record(**{**answer, "move": tuple(answer["move"]), "budget": Budget(**answer["budget"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def write_record(path: Path, question: Mapping[str, Any], record: Record) -> None:
    """Write the file whole or not at all."""
    body = {"question": dict(question), "answer": dataclasses.asdict(record)}
    text = json.dumps({"body": body, "checksum": _checksum(body)}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _checksum(value: object) -> str:
    """SHA-256 of plain values; floats are written with all digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
