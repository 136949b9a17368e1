"""Piecewise linear nonlinearities between affine blocks: their interval bounds and the lines that relax them.

To bound a functional from above, its positive part uses a line above the function and its negative part a line below
it (Zhang et al. 2018, CROWN, https://arxiv.org/abs/1811.00866, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.certify.network.intervals import Intervals
from attacks.certify.network.tracing import Operation, Value


class Nonlinearity(Protocol):
    """A piecewise linear function of a block's result."""

    @property
    def least_slope(self) -> float:
        """The smallest slope of a lower line; the largest is 1."""

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one image's output, from that of its input."""

    def intervals(self, inputs: Intervals) -> Intervals:
        """Bounds of the output for inputs within bounds."""

    def unstable(self, bounds: Intervals) -> Tensor:
        """``(B, n)`` bool: the inputs whose bounds are worth tightening."""

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> Lines:
        """Upper and lower lines for inputs within ``bounds``; ``slopes`` of the lower lines where they are free."""

    def slopes(self, bounds: Intervals) -> Tensor | None:
        """The default slopes of the lower lines; None where no slope is free."""


class Lines(Protocol):
    """Bounds of a nonlinearity's output that are linear in its inputs."""

    def pull(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Functionals ``(B, m, n_out)`` of the output -> ``(B, m, n_in)`` of the inputs and offsets ``(B, m)``.

        The new functional plus the offset is an upper bound of the old one.
        """


@dataclass(frozen=True)
class Leaky:
    """``max(z, slope * z)``: ReLU at slope 0, LeakyReLU otherwise."""

    slope: float = 0.0

    @property
    def least_slope(self) -> float:
        """See `Nonlinearity`."""
        return self.slope

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """See `Nonlinearity`."""
        return inputs

    def intervals(self, inputs: Intervals) -> Intervals:
        """See `Nonlinearity`."""
        return Intervals(self._value(inputs.low), self._value(inputs.high))

    def unstable(self, bounds: Intervals) -> Tensor:
        """Inputs whose bounds contain 0 in their interior."""
        low, high = bounds.flat()
        return (low < 0) & (high > 0)

    def slopes(self, bounds: Intervals) -> Tensor:
        """The slope ``(B, n)`` of the piece that encloses the smaller area with the function."""
        low, high = bounds.flat()
        return torch.where(high > -low, 1.0, self.slope).to(low.dtype)

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> Chords:
        """The chord as upper line and a line through 0 as lower line; the function itself where it is linear."""
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
    """Lines of `Leaky`, ``(B, n)`` each: slope of the upper line, its value at 0, slope of the lower line."""

    chord: Tensor
    rest: Tensor
    below: Tensor

    def of(self, places: Tensor) -> Chords:
        """The lines of selected inputs ``(G, p)``, in groups: ``(B * G, p)``."""
        return Chords(*(values[:, places].flatten(0, 1) for values in (self.chord, self.rest, self.below)))

    def pull(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Lines`."""
        above = rows.clamp_min(0.0)
        offsets = (above @ self.rest[..., None])[..., 0]
        return above * self.chord[:, None] + (rows - above) * self.below[:, None], offsets


@dataclass(frozen=True)
class MaxPool:
    """``nn.MaxPool2d``: the window's largest upper bound above, the pixel of the largest lower bound below."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    least_slope = 0.0

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """See `Nonlinearity`."""
        return tuple(self._pool(torch.zeros(1, *inputs)).shape[1:])

    def intervals(self, inputs: Intervals) -> Intervals:
        """See `Nonlinearity`."""
        return Intervals(self._pool(inputs.low), self._pool(inputs.high))

    def unstable(self, bounds: Intervals) -> Tensor:
        """Pixels of which it is undecided whether they are the largest of a window."""
        windows, places = self._windows(bounds)
        low, high = windows
        contested = (high >= low.amax(2, keepdim=True)) & (high > -torch.inf)
        contested &= contested.sum(2, keepdim=True) > 1
        counts = torch.zeros_like(bounds.low.flatten(1))
        # padding has the index of pixel 0; it is never contested, so that it does not mark that pixel
        return counts.scatter_add(1, places.flatten(1), contested.flatten(1).to(counts.dtype)) > 0

    def slopes(self, bounds: Intervals) -> None:
        """No slope is free."""
        return

    def lines(self, bounds: Intervals, slopes: Tensor | None) -> _Windows:
        """A constant as upper line, or the pixel that is certainly the largest; one pixel as lower line."""
        (low, high), places = self._windows(bounds)
        winner = low.argmax(2, keepdim=True)
        others = high.scatter(2, winner, -torch.inf).amax(2, keepdim=True)
        certain = low.gather(2, winner) >= others
        place = torch.gather(places.expand(len(low), -1, -1, -1), 2, winner)
        rest = torch.where(certain, 0.0, high.amax(2, keepdim=True))
        size = bounds.low[0].numel()
        return _Windows(place.flatten(1), certain.flatten(1), rest.flatten(1), size)

    def filled(self, inputs: Tensor) -> bool:
        """Whether every window of ``inputs`` ``(1, C, H, W)`` holds a pixel."""
        return bool(self._pool(torch.zeros_like(inputs)).isfinite().all())

    def windows(self, inputs: Tensor) -> list[list[int]]:
        """The places of each window's pixels in the flattened ``inputs`` ``(1, C, H, W)``, without the padding."""
        bounds = Intervals(torch.zeros_like(inputs), torch.zeros_like(inputs))
        (low, _), places = self._windows(bounds)
        real = (low[0] > -torch.inf).transpose(1, 2).flatten(0, 1).tolist()
        pixels = places[0].transpose(1, 2).flatten(0, 1).tolist()
        return [[p for p, there in zip(*window, strict=True) if there] for window in zip(pixels, real, strict=True)]

    def _pool(self, values: Tensor) -> Tensor:
        return F.max_pool2d(values, self.kernel, self.stride, self.padding, self.dilation)

    def _windows(self, bounds: Intervals) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Bounds ``(B, C, k, L)`` of the pixels of every window, -inf in the padding, and the pixels' indices."""
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


def nonlinearity_of(operation: Operation) -> Nonlinearity | None:
    """The nonlinearity that an operation computes; None if it is not a supported one."""
    rest = operation.args[1:]
    if len(operation.values) != 1 or not isinstance(operation.args[0], Value):
        return None
    plain = all(argument is None or isinstance(argument, int | float) for argument in rest)
    if operation.name == "relu" or (operation.name in ("clamp", "clamp_min") and plain and rest in ((0,), (0, None))):
        return Leaky()
    if operation.name == "leaky_relu":
        slope = rest[0] if rest else 0.01
        return Leaky(slope) if 0 <= slope <= 1 else None
    if operation.name == "max_pool2d_with_indices":
        defaults: tuple[Any, ...] = (None, None, 0, 1, False)
        kernel, stride, padding, dilation, ceil_mode = rest + defaults[len(rest) :]
        # an empty stride means the kernel's size
        return None if ceil_mode else MaxPool(*map(_pair, (kernel, stride or kernel, padding, dilation)))
    return None


def _pair(value: Any) -> tuple[int, int]:
    """Both sides from one number, alone or in a list, or from two."""
    sides = [value] if isinstance(value, int) else list(value)
    return int(sides[0]), int(sides[-1])
