"""A ReLU network as float64 matrices, read from a model."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attacks.certify.branch_and_bound.region import Array
from attacks.certify.network.blocks import LARGEST, matrices_of
from attacks.certify.network.nonlinearities import Leaky
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.types import InputError

_SUPPORTED = (
    "Linear, convolutions, BatchNorm, Dropout, average and max pooling, Flatten, ReLU, LeakyReLU and arithmetic with "
    "constants and between branches"
)


@dataclass(frozen=True, kw_only=True)
class ReluNetwork:
    """``z_0 = W_0 x + b_0``, ``z_l = W_l relu(z_{l-1}) + b_l``; the last z are the logits.

    Attributes:
        weights: per block ``(n_out, n_in)``; the first block takes flattened images.
        biases: per block ``(n_out,)``.
        linear: per hidden layer ``(n_l,)`` bool, the units without ReLU, which carry a value around later ReLUs;
            empty where no layer has any.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    linear: tuple[NDArray[np.bool_], ...] = ()

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
            inputs = self.activated(len(outputs) - 1, outputs[-1]) if outputs else point
            outputs.append(weight @ inputs + bias)
        return outputs

    def activated(self, layer: int, values: Array) -> Array:
        """What the units ``(n_l,)`` of a hidden layer pass on."""
        positive: Array = np.maximum(values, 0.0)
        return np.where(self.linear[layer], values, positive) if self.linear else positive

    def passing(self, layer: int, values: Array) -> NDArray[np.bool_]:
        """The units of a hidden layer that pass on their own values: ``(n_l,)`` bool."""
        on: NDArray[np.bool_] = values > 0
        return on | self.linear[layer] if self.linear else on

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
        for layer in reversed(range(self.hidden)):
            gradient = np.where(self.passing(layer, outputs[layer]), gradient, 0.0) @ self.weights[layer]
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
        for array in (*self.weights, *self.biases, *self.linear):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()


def read_network(model: nn.Module, shape: tuple[int, ...]) -> ReluNetwork:
    """Read a model's blocks in float64 and evaluation mode; the model is left untouched.

    Paths around a ReLU become units without one. LeakyReLU and max pooling become ReLUs and such units.

    Args:
        model: affine layers, ReLU, LeakyReLU and max pooling, in modules of any nesting.
        shape: ``(C, H, W)`` of the images.

    Raises:
        InputError: a layer of another kind, more than about 4,000 pixels or units of a layer, or a model that cannot
            be read (see `PiecewiseNetwork`).
    """
    network = PiecewiseNetwork(model, shape, torch.device("cpu"), pooling=False)
    for nonlinearity, place in zip(network.nonlinearities, network.places, strict=False):
        if not isinstance(nonlinearity, Leaky):
            raise InputError(
                f"expected a network of {_SUPPORTED}, got {place}; exact margins cannot be computed for it"
            )
    for block in network.blocks:
        _check_width(max(leaf.numel() for leaf in block.leaves))
    layers = _Layers(math.prod(shape))
    for index, block in enumerate(network.blocks):
        parts = {source: matrix.numpy() for source, matrix in matrices_of(block).items()}
        matrix, constant = layers.combined(parts, block.constant.numpy())
        if index == len(network.nonlinearities):
            return layers.network(matrix, constant)
        later = {source for other in network.blocks[index + 1 :] for source in other.sources}
        layers.append(matrix, constant, network.nonlinearities[index].least_slope, sorted(later & layers.known))
    raise AssertionError("the last block computes the logits")


class _Layers:
    """Layers read so far; every stage that later blocks use is an affine function of the outputs of the last one."""

    def __init__(self, pixels: int) -> None:
        self._weights: list[Array] = []
        self._biases: list[Array] = []
        self._linear: list[NDArray[np.bool_]] = []
        # the matrix is None where the stage is all outputs
        self._stages: dict[int, tuple[Array | None, Array]] = {0: (None, np.zeros(pixels))}

    @property
    def known(self) -> set[int]:
        """The stages that the last layer's outputs give."""
        return set(self._stages)

    def combined(self, parts: dict[int, Array], constant: Array) -> tuple[Array, Array]:
        """An affine function of stages, as a matrix on the last layer's outputs and a constant."""
        matrices = []
        for source, part in parts.items():
            matrix, shift = self._stages[source]
            matrices.append(part if matrix is None else part @ matrix)
            constant = constant + part @ shift if shift.any() else constant
        return sum(matrices[1:], start=matrices[0]), constant

    def append(self, matrix: Array, constant: Array, slope: float, carried: list[int]) -> None:
        """Add the layer of the next stage, LeakyReLUs of these inputs, which carries earlier stages along."""
        units, number = len(constant), len(self._weights) + 1
        passed = {number: (matrix, constant)} if slope else {}
        for stage in carried:
            known, shift = self._stages[stage]
            passed[stage] = (np.eye(len(shift)) if known is None else known, shift)
        rows, shifts = zip((matrix, constant), *passed.values(), strict=True)
        ends = np.cumsum([len(shift) for shift in shifts])
        _check_width(int(ends[-1]))
        self._weights.append(np.ascontiguousarray(np.concatenate(rows)))
        self._biases.append(np.concatenate(shifts))
        self._linear.append(np.arange(ends[-1]) >= units)
        identity = np.eye(ends[-1])
        self._stages = {
            stage: (identity[first:last], np.zeros(last - first))
            for stage, (first, last) in zip(passed, itertools.pairwise(ends), strict=True)
        }
        positive: Array | None = None
        if passed:
            # a leaky unit is the mean of its input and its positive part
            positive = (1 - slope) * identity[:units] + (slope * identity[units : 2 * units] if slope else 0.0)
        self._stages[number] = (positive, np.zeros(units))

    def network(self, matrix: Array, constant: Array) -> ReluNetwork:
        """The network with this last block."""
        weights = (*self._weights, np.ascontiguousarray(matrix))
        linear = tuple(self._linear) if any(layer.any() for layer in self._linear) else ()
        return ReluNetwork(weights=weights, biases=(*self._biases, constant.copy()), linear=linear)


def _check_width(size: int) -> None:
    if size * size > LARGEST:
        raise InputError(
            f"expected at most {math.isqrt(LARGEST)} pixels and units per layer, got {size}; use a smaller network"
        )
