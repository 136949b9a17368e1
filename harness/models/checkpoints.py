"""Find the checkpoints of another training and read their epochs from the file names."""

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
# a number without letters next to it, unlike that of resnet18
ALONE = re.compile(r"(?<![a-z\d])\d+(?![a-z\d])", re.IGNORECASE)
# a larger number in a file name is not an epoch but a step or a date
LARGEST = 1_000_000
# pairs in `mapping_line`
SHOWN = 4


def existing_checkpoints(pattern: str) -> dict[int, Path]:
    """The files that a pattern such as ``ckpt/*.safetensors`` matches, by epoch, in ascending order.

    The epoch is the number after ``epoch`` or ``ep`` in a file name (``epoch=3-loss=0.90.ckpt``, ``net_ep12.pt``).
    If no name has one, the epoch is the only number that differs between the names (``resnet18_0.pt``,
    ``resnet18_1.pt``). For a single file it is the only number that stands alone in the name.

    Args:
        pattern: glob pattern. A part with brackets that exists as a file or folder is taken literally.

    Raises:
        ConfigError: no file matches, two files have the same epoch, or a name has no epoch.
    """
    paths = _matching(pattern)
    if not paths:
        raise ConfigError(f"expected files that --checkpoints matches, got none for {pattern!r}; quote the pattern")
    by_epoch: dict[int, Path] = {}
    for path, epoch in zip(paths, _epochs(paths), strict=True):
        if epoch in by_epoch:
            raise ConfigError(
                f"expected one checkpoint per epoch, got {by_epoch[epoch].name} and {path.name}; narrow --checkpoints"
            )
        by_epoch[epoch] = path
    return dict(sorted(by_epoch.items()))


def mapping_line(existing: Mapping[int, Path]) -> str:
    """One line that says which file is used for which epoch; of many files, the first ones and the last."""
    pairs = [f"{path.name} -> {epoch}" for epoch, path in existing.items()]
    more = len(pairs) - SHOWN
    if more > 0:
        pairs = [*pairs[: SHOWN - 1], f"... and {more} more", pairs[-1]]
    return f"checkpoints by epoch: {', '.join(pairs)}"


def _matching(pattern: str) -> list[Path]:
    """The files that a pattern matches; a part that exists under exactly this name is taken literally."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    literal = next(parent for parent in path.parents if parent.is_dir() or parent == parent.parent)
    rest = path.relative_to(literal)
    # brackets are first read as a set of characters, then literally
    for form in (str(rest), str(rest).replace("[", "[[]")):
        matches = glob.glob(os.path.join(glob.escape(str(literal)), form), recursive=True)
        if files := sorted(match for match in map(Path, matches) if match.is_file()):
            return files
    return []


def _epochs(paths: Sequence[Path]) -> list[int]:
    """The epoch of each file.

    Raises:
        ConfigError: a name without an epoch.
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
    """The only number that differs between names that are otherwise equal; of a single name, its only number.

    Raises:
        ConfigError: a file's name differs in more than numbers, or several numbers differ.
    """
    if len(paths) == 1:
        alone = ALONE.findall(paths[0].stem)
        return [int(alone[0]) if len(alone) == 1 else LARGEST + 1]
    pieces = [NUMBER.split(path.stem) for path in paths]
    words = [tuple(piece[::2]) for piece in pieces]
    usual = Counter(words).most_common(1)[0][0]
    for path, between in zip(paths, words, strict=True):
        if between != usual or len(usual) == 1:
            other = paths[words.index(usual)].name
            raise ConfigError(
                f"expected names of checkpoints that differ in the epoch alone, got {path.name} next to {other}; "
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
