"""First witnesses for a search: Newton steps on the lead of one class at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attacks.certify.branch_and_bound.region import Array, HalfSpace, Region
from attacks.certify.branch_and_bound.relu_network import ReluNetwork

# a piecewise linear lead needs one step per piece that is crossed
STEPS = 20
# overshoot beyond the linearised boundary, relative to the step, so that a step arrives on the other side
OVERSHOOT = 1e-3


def approach(network: ReluNetwork, image: Array, region: Region, label: int, other: int) -> Iterator[Array]:
    """Moves ``(n,)`` towards class ``other``; some, none or all of them reach it.

    The lead of ``other`` is linearised where the last move ended. The next move is the shortest one from the image
    into that half-space, inside the box (as in DeepFool, Moosavi-Dezfooli et al. 2016, Algorithm 2, but always from
    the image, as in Croce & Hein 2020, https://arxiv.org/abs/1907.02044).
    """
    functional = network.lead(other, label)
    outputs, move = network.blocks(image), np.zeros_like(image)
    for _ in range(STEPS):
        gradient = network.slope(outputs, functional)
        missing = float(gradient @ move - functional @ outputs[-1])
        length, move = region.nearest(HalfSpace(normal=gradient, gap=missing * (1 + OVERSHOOT)))
        if length == 0 or length > region.radius:
            return
        yield move
        outputs = network.blocks(image + move)
