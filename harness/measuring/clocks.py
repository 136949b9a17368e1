"""Clocks per unit, for engines that limit a unit's time."""

from __future__ import annotations

import time
from collections.abc import Collection

from harness.store import Unit
from harness.tasks import EngineError


class UnitClocks:
    """A clock for each unit, which begins with its first task.

    Attributes:
        limit: seconds that a unit may take, or None.
    """

    def __init__(self, limit: float | None) -> None:
        """Prepare.

        Raises:
            EngineError: a limit that is not above 0.
        """
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 < limit < float("inf")):
            raise EngineError(f"expected a unit timeout above 0 seconds, got {limit!r}; give another number")
        self.limit = limit
        self._began: dict[Unit, float] = {}

    def begin(self, unit: Unit) -> None:
        """A task of the unit begins."""
        self._began.setdefault(unit, time.monotonic())

    def patience(self) -> float | None:
        """Seconds until the first unit's time is over; None for ever."""
        if self.limit is None or not self._began:
            return None
        return max(min(self._began.values()) + self.limit - time.monotonic(), 0.0)

    def late(self, unfinished: Collection[Unit]) -> dict[Unit, float]:
        """Units whose time is over, with the seconds; their clocks end, and those of units that are done."""
        now = time.monotonic()
        self._began = {unit: began for unit, began in self._began.items() if unit in unfinished}
        over = {u: now - began for u, began in self._began.items() if self.limit and now - began >= self.limit}
        for unit in over:
            del self._began[unit]
        return over
