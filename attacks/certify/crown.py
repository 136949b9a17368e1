"""Lower bounds of margins by linear relaxation, for any network of affine blocks and piecewise linear kinks.

Zhang et al. 2018 (CROWN), https://arxiv.org/abs/1811.00866: every kink is bounded by two lines, and functionals of the
network are carried back through them to the image. Intervals come first, and lines only where they leave a kink open
(Zhang et al. 2020, CROWN-IBP, https://arxiv.org/abs/1906.06316, stops there: `crown` with ``inner="ibp"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.certify.ball import ROUNDING, Balls, gain_of_short_rows
from attacks.certify.network.blocks import Local
from attacks.certify.network.intervals import Intervals
from attacks.certify.network.nonlinearities import Chords
from attacks.certify.network.piecewise import PiecewiseNetwork

# entries of one array of functionals: 256 MiB
LARGEST = 2**25
# entries of the functionals of all units of a block beyond which its bounds are not tightened again for a cut
LARGEST_CUT = 2**20


@dataclass(frozen=True)
class Relaxation:
    """Bounds of every kink's inputs on balls, from which lines follow.

    Attributes:
        bounds: ``(B, *shape)`` of each block but the last.
        empty: ``(B,)`` whether no point is left of the balls; their bounds mean nothing then.
    """

    network: PiecewiseNetwork
    around: Balls
    bounds: Sequence[Intervals]
    empty: Tensor

    def above(self, block: int, rows: Tensor, slopes: Sequence[Tensor | None] = ()) -> tuple[Tensor, Tensor]:
        """Lines above functionals ``(B, m, n)`` of a block's result: rows ``(B, m, pixels)``, values ``(B, m)``.

        The values are those at the images; the functional is nowhere on the balls above ``value + row . move``.

        Args:
            slopes: of the lines below the kinks before the block; the default ones where none is given.
        """
        count, functionals = rows.shape[:2]
        offsets = rows @ self.network.blocks[block].constant
        sizes = offsets.abs()
        held = self._carry(block, rows)
        for stage in range(block, 0, -1):
            outcome = held.pop(stage, None)
            if outcome is None:
                continue
            kink, before = self.network.kinks[stage - 1], self.network.blocks[stage - 1]
            lines = kink.lines(self.bounds[stage - 1], slopes[stage - 1] if slopes else None)
            pulled, more = lines.pull(outcome)
            own = pulled @ before.constant
            offsets, sizes = offsets + more + own, sizes + more.abs() + own.abs()
            for source, part in self._carry(stage - 1, pulled).items():
                held[source] = held[source] + part if source in held else part
        points = self.around.images.flatten(1)
        pixels = held.get(0, rows.new_zeros(count, functionals, points.shape[1]))
        values = offsets + torch.einsum("bmn,bn->bm", pixels, points)
        sizes = sizes + torch.einsum("bmn,bn->bm", pixels.abs(), points.abs())
        return pixels, values + ROUNDING * sizes

    def slopes(self, block: int, rows: Tensor, steps: int) -> list[Tensor | None]:
        """Slopes of the lines below the kinks, by gradient steps that bound functionals ``(B, m, n)`` lower.

        Xu et al. 2021 (alpha-CROWN), https://arxiv.org/abs/2011.13824, of the last pass only; the best of all steps.
        """
        kinks = self.network.kinks
        slopes = [kink.slopes(bounds) for kink, bounds in zip(kinks, self.bounds, strict=True)]
        free = {index: slope.clone().requires_grad_() for index, slope in enumerate(slopes) if slope is not None}
        if not steps or not free:
            return slopes
        optimiser = torch.optim.Adam(free.values(), lr=0.2)
        least = torch.full(rows.shape[:1], torch.inf, dtype=rows.dtype, device=rows.device)
        for step in range(steps + 1):
            with torch.enable_grad():
                lines, values = self.above(block, rows, [free.get(index, one) for index, one in enumerate(slopes)])
                worst = (values + self.around.gain(lines)).amax(1)
            better = worst.detach() < least
            least = torch.where(better, worst.detach(), least)
            for index, slope in free.items():
                kept = slopes[index]
                assert kept is not None
                slopes[index] = torch.where(better[:, None], slope.detach(), kept)
            if step < steps:
                for slope, gradient in zip(
                    free.values(), torch.autograd.grad(worst.sum(), list(free.values())), strict=True
                ):
                    slope.grad = gradient
                optimiser.step()
                with torch.no_grad():
                    for index, slope in free.items():
                        slope.clamp_(kinks[index].least_slope, 1.0)
        return slopes

    def most(self, block: int, rows: Tensor) -> Tensor:
        """A bound from above of functionals ``(B, m, n)`` of a block's result: ``(B, m)``."""
        lines, values = self.above(block, rows)
        gain = self.around.gain(lines)
        return values + gain + ROUNDING * gain.abs()

    def most_local(self, block: int, local: Local) -> tuple[Tensor, Tensor]:
        """Bounds of all of a block's units from below and above, ``(B, n)`` each, by short rows."""
        count = len(self.around.images)
        rows = torch.cat([local.weights[-1], -local.weights[-1]], 1).expand(count, -1, -1, -1)
        offsets = torch.cat([local.constants[-1], -local.constants[-1]], 1).expand(count, -1, -1)
        sizes = offsets.abs()
        for stage in range(block, 0, -1):
            lines = self.network.kinks[stage - 1].lines(self.bounds[stage - 1], None)
            assert isinstance(lines, Chords)
            pulled, more = lines.of(local.seen[stage]).pull(rows.flatten(0, 1))
            pulled, more = pulled.view_as(rows), more.view_as(offsets)
            own = (pulled @ local.constants[stage - 1][..., None])[..., 0]
            offsets, sizes = offsets + more + own, sizes + more.abs() + own.abs()
            rows = pulled @ local.weights[stage - 1]
        pixels = local.seen[0]
        points = self.around.images.flatten(1)[:, pixels]
        reach = gain_of_short_rows(self.around, rows, pixels, local.real)
        values = offsets + (rows @ points[..., None])[..., 0]
        sizes = sizes + (rows.abs() @ points.abs()[..., None])[..., 0] + reach.abs()
        above, below = (values + reach + ROUNDING * sizes).chunk(2, 2)
        units = local.units.flatten()
        size = self.network.blocks[block].constant.numel()
        low, high = above.new_empty(count, size), above.new_empty(count, size)
        low[:, units], high[:, units] = -below.flatten(1), above.flatten(1)
        return low, high

    def _carry(self, block: int, rows: Tensor) -> dict[int, Tensor]:
        parts = self.network.blocks[block].transposed(rows.reshape(-1, rows.shape[2]))
        return {source: part.view(*rows.shape[:2], -1) for source, part in parts.items()}


def relax(
    network: PiecewiseNetwork, around: Balls, inner: str = "crown", before: Sequence[Intervals] = ()
) -> Relaxation:
    """Bound all kinks' inputs on the balls, in the order of the forward pass.

    Args:
        inner: ``crown`` tightens by lines what intervals leave open, ``ibp`` leaves it so.
        before: bounds that hold already.
    """
    known: list[Intervals] = []
    empty = torch.zeros(len(around.images), dtype=torch.bool, device=around.images.device)
    relaxation = Relaxation(network, around, known, empty)
    last = len(network.blocks) - 1

    def tighten(block: int, low: Tensor, high: Tensor) -> Intervals:
        doubt = ROUNDING * (low.abs() + high.abs() + low.abs().amax(1, keepdim=True))
        low, high = low - doubt, high + doubt
        if block == last:
            return Intervals(low, high)
        if before:
            least, most = before[block].flat()
            low, high = torch.maximum(low, least), torch.minimum(high, most)
        shape = network.blocks[block].shape
        # the first block's lines are the function itself
        by_lines = inner == "crown" or block == 0
        local = network.local(block) if by_lines else None
        if around.cut is not None and before and 2 * low.shape[1] * network.widest(block) > LARGEST_CUT:
            pass  # what a cut does to so many units is little, and dear
        elif local is not None:
            short = relaxation.most_local(block, local)
            low, high = torch.maximum(low, short[0]), torch.minimum(high, short[1])
        elif by_lines and network.tightened(block):
            loose = network.kinks[block].unstable(Intervals(low, high).shaped(shape))
            low, high = _tightened(relaxation, block, low, high, loose)
        # no point is left where they contradict one another
        relaxation.empty.logical_or_((low > high).any(1))
        known.append(Intervals(torch.minimum(low, high), torch.maximum(low, high)).shaped(shape))
        return known[-1]

    pixels = around.pixels()
    network.intervals(pixels.low, pixels.high, tighten)
    return relaxation


def _tightened(relaxation: Relaxation, block: int, low: Tensor, high: Tensor, loose: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds by lines of the units that are ``loose`` ``(B, n)``, an equal number of rows an image at a time."""
    rows = int(loose.sum(1).max())
    if not rows:
        return low, high
    order = loose.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, :rows]
    step = max(1, LARGEST // (2 * len(low) * relaxation.network.widest(block)))
    low, high = low.clone(), high.clone()
    for units in torch.split(order, step, 1):
        picked = low.new_zeros(*units.shape, low.shape[1]).scatter_(2, units[..., None], 1.0)
        most = relaxation.most(block, torch.cat([picked, -picked], 1))
        above, below = most[:, : units.shape[1]], -most[:, units.shape[1] :]
        high.scatter_(1, units, torch.minimum(high.gather(1, units), above))
        low.scatter_(1, units, torch.maximum(low.gather(1, units), below))
    return low, high
