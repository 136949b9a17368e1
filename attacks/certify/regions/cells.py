"""Activation regions: the polytopes on which a network of affine blocks and (leaky) ReLUs is affine, one an image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attacks.certify.network.nonlinearities import Leaky
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.types import InputError

# entries of the widest of a group of functionals that are pulled through the network at a time
CHUNK = 2**22


@dataclass(frozen=True)
class Passes:
    """What was spent on each of some images: ``(N,)`` float64 each."""

    forwards: Tensor
    backwards: Tensor

    @classmethod
    def none(cls, images: Tensor) -> Passes:
        """On these images."""
        zeros = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        return cls(zeros, zeros.clone())


@dataclass(frozen=True)
class Cells:
    """B regions of a network with U units and K classes.

    A *functional* has a number: below U, it is the input of that unit times its sign in the region, not negative there
    (where it is 0 is a face); from U on, the lead of class number - U over the image's label.

    Attributes:
        signs: ``(B, U)`` float64, 1 where the unit is on and -1 where it is off.
        labels: ``(B,)`` int64.
        owners: ``(B,)`` int64, the images of ``passes`` that they are of.
    """

    network: PiecewiseNetwork
    signs: Tensor
    labels: Tensor
    owners: Tensor
    passes: Passes

    @property
    def units(self) -> int:
        """U."""
        return self.signs.shape[1]

    @cached_property
    def slopes(self) -> list[Tensor]:
        """Of every kink's units in the region: ``(B, n_k)``."""
        parts = zip(torch.split(self.signs, _sizes(self.network), 1), self.network.kinks, strict=True)
        return [torch.where(part > 0, 1.0, kink.least_slope) for part, kink in parts]

    @property
    def bends(self) -> Tensor:
        """What every unit's slope changes by across its face: ``(U,)``."""
        parts = zip(_sizes(self.network), self.network.kinks, strict=True)
        return torch.cat(
            [self.signs.new_full((size,), 1 - kink.least_slope) for size, kink in parts] + [self.signs.new_zeros(0)]
        )

    def select(self, rows: Tensor) -> Cells:
        """Some of them."""
        return replace(self, signs=self.signs[rows], labels=self.labels[rows], owners=self.owners[rows])

    def flipped(self, flips: Tensor) -> Cells:
        """Neighbours, on the other side of the faces ``(B, U)`` bool."""
        return replace(self, signs=torch.where(flips, -self.signs, self.signs))

    def values(self, points: Tensor) -> Tensor:
        """All functionals at points ``(B, C, H, W)``, as if the regions had no end: ``(B, U + K)`` float64."""
        inputs, logits = self.network.run(points, self.slopes)
        self.passes.forwards.index_add_(0, self.owners, torch.ones_like(logits[:, 0]))
        leads = logits - logits.gather(1, self.labels[:, None])
        return torch.cat([torch.cat([*inputs, logits[:, :0]], 1) * self.signs, leads], 1)

    def rows(self, regions: Tensor, numbers: Tensor) -> Tensor:
        """Gradients ``(P, n)`` of the functionals ``numbers`` ``(P,)`` in ``regions`` ``(P,)``."""
        found = self.signs.new_zeros(len(regions), math.prod(self.network.shape))
        ends = torch.tensor(_sizes(self.network), device=regions.device).cumsum(0)
        blocks = torch.bucketize(numbers, ends, right=True)
        size = max(1, CHUNK // self.network.widest(len(ends)))
        for block in sorted(set(blocks.tolist())):
            for part in torch.split(torch.nonzero(blocks == block).flatten(), size):
                pending = {block: self._functionals(block, regions[part], numbers[part])}
                found[part] = self._pull(pending, [one[regions[part]] for one in self.slopes[:block]])[0]
        self.passes.backwards.index_add_(0, self.owners[regions], torch.ones_like(found[:, 0]))
        return found

    def pull(self, weights: Tensor) -> Tensor:
        """Gradients ``(B, U)``, by the units' outcomes, of each region's weighted sum ``(B, U + K)`` of functionals."""
        signed, leads = weights[:, : self.units] * self.signs, weights[:, self.units :]
        label = torch.zeros_like(leads).scatter(1, self.labels[:, None], leads.sum(1, keepdim=True))
        pending = dict(enumerate([*torch.split(signed, _sizes(self.network), 1), leads - label]))
        self.passes.backwards.index_add_(0, self.owners, torch.ones_like(leads[:, 0]))
        return torch.cat([*self._pull(pending, self.slopes)[1], leads[:, :0]], 1)

    def _functionals(self, block: int, regions: Tensor, numbers: Tensor) -> Tensor:
        """As functionals ``(P, n_b)`` of the block's result."""
        place = torch.arange(math.prod(self.network.blocks[block].shape), device=regions.device)
        hit = (place == numbers[:, None] - sum(_sizes(self.network)[:block])).to(self.signs)
        if block == len(self.network.kinks):
            return hit - (place == self.labels[regions][:, None]).to(self.signs)
        return hit * self.signs[regions, numbers][:, None]

    def _pull(self, pending: dict[int, Tensor], slopes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """From functionals of some blocks' results to those of the pixels and of the kinks' outcomes."""
        outcomes = [torch.zeros_like(one) for one in slopes]
        last = max(pending)
        pixels = pending[last].new_zeros(len(pending[last]), math.prod(self.network.shape))
        for block in reversed(range(last + 1)):
            if block not in pending:
                continue
            for stage, part in self.network.blocks[block].transposed(pending[block]).items():
                if stage == 0:
                    pixels = pixels + part
                else:
                    outcomes[stage - 1] = outcomes[stage - 1] + part
                    bent = part * slopes[stage - 1]
                    pending[stage - 1] = pending[stage - 1] + bent if stage - 1 in pending else bent
        return pixels, outcomes


def check_units(network: PiecewiseNetwork) -> int:
    """The number of units.

    Raises:
        InputError: the network has other kinks than ReLU and LeakyReLU.
    """
    for kink in network.kinks:
        if not isinstance(kink, Leaky):
            raise InputError(
                f"expected ReLU and LeakyReLU between affine layers, got {type(kink).__name__}; leave refine=polish out"
            )
    return sum(_sizes(network))


def cells_at(network: PiecewiseNetwork, points: Tensor, labels: Tensor, owners: Tensor, passes: Passes) -> Cells:
    """The regions that points ``(B, C, H, W)`` lie in; see `Cells`."""
    inputs, logits = network.run(points)
    signs = [torch.where(values >= 0, 1.0, -1.0).to(values) for values in inputs]
    passes.forwards.index_add_(0, owners, torch.ones_like(logits[:, 0]))
    return Cells(network, torch.cat([*signs, logits[:, :0]], 1), labels, owners, passes)


def _sizes(network: PiecewiseNetwork) -> list[int]:
    return [math.prod(block.shape) for block in network.blocks[:-1]]
