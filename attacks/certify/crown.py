"""Linear relaxation (CROWN) of networks of affine blocks and piecewise linear nonlinearities.

Zhang et al. 2018 (CROWN), https://arxiv.org/abs/1811.00866: two lines bound each nonlinearity, and functionals of the
network are propagated backwards through these lines to the image. Interval bounds are computed first; lines are used
only for units that the intervals leave undecided. CROWN-IBP (Zhang et al. 2020, https://arxiv.org/abs/1906.06316)
keeps the interval bounds: `relax` with ``inner="ibp"``.
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

# largest array of functionals, in entries: 256 MiB
LARGEST = 2**25
# above this number of entries (functionals of all units of a block), a cut does not tighten the block's bounds again
LARGEST_CUT = 2**20


@dataclass(frozen=True)
class Relaxation:
    """Bounds of the inputs of every nonlinearity on balls, from which the relaxing lines follow.

    Attributes:
        bounds: per block except the last, ``(B, *shape)``.
        empty: ``(B,)`` bool: the ball contains no point that satisfies the cut. Its bounds have no meaning then.
    """

    network: PiecewiseNetwork
    around: Balls
    bounds: Sequence[Intervals]
    empty: Tensor

    def above(self, block: int, rows: Tensor, slopes: Sequence[Tensor | None] = ()) -> tuple[Tensor, Tensor]:
        """Linear upper bounds of functionals ``(B, m, n)`` of a block's result.

        Args:
            slopes: slopes of the lower lines of the nonlinearities before the block; the default ones if empty.

        Returns:
            Rows ``(B, m, pixels)`` and values at the images ``(B, m)``: everywhere on the balls, the functional is at
            most ``value + row . move``.
        """
        count, functionals = rows.shape[:2]
        offsets = rows @ self.network.blocks[block].constant
        sizes = offsets.abs()
        held = self._carry(block, rows)
        for stage in range(block, 0, -1):
            outcome = held.pop(stage, None)
            if outcome is None:
                continue
            nonlinearity, before = self.network.nonlinearities[stage - 1], self.network.blocks[stage - 1]
            lines = nonlinearity.lines(self.bounds[stage - 1], slopes[stage - 1] if slopes else None)
            pulled, more = lines.pull(outcome)
            constant = pulled @ before.constant
            offsets, sizes = offsets + more + constant, sizes + more.abs() + constant.abs()
            for source, part in self._carry(stage - 1, pulled).items():
                held[source] = held[source] + part if source in held else part
        points = self.around.images.flatten(1)
        pixels = held.get(0, rows.new_zeros(count, functionals, points.shape[1]))
        values = offsets + torch.einsum("bmn,bn->bm", pixels, points)
        sizes = sizes + torch.einsum("bmn,bn->bm", pixels.abs(), points.abs())
        return pixels, values + ROUNDING * sizes

    def slopes(self, block: int, rows: Tensor, steps: int) -> list[Tensor | None]:
        """Slopes of the lower lines, optimised by gradient steps on the upper bound of functionals ``(B, m, n)``.

        Xu et al. 2021 (alpha-CROWN), https://arxiv.org/abs/2011.13824. Departs from it: only the slopes of the last
        backward pass are optimised. Returns the best slopes of all steps.
        """
        nonlinearities = self.network.nonlinearities
        slopes = [nonlinearity.slopes(bounds) for nonlinearity, bounds in zip(nonlinearities, self.bounds, strict=True)]
        free = {index: slope.clone().requires_grad_() for index, slope in enumerate(slopes) if slope is not None}
        if not steps or not free:
            return slopes
        optimiser = torch.optim.Adam(free.values(), lr=0.2)
        least = torch.full(rows.shape[:1], torch.inf, dtype=rows.dtype, device=rows.device)
        for step in range(steps + 1):
            with torch.enable_grad():
                lines, values = self.above(
                    block, rows, [free.get(index, default) for index, default in enumerate(slopes)]
                )
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
                        slope.clamp_(nonlinearities[index].least_slope, 1.0)
        return slopes

    def most(self, block: int, rows: Tensor) -> Tensor:
        """Upper bounds ``(B, m)`` of functionals ``(B, m, n)`` of a block's result."""
        lines, values = self.above(block, rows)
        gain = self.around.gain(lines)
        return values + gain + ROUNDING * gain.abs()

    def most_local(self, block: int, local: Local) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of all units of a block, ``(B, n)`` each, by short rows (see `Local`)."""
        count = len(self.around.images)
        rows = torch.cat([local.weights[-1], -local.weights[-1]], 1).expand(count, -1, -1, -1)
        offsets = torch.cat([local.constants[-1], -local.constants[-1]], 1).expand(count, -1, -1)
        sizes = offsets.abs()
        for stage in range(block, 0, -1):
            lines = self.network.nonlinearities[stage - 1].lines(self.bounds[stage - 1], None)
            assert isinstance(lines, Chords)
            pulled, more = lines.of(local.seen[stage]).pull(rows.flatten(0, 1))
            pulled, more = pulled.view_as(rows), more.view_as(offsets)
            constant = (pulled @ local.constants[stage - 1][..., None])[..., 0]
            offsets, sizes = offsets + more + constant, sizes + more.abs() + constant.abs()
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
    """Bound the inputs of all nonlinearities on the balls, in the order of the forward pass.

    Args:
        inner: ``crown`` tightens undecided interval bounds by lines; ``ibp`` keeps the intervals.
        before: per block, bounds that are already known to hold.
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
            pass  # for this many units a cut tightens little at a high cost
        elif local is not None:
            short = relaxation.most_local(block, local)
            low, high = torch.maximum(low, short[0]), torch.minimum(high, short[1])
        elif by_lines and network.tightened(block):
            loose = network.nonlinearities[block].unstable(Intervals(low, high).shaped(shape))
            low, high = _tightened(relaxation, block, low, high, loose)
        # contradicting bounds: no point of the ball satisfies the cut
        relaxation.empty.logical_or_((low > high).any(1))
        known.append(Intervals(torch.minimum(low, high), torch.maximum(low, high)).shaped(shape))
        return known[-1]

    pixels = around.pixels()
    network.intervals(pixels.low, pixels.high, tighten)
    return relaxation


def _tightened(relaxation: Relaxation, block: int, low: Tensor, high: Tensor, loose: Tensor) -> tuple[Tensor, Tensor]:
    """Tighten the bounds of the ``loose`` units ``(B, n)`` by lines, with an equal number of rows per image."""
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
