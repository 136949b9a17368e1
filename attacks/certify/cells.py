"""Activation regions: the polytopes on which a network of affine blocks and (leaky) ReLUs is affine, one an image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.certify.kinks import Leaky
from attacks.certify.piecewise import PiecewiseNetwork
from attacks.estimator import InputError

# entries of the widest of a group of functionals that are pulled through the network at a time
CHUNK = 2**22


@dataclass(frozen=True)
class Cells:
    """B regions of a network with U units and K classes.

    A *functional* is numbered: below U, the input of that unit times its sign in the region, not negative there (its
    zero set is a face); from U on, the lead of class number less U over the image's ``labels``.

    Attributes:
        signs: ``(B, U)`` float64, 1 where the unit is on and -1 where it is off.
        labels: ``(B,)`` int64.
    """

    network: PiecewiseNetwork
    signs: Tensor
    labels: Tensor

    @property
    def units(self) -> int:
        """U."""
        return self.signs.shape[1]

    @property
    def pixels(self) -> int:
        """Of an image."""
        return math.prod(self.network.shape)

    @property
    def bend(self) -> Tensor:
        """What every unit's slope changes by across its face: ``(U,)``."""
        parts = zip(self.network.kinks, _sizes(self.network), strict=True)
        bends = [self.signs.new_full((size,), 1 - kink.least_slope) for kink, size in parts]
        return torch.cat([*bends, self.signs.new_zeros(0)])

    def select(self, rows: Tensor) -> Cells:
        """Some of them."""
        return replace(self, signs=self.signs[rows], labels=self.labels[rows])

    def flipped(self, flips: Tensor) -> Cells:
        """Neighbours, on the other side of the faces ``(B, U)`` bool."""
        return replace(self, signs=torch.where(flips, -self.signs, self.signs))

    def values(self, points: Tensor) -> Tensor:
        """All functionals at points ``(B, C, H, W)``, as if the region had no end: ``(B, U + K)`` float64."""
        inputs: list[Tensor] = []
        slopes = self.slopes()

        def at_kink(kink: int, values: Tensor) -> Tensor:
            inputs.append(values.flatten(1))
            return values * slopes[kink].view_as(values)

        logits = self.network.run(points, at_kink)
        leads = logits - logits.gather(1, self.labels[:, None])
        return torch.cat([torch.cat([*inputs, logits[:, :0]], 1) * self.signs, leads], 1)

    def slopes(self) -> list[Tensor]:
        """Of every kink's units in the region: ``(B, n_k)``."""
        parts = self.signs.split(_sizes(self.network), 1)
        return [torch.where(part > 0, 1.0, kink.least_slope) for part, kink in zip(parts, self.network.kinks, strict=True)]

    def rows(self, owners: Tensor, numbers: Tensor) -> Tensor:
        """Gradients ``(P, n)`` of the functionals ``numbers`` ``(P,)`` of the regions ``owners`` ``(P,)``."""
        found = torch.zeros(len(owners), self.pixels, dtype=self.signs.dtype, device=owners.device)
        ends = torch.tensor(_sizes(self.network), device=owners.device).cumsum(0)
        blocks = torch.bucketize(numbers, ends, right=True)
        slopes = self.slopes()
        size = max(1, CHUNK // self.network.widest(len(ends)))
        for block in blocks.unique().tolist():
            for part in torch.nonzero(blocks == block).flatten().split(size):
                pending = {block: self._functionals(block, owners[part], numbers[part])}
                found[part] = self._pull(pending, [one[owners[part]] for one in slopes[:block]])[0]
        return found

    def pull(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of each region's weighted sum ``(B, U + K)`` of functionals.

        Returns:
            By the pixels ``(B, n)``; by the units' outcomes ``(B, U)``.
        """
        sizes = _sizes(self.network)
        *parts, leads = (weights * torch.cat([self.signs, torch.ones_like(weights[:, self.units :])], 1)).split(
            [*sizes, weights.shape[1] - self.units], 1
        )
        label = torch.zeros_like(leads).scatter(1, self.labels[:, None], leads.sum(1, keepdim=True))
        pixels, outcomes = self._pull(dict(enumerate([*parts, leads - label])), self.slopes())
        return pixels, torch.cat([*outcomes, leads[:, :0]], 1)

    def _functionals(self, block: int, owners: Tensor, numbers: Tensor) -> Tensor:
        """As functionals ``(P, n_b)`` of the block's result."""
        size = math.prod(self.network.blocks[block].shape)
        place = torch.arange(size, device=owners.device)
        hit = (place == numbers[:, None] - sum(_sizes(self.network)[:block])).to(self.signs)
        if block == len(self.network.kinks):
            return hit - (place == self.labels[owners][:, None]).to(self.signs)
        return hit * self.signs[owners, numbers][:, None]

    def _pull(self, pending: dict[int, Tensor], slopes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """From functionals of some blocks' results to the pixels' and the kinks' outcomes'."""
        outcomes = [torch.zeros_like(one) for one in slopes]
        pixels = next(iter(pending.values())).new_zeros(len(pending[max(pending)]), self.pixels)
        for block in reversed(range(max(pending) + 1)):
            if block not in pending:
                continue
            for stage, part in self.network.blocks[block].transposed(pending[block]).items():
                if stage == 0:
                    pixels = pixels + part
                else:
                    outcomes[stage - 1] = outcomes[stage - 1] + part
                    before = pending.get(stage - 1)
                    bent = part * slopes[stage - 1]
                    pending[stage - 1] = bent if before is None else before + bent
        return pixels, outcomes


def cells_at(network: PiecewiseNetwork, points: Tensor, labels: Tensor) -> Cells:
    """The regions that points ``(B, C, H, W)`` lie in.

    Raises:
        InputError: the network has other kinks than ReLU and LeakyReLU.
    """
    for kink in network.kinks:
        if not isinstance(kink, Leaky):
            raise InputError(
                f"expected ReLU and LeakyReLU between affine layers, got {type(kink).__name__}; leave refine=polish out"
            )
    signs: list[Tensor] = []

    def at_kink(kink: int, values: Tensor) -> Tensor:
        signs.append(torch.where(values >= 0, 1.0, -1.0).to(values).flatten(1))
        return torch.maximum(values, network.kinks[kink].least_slope * values)

    logits = network.run(points, at_kink)
    return Cells(network, torch.cat([*signs, logits[:, :0]], 1), labels)


def _sizes(network: PiecewiseNetwork) -> list[int]:
    return [math.prod(block.shape) for block in network.blocks[:-1]]
