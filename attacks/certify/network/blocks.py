"""Affine blocks of a network, and their receptive fields: groups of units that depend on the same few entries.

A functional of a convolution's unit is propagated backwards as a short row: a few hundred entries instead of thousands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# largest matrix of one block, in entries: 128 MiB
LARGEST = 2**24
# short rows save nothing if they hold more than this fraction of all entries
WORTH = 0.5


@dataclass(frozen=True)
class Local:
    """G groups of U units each with a common receptive field; smaller groups are padded by repetition.

    Attributes:
        units: ``(G, U)``, indices into a block's result.
        seen: per stage from the image up to the block, the receptive field ``(G, p)`` as indices of its entries,
            padded.
        weights: per block up to this one ``(G, p_after, p_before)``, 0 where padded; the last ``(G, U, p)``.
        constants: per block ``(G, p_after)``.
        real: ``(G, p)`` bool: the pixels, in the first of ``seen``, that are not padding.
    """

    units: Tensor
    seen: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    real: Tensor


def localise(blocks: Sequence[Block]) -> Local | None:
    """Group the last block's units; None if their receptive fields are too large or the blocks are not a chain."""
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


def matrices_of(block: Block) -> dict[int, Tensor]:
    """The matrices ``(n_after, n_before)`` of a block by source, computed a few rows at a time."""
    eye = torch.eye(block.result.numel(), dtype=torch.float64, device=block.result.device)
    widest = max(leaf.numel() for leaf in block.leaves)
    step = max(1, LARGEST // max(math.prod(block.shape), widest))
    parts = [block.transposed(rows) for rows in torch.split(eye, step)]
    return {source: torch.cat([part[source] for part in parts]) for source in block.sources}


def matrix_of(block: Block) -> Tensor:
    """The matrix ``(n_after, n_before)`` of a block with one source."""
    return matrices_of(block)[block.sources[0]]


def _padded(groups: list[Tensor]) -> Tensor:
    """Index lists as ``(G, longest)``: shorter groups repeat their first entry, empty ones hold 0."""
    longest = max(len(group) for group in groups)
    first = [group[:1] if len(group) else group.new_zeros(1) for group in groups]
    return torch.stack(
        [
            torch.cat([group, filler.expand(longest - len(group))]) if len(group) < longest else group
            for group, filler in zip(groups, first, strict=True)
        ]
    )


@dataclass(frozen=True)
class Block:
    """An affine function of the outputs of one or more stages; its transpose is one vector-Jacobian product.

    Attributes:
        sources: the numbers of the stages, ascending.
        result: ``(1, ...)``, the result for zeros: the constant part, with its autograd graph.
        leaves: the zero inputs, one per source.
    """

    sources: tuple[int, ...]
    result: Tensor
    leaves: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's result."""
        return tuple(self.result.shape[1:])

    @cached_property
    def constant(self) -> Tensor:
        """The constant part, ``(n,)``."""
        return self.result.detach().flatten()

    def transposed(self, rows: Tensor) -> dict[int, Tensor]:
        """Functionals ``(R, n)`` of the result as functionals of each source: ``(R, n_s)`` each."""
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
