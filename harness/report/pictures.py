"""Image cards as PNG data URIs, with perturbations magnified around mid grey."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.report.content import ImageCard
from harness.report.figures.view import norm_name

Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Picture:
    """A card on the page: caption, magnification, and three pictures with their text alternatives."""

    card: ImageCard
    caption: str
    factor: str
    pictures: list[tuple[str, str, str]]  # name, text alternative, data URI


@dataclass(frozen=True)
class Group:
    """The cards of one norm and split of a run."""

    title: str
    run: str
    norm: str
    split: str
    pictures: list[Picture]


def png(pixels: Pixels) -> str:
    """A data URI of pixels ``(H, W)`` or ``(H, W, 3)`` in [0, 1]; values outside are clipped, NaN becomes black."""
    scaled = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(scaled).save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def magnify(perturbation: Pixels) -> tuple[Pixels, float]:
    """The perturbation around mid grey, and its factor: the largest of two digits that clips no pixel."""
    largest = float(np.abs(np.nan_to_num(perturbation)).max(initial=0.0))
    if not largest:
        return np.full_like(perturbation, 0.5), 1.0
    exact = 0.5 / largest
    step = 10.0 ** (math.floor(math.log10(exact)) - 1)
    factor = math.floor(exact / step) * step
    return 0.5 + factor * perturbation, factor


def picture(card: ImageCard) -> Picture:
    """The card with its caption and the PNGs of image, witness and magnified difference."""
    grown, factor = magnify(card.perturbation)
    # a factor of two digits, as a float, may print with more
    magnified = f"× {factor:.2g}" if factor < 100 else f"× {factor:.0f}"
    right = "correct" if card.label == card.prediction else "incorrect"
    name = f"{card.split} image {card.image}"
    return Picture(
        card,
        f"image {card.image}: class {card.label}, predicted {card.prediction} ({right}), beyond the boundary "
        f"{card.target}; margin {card.distance:.4g} by {card.estimator}",
        magnified,
        [
            ("image", f"{name} of class {card.label}, predicted as {card.prediction}", png(card.original)),
            ("witness", f"{name} moved over the boundary, predicted as {card.target}", png(card.witness)),
            (f"difference {magnified}", f"what was added to {name}, {magnified} around mid grey", png(grown)),
        ],
    )


def groups(run: str, cards: Sequence[ImageCard]) -> list[Group]:
    """Cards grouped by norm and split, in order of appearance."""
    by_norm_and_split: dict[tuple[str, str], list[Picture]] = {}
    for card in cards:
        by_norm_and_split.setdefault((card.norm, card.split), []).append(picture(card))
    return [
        Group(f"{norm_name(norm)} · {split} images", run, norm, split, pictures)
        for (norm, split), pictures in by_norm_and_split.items()
    ]
