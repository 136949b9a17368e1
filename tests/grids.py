"""Grids of test parameters: the default cells cover every value; the other cells are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def covering(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Cells (first, second); the cells that are not slow contain each value of the longer axis once.

    The values of the shorter axis alternate. A value may be a ``pytest.param`` of one value; its cells keep its marks.
    """
    rows, columns = [_cell(value) for value in first], [_cell(value) for value in second]
    grid = []
    for i, (one, marks) in enumerate(rows):
        for j, (other, more) in enumerate(columns):
            ordinary = i % len(columns) == j if len(rows) >= len(columns) else j % len(rows) == i
            slow = () if ordinary else (pytest.mark.slow,)
            grid.append(pytest.param(one, other, marks=(*marks, *more, *slow)))
    return grid


def _cell(value: Any) -> tuple[Any, tuple[Any, ...]]:
    return (
        (value.values[0], tuple(value.marks)) if hasattr(value, "marks") and hasattr(value, "values") else (value, ())
    )
