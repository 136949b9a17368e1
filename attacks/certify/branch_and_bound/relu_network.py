"""A sequential ReLU network as float64 matrices, read from a model."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from attacks.certify.branch_and_bound.region import Array
from attacks.certify.network.blocks import LARGEST, matrix_of
from attacks.certify.network.nonlinearities import Leaky
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.types import InputError

_SUPPORTED = "Linear, convolutions, BatchNorm, Dropout, average pooling, Flatten, ReLU and arithmetic with constants"


@dataclass(frozen=True, kw_only=True)
class ReluNetwork:
    """``z_0 = W_0 x + b_0``, ``z_l = W_l relu(z_{l-1}) + b_l``; the last z are the logits.

    Attributes:
        weights: per block ``(n_out, n_in)``; the first block takes flattened images.
        biases: per block ``(n_out,)``.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    @property
    def hidden(self) -> int:
        """The number of ReLU layers."""
        return len(self.weights) - 1

    @property
    def classes(self) -> int:
        """The number of logits."""
        return len(self.biases[-1])

    def blocks(self, point: Array) -> list[Array]:
        """The output of every block for a flattened image ``(n,)``: the pre-activations, then the logits."""
        outputs: list[Array] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            inputs = np.maximum(outputs[-1], 0.0) if outputs else point
            outputs.append(weight @ inputs + bias)
        return outputs

    def logits(self, point: Array) -> Array:
        """The logits ``(classes,)`` of a flattened image ``(n,)``."""
        return self.blocks(point)[-1]

    def lead(self, other: int, label: int) -> Array:
        """The functional ``(classes,)`` of the logits that is the lead of class ``other`` over class ``label``."""
        functional = np.zeros(self.classes)
        functional[other], functional[label] = 1.0, -1.0
        return functional

    def slope(self, outputs: list[Array], functional: Array) -> Array:
        """The gradient ``(n,)`` of ``functional @ logits`` in the image, at the point with the blocks' ``outputs``."""
        gradient = functional @ self.weights[-1]
        for output, weight in zip(outputs[-2::-1], self.weights[-2::-1], strict=True):
            gradient = np.where(output > 0, gradient, 0.0) @ weight
        return gradient

    def doubts(self, size: Array) -> tuple[Array, ...]:
        """Bounds of the rounding error of each block's outputs, in any order of summation: ``(n_out,)`` each.

        The standard bound (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1) is the number of
        operations in sequence times the unit roundoff, applied to the network of absolute values. It is counted four
        times: for reading the network, for lines through it, for their bounds over a region, and for the model's own
        forward pass.

        Args:
            size: ``(n,)`` upper bounds of the pixels' absolute values.
        """
        doubts: list[Array] = []
        operations = 0
        for weight, bias in zip(self.weights, self.biases, strict=True):
            size = np.abs(weight) @ size + np.abs(bias)
            operations += weight.shape[1] + 8
            doubts.append(4 * operations * 2.0**-53 * size)
        return tuple(doubts)

    def fingerprint(self) -> str:
        """SHA-256 of all shapes and weights."""
        digest = hashlib.sha256()
        for array in (*self.weights, *self.biases):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()


def read_network(model: nn.Module, shape: tuple[int, ...]) -> ReluNetwork:
    """Read a model's blocks in float64 and evaluation mode; the model is left untouched.

    Args:
        model: a sequence of affine layers and ReLUs, in modules of any nesting.
        shape: ``(C, H, W)`` of the images.

    Raises:
        InputError: a layer that is neither affine nor a ReLU, a path around a ReLU, more than about 4,000 pixels or
            units of a layer, or a model that cannot be read (see `PiecewiseNetwork`).
    """
    network = PiecewiseNetwork(model, shape, torch.device("cpu"))
    for index, block in enumerate(network.blocks):
        if block.sources != (index,):
            raise _refusal("a path around a ReLU")
        size = block.leaves[0].numel()
        if size * size > LARGEST:
            raise InputError(
                f"expected at most {math.isqrt(LARGEST)} pixels and units per layer, got {size}; use a smaller network"
            )
    for nonlinearity, place in zip(network.nonlinearities, network.places, strict=False):
        if nonlinearity != Leaky():
            raise _refusal(place)
    weights = tuple(np.ascontiguousarray(matrix_of(block).numpy()) for block in network.blocks)
    biases = tuple(block.constant.numpy().copy() for block in network.blocks)
    return ReluNetwork(weights=weights, biases=biases)


def _refusal(layer: str) -> InputError:
    return InputError(f"expected a network of {_SUPPORTED}, got {layer}; exact margins cannot be computed for it")
