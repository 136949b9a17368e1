"""Images with the smallest and the largest margins, and their witnesses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report.content import ImageCard
from harness.runs import Run
from harness.statistics.averages import FOUND
from harness.store import Unit

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 6  # number of images with the smallest, and with the largest margins


def image_cards(run: Run) -> list[ImageCard]:
    """Image cards of the last measured epoch by norm, on test images if there are any, otherwise on the last split.

    Each card has the nearest witness of all estimators. Empty where no image was found or no witness was kept.

    Raises:
        StoreError: a file of probes or witnesses is damaged.
    """
    rows = run.margins[run.margins["status"].isin(FOUND)]
    rows = rows[rows["epoch"] == run.margins["epoch"].max()] if len(rows) else rows
    if not len(rows):
        return []
    splits = list(rows["split"].unique())
    split = "test" if "test" in splits else splits[-1]
    rows = rows[rows["split"] == split]
    files = _Files(run)
    cards = []
    for _, of_norm in rows.groupby("norm", sort=False):
        nearest = of_norm.loc[of_norm.groupby("image", sort=False)["distance"].idxmin()].sort_values(
            "distance", kind="stable"
        )
        ends = ("smallest", nearest.head(SHOWN)), ("largest", nearest.iloc[SHOWN:].tail(SHOWN).iloc[::-1])
        for kind, chosen in ends:
            cards += [card for _, row in chosen.iterrows() if (card := _card(files, row, kind)) is not None]
    return cards


@dataclass(frozen=True)
class _Files:
    """Probe images and witnesses of a run, each file read once, in units where the pixel range is 1."""

    run: Run
    read: dict[Path, dict[str, Tensor]] = field(default_factory=dict)

    def image(self, path: Path, ids: str, images: str, wanted: int) -> NDArray[np.float64] | None:
        """Pixels of one image by its id, see `_pixels`; None where the file or the image is missing."""
        if path not in self.read:
            self.read[path] = self.run.folder.load_tensors(path) if path.exists() else {}
        tensors = self.read[path]
        if ids not in tensors or not (tensors[ids] == wanted).any():
            return None
        low, high = self.run.manifest.get("fingerprint", {}).get("bounds", (0.0, 1.0))
        return _pixels((tensors[images][tensors[ids] == wanted][0].double().numpy() - low) / (high - low))


def _card(files: _Files, row: pd.Series, kind: str) -> ImageCard | None:
    split, image, folder = str(row["split"]), int(row["image"]), files.run.folder
    original = files.image(folder.probes(split), "ids", "images", image)
    path = folder.witnesses(int(row["epoch"]), Unit(str(row["estimator"]), str(row["norm"])))
    witness = files.image(path, f"{split}.image", f"{split}.witness", image)
    if original is None or witness is None:
        return None
    return ImageCard(
        split=split,
        norm=str(row["norm"]),
        estimator=str(row["estimator"]),
        image=image,
        label=int(row["label"]),
        prediction=int(row["prediction"]),
        target=int(row["target"]),
        distance=float(row["distance"]),
        kind=kind,
        original=original,
        witness=witness,
        perturbation=witness - original,
    )


def _pixels(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(C, H, W)`` as ``(H, W, 3)`` for three channels, otherwise as ``(H, W)``, the average over the channels."""
    return np.moveaxis(image, 0, -1) if len(image) == 3 else image.mean(axis=0)
