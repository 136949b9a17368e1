"""Points of other classes to start a search from: Newton steps on one class's lead at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attacks.certify.branch_and_bound.region import Array, HalfSpace, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork

# a piecewise linear lead is met after as many steps as pieces are crossed
STEPS = 20
# how far beyond the linearised boundary a step goes, so that it arrives on the other side
OVERSHOOT = 1e-3


def approach(network: ReluNetwork, image: Array, region: Region, own: int, other: int) -> Iterator[Array]:
    """Moves ``(n,)`` towards class ``other``, of which some, but perhaps none, arrive.

    The lead of ``other`` is linearised where the last move ended, and the next is the shortest one from the image
    into that half-space, inside the box (as in DeepFool, Moosavi-Dezfooli et al. 2016, Algorithm 2, but from the image
    every time, as Croce & Hein 2020, https://arxiv.org/abs/1907.02044, do).
    """
    functional = network.lead(other, own)
    outputs, move = network.blocks(image), np.zeros_like(image)
    for _ in range(STEPS):
        gradient = network.slope(outputs, functional)
        missing = float(gradient @ move - functional @ outputs[-1])
        length, move = region.nearest(HalfSpace(normal=gradient, gap=missing * (1 + OVERSHOOT)))
        if length == 0 or length > region.radius:
            return
        yield move
        outputs = network.blocks(image + move)
