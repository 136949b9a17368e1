"""A ReLU network as affine blocks with a ReLU between any two: float64 matrices, read from a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from attacks.certify.region import Array


@dataclass(frozen=True, kw_only=True)
class ReluNetwork:
    """``z_0 = W_0 x + b_0``, ``z_l = W_l relu(z_{l-1}) + b_l``; the last z are the logits.

    Attributes:
        weights: of each block ``(n_out, n_in)``; the first takes flattened images.
        biases: of each block ``(n_out,)``.
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
        """Every block's output at a flattened image: the pre-activations, then the logits."""
        outputs: list[Array] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            inputs = np.maximum(outputs[-1], 0.0) if outputs else point
            outputs.append(weight @ inputs + bias)
        return outputs

    def logits(self, point: Array) -> Array:
        """Of a flattened image ``(n,)``."""
        return self.blocks(point)[-1]

    def rescaled(self, low: float, high: float) -> ReluNetwork:
        """The same network of images in ``[0, 1]`` that are mapped to ``[low, high]`` first."""
        first = self.biases[0] + low * self.weights[0].sum(1)
        return ReluNetwork(
            weights=((high - low) * self.weights[0], *self.weights[1:]), biases=(first, *self.biases[1:])
        )

    def fingerprint(self) -> str:
        """SHA-256 of all shapes and numbers."""
        digest = hashlib.sha256()
        for array in (*self.weights, *self.biases):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()
