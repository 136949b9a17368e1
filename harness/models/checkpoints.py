"""Checkpoints that another training left, by epoch."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.config.options import ConfigError

NUMBER = re.compile(r"(\d+)")
# epoch=0, epoch_010, Epoch 3, ep12, but not step12
NAMED = re.compile(r"(?:epoch|(?<![a-z])ep)[^a-z\d]*(\d+)", re.IGNORECASE)
# a number that stands alone, unlike that of resnet18
ALONE = re.compile(r"(?<![a-z\d])\d+(?![a-z\d])", re.IGNORECASE)
# epochs are in file names; a larger number there is a step or a date
LARGEST = 1_000_000
SHOWN = 4


def existing_checkpoints(pattern: str) -> dict[int, Path]:
    """Files that a pattern such as ``ckpt/*.safetensors`` matches, by epoch, in order.

    The epoch is the number after ``epoch`` or ``ep`` in a file's name (``epoch=3-loss=0.90.ckpt``, ``net_ep12.pt``).
    Where no name says so, it is the only number that differs between the names (``resnet18_0.pt``, ``resnet18_1.pt``).
    A single file has the only number that stands alone in its name.

    Args:
        pattern: a file or folder that exists under a name with brackets in it is taken by that name.

    Raises:
        ConfigError: no file, an epoch twice, or a name that does not say its epoch.
    """
    paths = _matching(pattern)
    if not paths:
        raise ConfigError(f"expected files that --checkpoints matches, got none for {pattern!r}; quote the pattern")
    found: dict[int, Path] = {}
    for path, epoch in zip(paths, _epochs(paths), strict=True):
        if epoch in found:
            raise ConfigError(
                f"expected one checkpoint per epoch, got {found[epoch].name} and {path.name}; narrow --checkpoints"
            )
        found[epoch] = path
    return dict(sorted(found.items()))


def mapping_line(existing: Mapping[int, Path]) -> str:
    """Which file is taken for which epoch; of many files, the first ones and the last."""
    pairs = [f"{path.name} -> {epoch}" for epoch, path in existing.items()]
    more = len(pairs) - SHOWN
    if more > 0:
        pairs = [*pairs[: SHOWN - 1], f"... and {more} more", pairs[-1]]
    return f"checkpoints by epoch: {', '.join(pairs)}"


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern; a part that exists under exactly this name is taken literally."""
    given = Path(pattern)
    if given.is_file():
        return [given]
    literal = next(parent for parent in given.parents if parent.is_dir() or parent == parent.parent)
    rest = given.relative_to(literal)
    # where brackets match as a set of characters, they are one; else they stand for themselves
    for tried in (str(rest), str(rest).replace("[", "[[]")):
        found = glob.glob(os.path.join(glob.escape(str(literal)), tried), recursive=True)
        if files := sorted(path for path in map(Path, found) if path.is_file()):
            return files
    return []


def _epochs(paths: Sequence[Path]) -> list[int]:
    """The epoch of each file.

    Raises:
        ConfigError: a name that does not say it.
    """
    named = [set(map(int, NAMED.findall(path.stem))) for path in paths]
    if not any(named):
        named = [{number} for number in _varying(paths)]
    for path, numbers in zip(paths, named, strict=True):
        if len(numbers) != 1 or max(numbers) > LARGEST:
            raise ConfigError(
                f"expected an epoch in the name of every checkpoint, got {path.name}; rename it to say epoch-N, or "
                "narrow --checkpoints"
            )
    return [number for numbers in named for number in numbers]


def _varying(paths: Sequence[Path]) -> list[int]:
    """The only number that differs between names that are alike in all else; of one name, its only one.

    Raises:
        ConfigError: names a file that is unlike the others, or says that several numbers differ.
    """
    if len(paths) == 1:
        alone = ALONE.findall(paths[0].stem)
        return [int(alone[0]) if len(alone) == 1 else LARGEST + 1]
    pieces = [NUMBER.split(path.stem) for path in paths]
    words = [tuple(piece[::2]) for piece in pieces]
    usual = Counter(words).most_common(1)[0][0]
    for path, said in zip(paths, words, strict=True):
        if said != usual or len(usual) == 1:
            like = paths[words.index(usual)].name
            raise ConfigError(
                f"expected names of checkpoints that differ in the epoch alone, got {path.name} next to {like}; "
                "narrow --checkpoints, or rename them to say epoch-N"
            )
    numbers = list(zip(*([int(number) for number in piece[1::2]] for piece in pieces), strict=True))
    differing = [column for column in numbers if len(set(column)) > 1]
    if len(differing) > 1:
        raise ConfigError(
            f"expected names of checkpoints that differ in one number, got {paths[0].name} and {paths[-1].name}; "
            "rename them to say epoch-N"
        )
    return list(differing[0]) if differing else list(numbers[0])
