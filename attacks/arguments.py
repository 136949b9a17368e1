"""Checks of arguments: each returns a plain value or refuses in one line what has the wrong type or value.

No torch: commands that need none check what they are given too.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attacks.types import EstimatorError, InputError

LARGEST = 2**63 - 1


def shown(value: object) -> str:
    """A value as messages show it: one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else type(value).__name__


def several(given: Any) -> list[Any]:
    """The items of a list; anything else, such as a text, is one item."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def whole(what: str, value: object, least: int | None = None, most: int = LARGEST) -> int:
    """``value``, an integer of Python, NumPy or torch, as one of Python.

    Args:
        least: where it is given, the value is from there to ``most``.

    Raises:
        InputError: another type, a boolean too, or another value.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        number = None
    if number is None or (least is not None and number < least):
        wanted = "as a whole number" if least is None else f"of at least {least}"
        raise InputError(f"expected {what} {wanted}, got {shown(value)}; give a whole number")
    if least is not None and number > most:
        raise InputError(f"expected {what} of at most {most}, got {number}; give a smaller number")
    return number


def check_flag(what: str, value: object) -> None:
    """Refuse what is neither True nor False, such as a text, which would count as True.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"expected {what} as True or False, got {shown(value)}; give one of them")


def check_object(what: str, value: object, method: str) -> None:
    """Refuse what is neither None nor an object with the method; a class is refused too.

    Raises:
        InputError: it is neither.
    """
    if value is not None and (isinstance(value, type) or not callable(getattr(value, method, None))):
        raise InputError(f"expected {what} as an object with {method}, got {shown(value)}; make one, or leave it out")


def plain_path(what: str, value: object) -> Path:
    """A path, of a text too.

    Raises:
        InputError: neither.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"expected {what} as a path, got {shown(value)}; give a text or a pathlib.Path")
    return Path(value)


def check_choice(what: str, value: object, known: Sequence[str]) -> None:
    """Refuse an unknown word.

    Raises:
        InputError: names them.
    """
    if value not in known:
        raise InputError(f"expected a {what} of {', '.join(known)}, got {shown(value)}; choose one of them")


def plain_bounds(bounds: Any) -> tuple[float, float]:
    """The ends of a pixel range, in order, as numbers of Python.

    Raises:
        InputError: not two finite numbers, or the first is not below the second.
    """
    try:
        low, high = (one if type(one) is int else float(one) for one in bounds)
        right = not isinstance(bounds, str) and low < high and math.isfinite(high - low)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        right = False
    if not right:
        raise InputError(
            f"expected bounds as two finite numbers, the smaller one first, got {shown(bounds)}; give the range of the "
            "pixels, such as (0.0, 1.0)"
        )
    return low, high


def check_estimator(estimator: object) -> None:
    """Refuse anything but an estimator, such as a text or a class.

    Raises:
        EstimatorError: it is something else.
    """
    if isinstance(estimator, type) or not callable(getattr(estimator, "perturb", None)):
        raise EstimatorError(
            f"expected an estimator object, got {shown(estimator)}; make one, as attacks.create('deepfool') does"
        )
