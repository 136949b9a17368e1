"""Bounds of a ReLU network around an image: intervals, then linear bounds propagated backwards.

Zhang et al. 2018 (CROWN), https://arxiv.org/abs/1811.00866, on dense blocks. Departs from it: the region may also be
cut by a half-space that contains every sought point, which tightens the bounds of all layers (as Kotha et al. 2023,
https://arxiv.org/abs/2302.01404, do with output constraints); and a lower line may have either slope. All bounds hold
in exact arithmetic, since an allowance for float64 rounding is added to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attacks.certify.branch_and_bound.region import Array, HalfSpace, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A network, an image ``(n,)`` and the region of moves for which bounds must hold."""

    network: ReluNetwork
    image: Array
    region: Region

    @cached_property
    def doubts(self) -> tuple[Array, ...]:
        """See `ReluNetwork.doubts`."""
        return self.network.doubts(np.abs(self.image) + self.region.reach())


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Lower and upper bounds of the pre-activations of every hidden layer, ``(n_l,)`` each.

    Attributes:
        linear: see `ReluNetwork`.
    """

    low: tuple[Array, ...]
    high: tuple[Array, ...]
    linear: tuple[NDArray[np.bool_], ...]

    def unstable(self, layer: int) -> NDArray[np.bool_]:
        """The ReLUs of a layer whose bounds have both signs: ``(n_l,)`` bool."""
        loose: NDArray[np.bool_] = (self.low[layer] < 0) & (self.high[layer] > 0)
        return loose & ~self.linear[layer] if self.linear else loose

    def stable(self) -> bool:
        """Whether no unit is unstable, so that the network is affine on the region."""
        return not any(self.unstable(layer).any() for layer in range(len(self.low)))

    def empty(self) -> bool:
        """Whether bounds contradict one another, so that the region contains no point."""
        return any(bool((low > high).any()) for low, high in zip(self.low, self.high, strict=True))

    def replace(self, layer: int, low: Array, high: Array) -> Bounds:
        """These bounds with those of one layer replaced."""
        return Bounds(
            low=(*self.low[:layer], low, *self.low[layer + 1 :]),
            high=(*self.high[:layer], high, *self.high[layer + 1 :]),
            linear=self.linear,
        )


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Linear upper bounds ``offsets + rows @ d`` of functionals of the network, for every move d of the region.

    Attributes:
        rows: ``(m, n)``. offsets: ``(m,)``.
        slack: per hidden layer ``(m_l, n_l)``, the contribution of each unit's chord to the first m_l functionals.
    """

    rows: Array
    offsets: Array
    slack: tuple[Array, ...]


def upper_lines(
    around: Surroundings,
    bounds: Bounds,
    slopes: Sequence[Array],
    functionals: Array,
    depth: int,
    signs: Sequence[Array] = (),
) -> Lines:
    """Upper bounds of ``functionals @ z_depth`` and, after them, of ``sign * z`` for the units with a sign.

    Args:
        slopes: per hidden layer before ``depth`` ``(n_l,)``, of the line through 0 below an unstable ReLU.
        functionals: ``(m, n_depth)``.
        signs: per hidden layer ``(n_l,)``: 1 for a unit that must be on, -1 off, 0 for either; empty for no signs.

    Returns:
        Lines of the functionals first, then of the units with a sign, from the last layer to the first.
    """
    network = around.network
    a, c = functionals @ network.weights[depth], functionals @ network.biases[depth]
    c = c + np.abs(functionals) @ around.doubts[depth]
    slack: list[Array] = []
    for layer in range(depth - 1, -1, -1):
        low, high = np.minimum(bounds.low[layer], 0.0), np.maximum(bounds.high[layer], 0.0)
        if network.linear:
            low, high = np.where(network.linear[layer], 0.0, low), np.where(network.linear[layer], 1.0, high)
        # the chord from (low, 0) to (high, high), which is exact for stable units
        chord = np.divide(high, high - low, out=np.zeros_like(high), where=high > low)
        rest = -chord * low
        below = np.where(low == 0, chord, np.where(high == 0, 0.0, slopes[layer]))
        above = np.maximum(a, 0.0)
        slack.append(above * rest)
        c = c + slack[-1].sum(1)
        a = above * chord + (a - above) * below
        if len(signs):
            signed = np.flatnonzero(signs[layer])
            unit_rows = np.zeros((len(signed), a.shape[1]))
            unit_rows[np.arange(len(signed)), signed] = signs[layer][signed]
            a, c = np.concatenate([a, unit_rows]), np.concatenate([c, around.doubts[layer][signed]])
        c = c + a @ network.biases[layer]
        a = a @ network.weights[layer]
    return Lines(rows=a, offsets=c + a @ around.image, slack=tuple(reversed(slack)))


def interval_bounds(around: Surroundings) -> Bounds:
    """Bounds by interval arithmetic; those of the first layer are exact, in L2 with the box very nearly."""
    lows: list[Array] = []
    highs: list[Array] = []
    for layer in range(around.network.hidden):
        weight, bias = around.network.weights[layer], around.network.biases[layer]
        if layer == 0:
            centre = weight @ around.image + bias
            up, down = around.region.most(weight), around.region.most(-weight)
        else:
            network = around.network
            least, most = network.activated(layer - 1, lows[-1]), network.activated(layer - 1, highs[-1])
            centre = weight @ ((least + most) / 2) + bias
            up = down = np.abs(weight) @ ((most - least) / 2)
        lows.append(centre - down - around.doubts[layer])
        highs.append(centre + up + around.doubts[layer])
    return Bounds(low=tuple(lows), high=tuple(highs), linear=around.network.linear)


def tighten(around: Surroundings, bounds: Bounds, within: HalfSpace | None = None, first: int = 0) -> Bounds:
    """Tighten the bounds of unstable units by lines, on the part of the region in a half-space.

    Args:
        bounds: known bounds; the result is never looser.
        first: layers before this one keep their bounds.
    """
    slopes: list[Array] = []
    for layer in range(around.network.hidden):
        loose = np.flatnonzero(bounds.unstable(layer))
        if layer >= first and len(loose):
            units = np.zeros((2 * len(loose), len(around.network.biases[layer])))
            units[np.arange(len(loose)), loose] = 1.0
            units[len(loose) + np.arange(len(loose)), loose] = -1.0
            lines = upper_lines(around, bounds, slopes, units, layer)
            most = lines.offsets + around.region.most(lines.rows, within)
            low, high = bounds.low[layer].copy(), bounds.high[layer].copy()
            high[loose] = np.minimum(high[loose], most[: len(loose)])
            low[loose] = np.maximum(low[loose], -most[len(loose) :])
            bounds = bounds.replace(layer, low, high)
        slopes.append(steeper_slopes(bounds, layer))
    return bounds


def steeper_slopes(bounds: Bounds, layer: int) -> Array:
    """Slopes ``(n_l,)`` of the lower lines, 0 or 1, whichever encloses the smaller area with the ReLU."""
    return (bounds.high[layer] > -bounds.low[layer]).astype(np.float64)
