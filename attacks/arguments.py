"""Checks of arguments: each returns a plain value, or raises a one-line error for a wrong type or value.

No torch: commands that do not need it check their arguments too.
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
    """A value for messages: its ``repr`` on one line, or its type's name if that is too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else type(value).__name__


def several(value: Any) -> list[Any]:
    """The items of an iterable; anything else, and a text, is a single item."""
    return [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)


def whole(what: str, value: object, least: int | None = None, most: int = LARGEST) -> int:
    """An integer of Python, NumPy or torch as a Python integer.

    Args:
        what: what the value is, for messages.
        least: if given, the value must be from ``least`` to ``most``.

    Raises:
        InputError: another type, including bool, or a value out of range.
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
    """Refuse values that are not a bool, such as a text, which would count as True.

    Raises:
        InputError: ``value`` is not a bool.
    """
    if not isinstance(value, bool):
        raise InputError(f"expected {what} as True or False, got {shown(value)}; give one of them")


def check_object(what: str, value: object, method: str) -> None:
    """Refuse values that are neither None nor an object with the method, including classes.

    Raises:
        InputError: ``value`` is neither.
    """
    if value is not None and (isinstance(value, type) or not callable(getattr(value, method, None))):
        raise InputError(f"expected {what} as an object with {method}, got {shown(value)}; make one, or leave it out")


def plain_path(what: str, value: object) -> Path:
    """A text or path as a ``Path``.

    Raises:
        InputError: another type.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"expected {what} as a path, got {shown(value)}; give a text or a pathlib.Path")
    return Path(value)


def check_choice(what: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is not one of ``known``.

    Raises:
        InputError: lists the known values.
    """
    if value not in known:
        raise InputError(f"expected a {what} of {', '.join(known)}, got {shown(value)}; choose one of them")


def plain_bounds(bounds: Any) -> tuple[float, float]:
    """The two ends of a pixel range as Python numbers.

    Raises:
        InputError: not two finite numbers, or the first is not below the second.
    """
    try:
        low, high = (end if type(end) is int else float(end) for end in bounds)
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
    """Refuse values that are not an estimator object, such as a text or a class.

    Raises:
        EstimatorError: ``estimator`` is not one.
    """
    if isinstance(estimator, type) or not callable(getattr(estimator, "perturb", None)):
        raise EstimatorError(
            f"expected an estimator object, got {shown(estimator)}; make one, as attacks.create('deepfool') does"
        )
