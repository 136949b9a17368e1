"""The piecewise linear functions between affine blocks: their values on intervals and the lines that bound them.

Of a functional that is to be bounded from above, a positive part needs a line above the function, a negative one a line
below it (Zhang et al. 2018, CROWN, https://arxiv.org/abs/1811.00866, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.certify.network.intervals import Intervals
from attacks.certify.network.tracing import Operation, Value


class Kink(Protocol):
    """A piecewise linear function of a block's result."""

    @property
    def least_slope(self) -> float:
        """Of a line below; the largest is 1."""

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """Of an image's outcome."""

    def intervals(self, inputs: Intervals) -> Intervals:
        """What the outcome lies between."""

    def unstable(self, bounds: Intervals) -> Tensor:
        """Inputs ``(B, n)`` whose bounds are worth tightening."""

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> Lines:
        """Lines above and below, for inputs within ``bounds``; ``slopes`` of those below, where they are free."""

    def slopes(self, bounds: Intervals) -> Tensor | None:
        """The slopes to use where there is no better choice; None where none is free."""


class Lines(Protocol):
    """Bounds of one kink's outcome that are linear in its inputs."""

    def pull(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Functionals ``(B, m, n_out)`` of the outcome -> ``(B, m, n_in)`` of the inputs and offsets ``(B, m)``.

        The new functional plus the offset is nowhere below the old one.
        """


@dataclass(frozen=True)
class Leaky:
    """``max(z, slope * z)``: ReLU at slope 0."""

    slope: float = 0.0

    @property
    def least_slope(self) -> float:
        """Of a line below."""
        return self.slope

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """Of an image's outcome."""
        return inputs

    def intervals(self, inputs: Intervals) -> Intervals:
        """What the outcome lies between."""
        return Intervals(self._value(inputs.low), self._value(inputs.high))

    def unstable(self, bounds: Intervals) -> Tensor:
        """Inputs on either side of 0."""
        low, high = bounds.flat()
        return (low < 0) & (high > 0)

    def slopes(self, bounds: Intervals) -> Tensor:
        """Of the two pieces, the one with the smaller area between it and the function: ``(B, n)``."""
        low, high = bounds.flat()
        return torch.where(high > -low, 1.0, self.slope).to(low.dtype)

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> Chords:
        """The chord above, a line through 0 below; the function itself where it is linear."""
        low, high = bounds.flat()
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
        start = self._value(low)
        chord = torch.where(high > low, (high - start) / (high - low).clamp_min(torch.finfo(low.dtype).tiny), 1.0)
        chord = torch.where(low == 0, 1.0, torch.where(high == 0, self.slope, chord))
        free = self.slopes(bounds) if slopes is None else slopes
        below = torch.where((low == 0) | (high == 0), chord, free)
        return Chords(chord, start - chord * low, below)

    def _value(self, inputs: Tensor) -> Tensor:
        return torch.maximum(inputs, self.slope * inputs)


@dataclass(frozen=True)
class Chords:
    """Of `Leaky`, ``(B, n)`` each: the slope of the line above, its value at 0 and the slope of the line below."""

    chord: Tensor
    rest: Tensor
    below: Tensor

    def of(self, places: Tensor) -> Chords:
        """Those of some inputs ``(G, p)`` in groups: ``(B * G, p)``."""
        return Chords(*(one[:, places].flatten(0, 1) for one in (self.chord, self.rest, self.below)))

    def pull(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Lines`."""
        above = rows.clamp_min(0.0)
        offsets = (above @ self.rest[..., None])[..., 0]
        return above * self.chord[:, None] + (rows - above) * self.below[:, None], offsets


@dataclass(frozen=True)
class MaxPool:
    """``nn.MaxPool2d``: above, the window's largest upper bound; below, the pixel with the largest lower bound."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    least_slope = 0.0

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """Of an image's outcome."""
        return tuple(self._pool(torch.zeros(1, *inputs)).shape[1:])

    def intervals(self, inputs: Intervals) -> Intervals:
        """What the outcome lies between."""
        return Intervals(self._pool(inputs.low), self._pool(inputs.high))

    def unstable(self, bounds: Intervals) -> Tensor:
        """Pixels that may, and need not, be the largest of a window."""
        windows, places = self._windows(bounds)
        low, high = windows
        contested = (high >= low.amax(2, keepdim=True)) & (high > -torch.inf)
        contested &= contested.sum(2, keepdim=True) > 1
        found = torch.zeros_like(bounds.low.flatten(1))
        # places of padding point to pixel 0, which they must not mark
        return found.scatter_add(1, places.flatten(1), contested.flatten(1).to(found.dtype)) > 0

    def slopes(self, bounds: Intervals) -> None:
        """None is free."""
        return

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> _Windows:
        """A constant above, or the pixel that is the largest for certain; one pixel below."""
        (low, high), places = self._windows(bounds)
        winner = low.argmax(2, keepdim=True)
        others = high.scatter(2, winner, -torch.inf).amax(2, keepdim=True)
        certain = low.gather(2, winner) >= others
        place = torch.gather(places.expand(len(low), -1, -1, -1), 2, winner)
        rest = torch.where(certain, 0.0, high.amax(2, keepdim=True))
        size = bounds.low[0].numel()
        return _Windows(place.flatten(1), certain.flatten(1), rest.flatten(1), size)

    def _pool(self, values: Tensor) -> Tensor:
        return F.max_pool2d(values, self.kernel, self.stride, self.padding, self.dilation)

    def _windows(self, bounds: Intervals) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Bounds ``(B, C, k, L)`` of every window's pixels, -inf in the padding, and the pixels' indices."""
        channels, height, width = bounds.low.shape[1:]
        index = torch.arange(channels * height * width, device=bounds.low.device, dtype=bounds.low.dtype)
        places = self._unfold(index.view(1, channels, height, width), 0.0).long()
        return (self._unfold(bounds.low, -torch.inf), self._unfold(bounds.high, -torch.inf)), places

    def _unfold(self, values: Tensor, padding: float) -> Tensor:
        rows, columns = self.padding
        padded = F.pad(values, (columns, columns, rows, rows), value=padding)
        count, channels = values.shape[:2]
        return F.unfold(padded, self.kernel, self.dilation, 0, self.stride).view(
            count, channels, self.kernel[0] * self.kernel[1], -1
        )


@dataclass(frozen=True)
class _Windows:
    place: Tensor
    certain: Tensor
    rest: Tensor
    size: int

    def pull(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        above = rows.clamp_min(0.0)
        offsets = torch.einsum("bmn,bn->bm", above, self.rest)
        linear = torch.where(self.certain[:, None], rows, rows - above)
        pulled = rows.new_zeros(*rows.shape[:2], self.size)
        return pulled.scatter_add(2, self.place[:, None].expand_as(linear), linear), offsets


def kink_of(operation: Operation) -> Kink | None:
    """None where the operation is no kink that is known."""
    rest = operation.args[1:]
    if len(operation.values) != 1 or not isinstance(operation.args[0], Value):
        return None
    plain = all(one is None or isinstance(one, int | float) for one in rest)
    if operation.name == "relu" or (operation.name in ("clamp", "clamp_min") and plain and rest in ((0,), (0, None))):
        return Leaky()
    if operation.name == "leaky_relu":
        slope = rest[0] if rest else 0.01
        return Leaky(slope) if 0 <= slope <= 1 else None
    if operation.name == "max_pool2d_with_indices":
        defaults: tuple[Any, ...] = (None, None, 0, 1, False)
        kernel, stride, padding, dilation, ceil_mode = rest + defaults[len(rest) :]
        # an empty stride is the kernel's size
        return None if ceil_mode else MaxPool(*map(_pair, (kernel, stride or kernel, padding, dilation)))
    return None


def _pair(value: Any) -> tuple[int, int]:
    """Of a number for both sides, alone or in a list, or of two."""
    sides = [value] if isinstance(value, int) else list(value)
    return int(sides[0]), int(sides[-1])
