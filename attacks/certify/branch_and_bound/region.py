"""Regions of moves from an image: a norm ball intersected with the box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attacks.types import Norm

Array = NDArray[np.float64]

TINY = float(np.finfo(np.float64).tiny)
# relative error of float64 sums of a few thousand products, as a fraction of the sum of absolute values
ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class HalfSpace:
    """Moves ``d`` with ``normal @ d >= gap``; ``normal`` ``(n,)``."""

    normal: Array
    gap: float


@dataclass(frozen=True, kw_only=True)
class Region:
    """Moves ``d`` ``(n,)`` with ``||d|| <= radius`` and ``low <= d <= high``.

    Attributes:
        low, high: ``(n,)`` the limits of each pixel's move down (at most 0) and up (at least 0); all infinite in the
            free domain.
    """

    norm: Norm
    radius: float
    low: Array
    high: Array

    @property
    def boxed(self) -> bool:
        """Whether the region is limited by a box, which may be smaller than the ball."""
        return bool(np.isfinite(self.high).all())

    def reach(self) -> Array:
        """The largest move of each pixel: ``(n,)``."""
        farthest: Array = np.minimum(np.maximum(-self.low, self.high), self.radius)
        return farthest

    def length(self, move: Array) -> float:
        """The norm of a move ``(n,)``."""
        return float(np.abs(move).max() if self.norm == "linf" else np.sqrt(move @ move))

    def dual(self, rows: Array) -> Array:
        """Dual norms ``(m,)`` of ``rows`` ``(m, n)``: the largest gain of a move of length 1."""
        size: Array = np.abs(rows).sum(1) if self.norm == "linf" else np.sqrt((rows * rows).sum(1))
        return size

    def most(self, rows: Array, within: HalfSpace | None = None) -> Array:
        """Upper bounds ``(m,)`` of ``rows @ d``, rows ``(m, n)``, over the part of the region in a half-space.

        By weak duality ``max(a @ d) <= max((a + s g) @ d) - s gap`` for any ``s >= 0``. The bound holds for any
        multipliers s; the chosen ones make it exact, in L2 only where the box is not active.
        """
        if within is None:
            return self._most(rows)
        multipliers = self._multipliers(rows, within)
        size = abs(within.gap) + float(self.dual(within.normal[None])[0]) * self.radius
        doubt = ROUNDING * multipliers * size
        bound: Array = self._most(rows + multipliers[:, None] * within.normal) - multipliers * within.gap + doubt
        return bound

    def nearest(self, half_space: HalfSpace) -> tuple[float, Array]:
        """The length of the shortest move into a half-space, whatever the radius, and the move ``(n,)``.

        Every pixel moves by ``min(t, room_i)`` (L-infinity) or ``min(t |g_i|, room_i)`` (L2) in the direction of the
        gain, as in `attacks.affine`. The length is inf where the box does not reach the half-space.
        """
        g, gap = half_space.normal, half_space.gap
        move = np.zeros_like(g)
        if gap <= 0:
            return 0.0, move
        useful = np.flatnonzero(g * g > 0)
        slope, room = np.abs(g[useful]), np.where(g[useful] > 0, self.high[useful], -self.low[useful])
        rate, limit = (slope, room) if self.norm == "linf" else (slope * slope, room / slope)
        order = np.argsort(limit)
        capped = (rate * limit)[order]
        left = rate[order][::-1].cumsum()[::-1]
        done = np.concatenate([[0.0], capped.cumsum()])[:-1]
        # done + left * limit: the gain at t = limit[i], where pixel i reaches its limit
        piece = int(np.searchsorted(done + left * limit[order], gap))
        if piece == len(limit):
            return np.inf, move
        t = (gap - done[piece]) / left[piece]
        step = np.minimum(t if self.norm == "linf" else t * slope, room)
        move[useful] = np.sign(g[useful]) * step
        return (float(t) if self.norm == "linf" else float(np.sqrt(step @ step))), move

    def _most(self, rows: Array) -> Array:
        slope, room = np.abs(rows), np.where(rows > 0, self.high, -self.low)
        if self.norm == "linf":
            bound: Array = (slope * np.minimum(room, self.radius)).sum(1)
        elif self.boxed:
            bound = _most_l2(slope, room, self.radius)
        else:
            bound = self.radius * np.sqrt((slope * slope).sum(1))
        return bound

    def _multipliers(self, rows: Array, within: HalfSpace) -> Array:
        if self.norm == "linf":
            return self._multipliers_linf(rows, within)
        size = max(float(np.sqrt(within.normal @ within.normal)), TINY)
        away = within.gap / size
        if abs(away) >= self.radius:
            return np.zeros(len(rows))
        along = rows @ within.normal / size
        across = np.sqrt(np.maximum((rows * rows).sum(1) - along * along, 0.0))
        # the maximum over a cap of the ball lies on its rim, at away and sqrt(radius^2 - away^2)
        wanted: Array = across * (away / np.sqrt(self.radius * self.radius - away * away)) - along
        return np.maximum(wanted, 0.0) / size

    def _multipliers_linf(self, rows: Array, within: HalfSpace) -> Array:
        """From the best move for the row alone, pixels are reversed in order of cost until the half-space is met."""
        g = within.normal
        low, high = np.maximum(self.low, -self.radius), np.minimum(self.high, self.radius)
        favoured = np.where(rows > 0, high, np.where(rows < 0, low, np.where(g > 0, high, low)))
        missing = within.gap - favoured @ g
        against = rows * g < 0
        price = np.divide(np.abs(rows), np.abs(g), out=np.full_like(rows, np.inf), where=against)
        order = np.argsort(price, axis=1)
        gain = np.where(against, np.abs(g) * (high - low), 0.0)
        gained = np.take_along_axis(gain, order, 1).cumsum(1)
        turned = np.minimum((gained < missing[:, None]).sum(1), len(g) - 1)
        last = np.take_along_axis(price, np.take_along_axis(order, turned[:, None], 1), 1)[:, 0]
        return np.where((missing > 0) & np.isfinite(last), last, 0.0)


def _most_l2(slope: Array, room: Array, radius: float) -> Array:
    """``max slope @ d`` over ``0 <= d <= room``, ``||d||_2 <= radius``, for each row.

    For any ``t > 0`` the value is at most ``sum_i (v_i d_i - d_i^2 / 2t) + radius^2 / 2t`` with
    ``d_i = min(t v_i, room_i)``; it is exact where ``||d|| = radius``, which t approaches from below.
    """
    square = radius * radius
    weight, limit = slope * slope, room * room
    total = weight.sum(1)
    t2 = np.divide(square, total, out=np.ones_like(total), where=total > TINY)
    for _ in range(4):
        free = t2[:, None] * weight < limit
        left = np.where(free, weight, 0.0).sum(1)
        rest = square - np.where(free, 0.0, limit).sum(1)
        # where all pixels are at their limits, t does not matter
        np.divide(np.maximum(rest, t2 * left), left, out=t2, where=left > TINY)
    t = np.sqrt(t2)
    move = np.minimum(t[:, None] * slope, room)
    spare = np.maximum(square - (move * move).sum(1), 0.0) / (2 * np.maximum(t, TINY))
    bound: Array = np.minimum((slope * move).sum(1) + spare, (slope * room).sum(1))
    return bound
