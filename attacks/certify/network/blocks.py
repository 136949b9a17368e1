"""Units that see few entries of every earlier stage, as those of convolutions do, in groups that see the same ones.

A functional of such a unit is carried back as a short row: a few hundred entries instead of some thousands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# entries of one block's matrix: 128 MiB
LARGEST = 2**24
# short rows that hold more than this part of all entries save nothing
WORTH = 0.5


@dataclass(frozen=True)
class Local:
    """G groups of U units each, padded by repetition.

    Attributes:
        units: ``(G, U)``, indices of a block's result.
        seen: per stage from the image up to the block, ``(G, p)`` indices of its entries, padded by 0.
        weights: per block up to this one ``(G, p_after, p_before)``, 0 where padded; the last ``(G, U, p)``.
        constants: per block ``(G, p_after)``.
        real: ``(G, p)`` which of the first of ``seen``, the pixels, are no padding.
    """

    units: Tensor
    seen: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    real: Tensor


def localise(blocks: Sequence[Block]) -> Local | None:
    """The last block's units; None where they see too much, or the blocks are no chain."""
    if any(block.sources != (index,) for index, block in enumerate(blocks)):
        return None
    sizes = [block.leaves[0].numel() for block in blocks] + [blocks[-1].result.numel()]
    if any(before * after > LARGEST for before, after in itertools.pairwise(sizes)):
        return None
    matrices = [matrix_of(block) for block in blocks]
    patterns, members = torch.unique(matrices[-1] != 0, dim=0, return_inverse=True)
    supports = [patterns]
    for matrix in reversed(matrices[:-1]):
        reached = supports[0].to(matrix.dtype) @ (matrix != 0).to(matrix.dtype)
        supports.insert(0, reached > 0)
    cost = sum(int(support.sum(1).max()) for support in supports)
    units = _padded([torch.nonzero(members == group).flatten() for group in range(len(patterns))])
    if units.numel() * cost > WORTH * sizes[-1] * sum(sizes[:-1]):
        return None
    seen = tuple(_padded([torch.nonzero(row).flatten() for row in support]) for support in supports)
    counts = [support.sum(1) for support in supports]
    weights, constants = [], []
    for index, matrix in enumerate(matrices):
        after = units if index == len(matrices) - 1 else seen[index + 1]
        picked = matrix[after[:, :, None], seen[index][:, None, :]]
        room = torch.arange(picked.shape[2], device=picked.device) < counts[index][:, None]
        weights.append(picked * room[:, None])
        constants.append(blocks[index].constant[after])
    real = torch.arange(seen[0].shape[1], device=units.device) < counts[0][:, None]
    return Local(units, seen, tuple(weights), tuple(constants), real)


def matrix_of(block: Block) -> Tensor:
    """Of a block of one stage, ``(n_after, n_before)``, some rows at a time."""
    eye = torch.eye(block.result.numel(), dtype=torch.float64, device=block.result.device)
    step = max(1, LARGEST // max(math.prod(block.shape), block.leaves[0].numel()))
    return torch.cat([block.transposed(rows)[block.sources[0]] for rows in torch.split(eye, step)])


def _padded(groups: list[Tensor]) -> Tensor:
    """``(G, longest)``: the first entry again where a group is shorter."""
    longest = max(len(group) for group in groups)
    first = [group[:1] if len(group) else group.new_zeros(1) for group in groups]
    return torch.stack(
        [
            torch.cat([group, one.expand(longest - len(group))]) if len(group) < longest else group
            for group, one in zip(groups, first, strict=True)
        ]
    )


@dataclass(frozen=True)
class Block:
    """An affine function of the outputs of one or more stages; its transpose is one vector-Jacobian product.

    Attributes:
        sources: the stages, ascending.
        result: ``(1, ...)`` of the stages at zero: the constant part, with its graph.
        leaves: the zeros, one a source.
    """

    sources: tuple[int, ...]
    result: Tensor
    leaves: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's result."""
        return tuple(self.result.shape[1:])

    @cached_property
    def constant(self) -> Tensor:
        """``(n,)``."""
        return self.result.detach().flatten()

    def transposed(self, rows: Tensor) -> dict[int, Tensor]:
        """What functionals ``(R, n)`` of the result are of the sources: ``(R, n_s)`` each."""
        with torch.enable_grad():
            parts = torch.autograd.grad(
                self.result,
                self.leaves,
                rows.reshape(-1, *self.result.shape),
                is_grads_batched=True,
                retain_graph=True,
                create_graph=rows.requires_grad,
            )
        return {source: part.flatten(1) for source, part in zip(self.sources, parts, strict=True)}
