"""Ways to damage a file, and hostile contents."""

from __future__ import annotations

import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

# replacements of the numbers and words in a text
WORDS = (
    *("NaN", "inf", "-inf", "1e999", "-1", "0", "1" * 400, "0x7f", "null", "None", "true", "[]", "{}", '""', "''"),
    *("🐍", "\u202e", "\ud7ff", "%s%n", "../../etc/passwd", "__import__('os')", "{{7*7}}", "a" * 5000, "[" * 3000),
    *("=", ":", ",", "+", "/", "\n", "\r\n", "\t", " "),
)
NUMBER = re.compile(rb"-?\d+(\.\d+)?(e-?\d+)?")
WORD = re.compile(rb"[A-Za-z_]+")


class Canary:
    """Unpickling it creates a file, which shows that code was run from data."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def hostile(canary: Path) -> list[bytes]:
    """Return pickles that run code when they are loaded."""
    bare = [pickle.dumps(Canary(canary), protocol=protocol) for protocol in (0, 2, 4)]
    inside = [pickle.dumps({"data": Canary(canary), "labels": [1]}, protocol=2), pickle.dumps([Canary(canary)] * 3)]
    return bare + inside


def in_torch_file(whole: Path, content: bytes) -> None:
    """Replace the pickle inside a torch file."""
    with zipfile.ZipFile(whole) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(whole, "w") as archive:
        for name, value in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else value)


def mutate(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Return the content after one to three kinds of damage.

    Args:
        others: undamaged files of other kinds, which replace the content in 2% of the cases.
    """
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = draw.choice(KINDS)(content, draw)
    return draw.choice(others) if draw.random() < 0.02 else content


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4, 16)) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[start + draw.randrange(1, 40) :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + draw.randbytes(draw.randrange(1, 40)) + content[start:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    piece = content[start : start + draw.randrange(1, 200)]
    return content[:start] + piece * draw.randrange(2, 6) + content[start:]


def _overwrite(content: bytes, draw: random.Random) -> bytes:
    start, piece = draw.randrange(len(content) + 1), draw.randrange(1, 16)
    value = draw.choice((b"\0", b"\xff", b"\x7f", b" "))
    return content[:start] + value * piece + content[start + piece :]


def _reword(content: bytes, draw: random.Random) -> bytes:
    """Replace a number or word by another value."""
    matches = list(draw.choice((NUMBER, WORD)).finditer(content))
    if not matches:
        return content
    place = draw.choice(matches)
    word = draw.choice(WORDS).encode("utf-8", "surrogatepass")
    return content[: place.start()] + word + content[place.end() :]


def _swap(content: bytes, draw: random.Random) -> bytes:
    """Swap two words or numbers."""
    matches = list(draw.choice((NUMBER, WORD)).finditer(content))
    if len(matches) < 2:
        return content
    one, other = sorted(draw.sample(matches, 2), key=lambda match: match.start())
    between = content[one.end() : other.start()]
    return content[: one.start()] + other.group() + between + one.group() + content[other.end() :]


KINDS = (_flip, _flip, _cut, _remove, _insert, _repeat, _overwrite, _reword, _reword, _swap)
