"""Activation regions: the polytopes on which a network of affine blocks and (leaky) ReLUs is affine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attacks.certify.network.nonlinearities import Leaky
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.types import InputError

# largest number of entries of the functionals that are propagated through the network at a time
CHUNK = 2**22


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes spent on each of N images: ``(N,)`` float64 each."""

    forwards: Tensor
    backwards: Tensor

    @classmethod
    def none(cls, images: Tensor) -> Passes:
        """No passes for these images."""
        zeros = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        return cls(zeros, zeros.clone())


@dataclass(frozen=True)
class Cells:
    """B activation regions of a network with U units and K classes.

    Functionals are numbered. Number u < U is the input of unit u times its sign in the region: it is not negative
    inside the region and 0 on the unit's face. Number U + k is the lead of class k over the image's label.

    Attributes:
        signs: ``(B, U)`` float64, 1 where the unit is on and -1 where it is off.
        labels: ``(B,)`` int64.
        owners: ``(B,)`` int64, the image that each region's ``passes`` are counted for.
    """

    network: PiecewiseNetwork
    signs: Tensor
    labels: Tensor
    owners: Tensor
    passes: Passes

    @property
    def units(self) -> int:
        """The number of units, U."""
        return self.signs.shape[1]

    @cached_property
    def slopes(self) -> list[Tensor]:
        """Per nonlinearity, the slopes of its units in the region: ``(B, n_k)``."""
        parts = zip(torch.split(self.signs, _sizes(self.network), 1), self.network.nonlinearities, strict=True)
        return [torch.where(signs > 0, 1.0, nonlinearity.least_slope) for signs, nonlinearity in parts]

    @property
    def bends(self) -> Tensor:
        """The change of every unit's slope across its face: ``(U,)``."""
        sizes = zip(_sizes(self.network), self.network.nonlinearities, strict=True)
        changes = [self.signs.new_full((size,), 1 - nonlinearity.least_slope) for size, nonlinearity in sizes]
        return torch.cat([*changes, self.signs.new_zeros(0)])

    def select(self, rows: Tensor) -> Cells:
        """The regions of these rows."""
        return replace(self, signs=self.signs[rows], labels=self.labels[rows], owners=self.owners[rows])

    def flipped(self, flips: Tensor) -> Cells:
        """The neighbours on the other side of the faces ``(B, U)`` bool."""
        return replace(self, signs=torch.where(flips, -self.signs, self.signs))

    def values(self, points: Tensor) -> Tensor:
        """All functionals ``(B, U + K)`` float64 at points ``(B, C, H, W)``, extended linearly beyond the regions."""
        inputs, logits = self.network.run(points, self.slopes)
        self.passes.forwards.index_add_(0, self.owners, torch.ones_like(logits[:, 0]))
        leads = logits - logits.gather(1, self.labels[:, None])
        return torch.cat([torch.cat([*inputs, logits[:, :0]], 1) * self.signs, leads], 1)

    def rows(self, regions: Tensor, numbers: Tensor) -> Tensor:
        """Gradients ``(P, n)`` of the functionals ``numbers`` ``(P,)`` in ``regions`` ``(P,)``."""
        gradients = self.signs.new_zeros(len(regions), math.prod(self.network.shape))
        ends = torch.tensor(_sizes(self.network), device=regions.device).cumsum(0)
        blocks = torch.bucketize(numbers, ends, right=True)
        size = max(1, CHUNK // self.network.widest(len(ends)))
        for block in sorted(set(blocks.tolist())):
            for part in torch.split(torch.nonzero(blocks == block).flatten(), size):
                pending = {block: self._functionals(block, regions[part], numbers[part])}
                slopes = [slope[regions[part]] for slope in self.slopes[:block]]
                gradients[part] = self._pull(pending, slopes)[0]
        self.passes.backwards.index_add_(0, self.owners[regions], torch.ones_like(gradients[:, 0]))
        return gradients

    def pull(self, weights: Tensor) -> Tensor:
        """Gradients ``(B, U)`` with respect to the units' outputs of each region's weighted sum of functionals.

        Args:
            weights: ``(B, U + K)``.
        """
        signed, leads = weights[:, : self.units] * self.signs, weights[:, self.units :]
        label = torch.zeros_like(leads).scatter(1, self.labels[:, None], leads.sum(1, keepdim=True))
        pending = dict(enumerate([*torch.split(signed, _sizes(self.network), 1), leads - label]))
        self.passes.backwards.index_add_(0, self.owners, torch.ones_like(leads[:, 0]))
        return torch.cat([*self._pull(pending, self.slopes)[1], leads[:, :0]], 1)

    def _functionals(self, block: int, regions: Tensor, numbers: Tensor) -> Tensor:
        """The numbered functionals as functionals ``(P, n_b)`` of the block's result."""
        place = torch.arange(math.prod(self.network.blocks[block].shape), device=regions.device)
        hit = (place == numbers[:, None] - sum(_sizes(self.network)[:block])).to(self.signs)
        if block == len(self.network.nonlinearities):
            return hit - (place == self.labels[regions][:, None]).to(self.signs)
        return hit * self.signs[regions, numbers][:, None]

    def _pull(self, pending: dict[int, Tensor], slopes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Propagate functionals of blocks' results backwards, to the pixels and the outputs of the nonlinearities."""
        outcomes = [torch.zeros_like(slope) for slope in slopes]
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
    """The number of units of a network that polishing supports.

    Raises:
        InputError: the network has nonlinearities other than ReLU and LeakyReLU.
    """
    for nonlinearity in network.nonlinearities:
        if not isinstance(nonlinearity, Leaky):
            raise InputError(
                f"expected ReLU and LeakyReLU between affine layers, got {type(nonlinearity).__name__}; "
                "leave refine=polish out"
            )
    return sum(_sizes(network))


def cells_at(network: PiecewiseNetwork, points: Tensor, labels: Tensor, owners: Tensor, passes: Passes) -> Cells:
    """The regions that contain points ``(B, C, H, W)``; see `Cells`."""
    inputs, logits = network.run(points)
    signs = [torch.where(values >= 0, 1.0, -1.0).to(values) for values in inputs]
    passes.forwards.index_add_(0, owners, torch.ones_like(logits[:, 0]))
    return Cells(network, torch.cat([*signs, logits[:, :0]], 1), labels, owners, passes)


def _sizes(network: PiecewiseNetwork) -> list[int]:
    return [math.prod(block.shape) for block in network.blocks[:-1]]
