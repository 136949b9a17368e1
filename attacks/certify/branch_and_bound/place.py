"""The start of a search: an image and its domain in float64, with the model that classifies other points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attacks.certify.branch_and_bound.region import Array, Region
from attacks.types import Domain, Norm

# largest move of a pixel in the free domain, in pixel ranges; no box ends the search there
FAR = 1e3


@dataclass(frozen=True, kw_only=True)
class Place:
    """The start of a search.

    Attributes:
        model: float64, on the CPU, in evaluation mode.
        shape: ``(C, H, W)``.
        pixels: ``(n,)`` the flattened image.
        least, most: ``(n,)`` the domain; infinite if free.
        far: the largest move of a pixel.
        logits: ``(K,)`` of the image.
    """

    model: nn.Module
    shape: tuple[int, ...]
    pixels: Array
    least: Array
    most: Array
    far: float
    logits: Array

    @property
    def label(self) -> int:
        """The predicted class."""
        return int(self.logits.argmax())

    @property
    def tied(self) -> bool:
        """Whether the two largest logits are exactly equal: the image lies on the boundary."""
        return int((self.logits == self.logits.max()).sum()) > 1

    def region(self, norm: Norm) -> Region:
        """The moves into the whole domain; in the free domain, those up to ``far``."""
        low, high = self.least - self.pixels, self.most - self.pixels
        corner = np.minimum(np.maximum(-low, high), self.far)
        whole = Region(norm=norm, radius=0.0, low=low, high=high)
        # rounding must not exclude the corner
        return Region(norm=norm, radius=whole.length(corner) * (1 + 1e-9), low=low, high=high)

    def end(self, move: Array) -> Array:
        """Where a move ``(n,)`` ends, inside the domain."""
        return np.clip(self.pixels + move, self.least, self.most)

    def changes(self, move: Array) -> bool:
        """Whether the model puts the end of a move into another class."""
        return int(classify(self.model, self.end(move), self.shape).argmax()) != self.label

    def image(self, move: Array) -> Tensor:
        """The end of a move as an image ``(C, H, W)`` float64."""
        return torch.from_numpy(self.end(move)).view(self.shape)


def place(model: nn.Module, image: Tensor, domain: Domain, bounds: tuple[float, float]) -> Place:
    """The start at an image ``(C, H, W)``; the domain is extended to pixels that rounding put outside ``bounds``."""
    pixels = flat(image)
    low, high = bounds if domain == "box" else (-np.inf, np.inf)
    return Place(
        model=model,
        shape=tuple(image.shape),
        pixels=pixels,
        least=np.minimum(pixels, low),
        most=np.maximum(pixels, high),
        far=FAR * (bounds[1] - bounds[0]),
        logits=classify(model, pixels, tuple(image.shape)),
    )


def flat(image: Tensor) -> Array:
    """The pixels as a flat array for the solver: ``(n,)`` float64."""
    pixels: Array = image.detach().cpu().double().flatten().numpy()
    return pixels


def classify(model: nn.Module, pixels: Array, shape: tuple[int, ...]) -> Array:
    """The model's logits ``(K,)`` of flattened pixels."""
    with torch.no_grad():
        # a copy: the model may change its input in place
        logits: Array = model(torch.from_numpy(pixels.copy()).view(1, *shape))[0].double().numpy()
    return logits
