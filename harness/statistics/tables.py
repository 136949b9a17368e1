"""Tables of one run for the figures and the report, from its panels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from harness.statistics.averages import standard_error
from harness.statistics.effects.paired import LogMeans
from harness.statistics.envelope import ENVELOPE
from harness.statistics.panels import Panel

RATIO_COLUMNS = ("epoch", "split", "estimator", "norm", "ratio", "low", "high", "images")
CLASS_COLUMNS = ("epoch", "split", "estimator", "norm", "label", "avg", "se", "found", "count")
BOUNDARY_COLUMNS = ("epoch", "split", "estimator", "norm", "prediction", "target", "count")
CHANGE_COLUMNS = ("epoch", "previous", "split", "estimator", "norm", "images", "changed")
PATH_COLUMNS = ("split", "estimator", "norm", "image", "label", "epoch", "distance", "correct", "rank")
PATHS = 12


def estimator_ratios(panels: list[Panel]) -> pd.DataFrame:
    """Average of each estimator divided by that of the envelope, with its 95% interval, in `RATIO_COLUMNS`.

    The averages are over the images that both found. A trend of the ratio is a trend of the estimator's bias, not of
    the network.
    """
    envelopes = {(p.norm, p.split): p for p in panels if p.estimator == ENVELOPE}
    rows = []
    for panel in panels:
        best = envelopes.get((panel.norm, panel.split))
        if best is None or panel is best:
            continue
        for epoch in panel.epochs:
            values = np.stack([panel.at(epoch), best.at(epoch)], axis=1)
            ratio = LogMeans(values, np.array([1.0, -1.0]))
            if ratio.images < 2:
                continue
            low, high = ratio.interval(0.05)
            where = {"epoch": epoch, "split": panel.split, "estimator": panel.estimator, "norm": panel.norm}
            numbers = np.exp([ratio.estimate, low, high])
            rows.append(where | dict(zip(("ratio", "low", "high"), numbers, strict=True)) | {"images": ratio.images})
    return pd.DataFrame(rows, columns=list(RATIO_COLUMNS))


def class_margins(panels: Iterable[Panel]) -> pd.DataFrame:
    """Average margin by true class, in `CLASS_COLUMNS`."""
    rows = []
    for panel in panels:
        for label in np.unique(panel.label):
            of_class = panel.values[panel.label == label]
            for place, epoch in enumerate(panel.epochs):
                found = of_class[np.isfinite(of_class[:, place]), place]
                facts = {"found": len(found), "count": len(of_class), "se": standard_error(found)}
                average = float(found.mean()) if len(found) else np.nan
                where = {"epoch": epoch, "split": panel.split, "estimator": panel.estimator, "norm": panel.norm}
                rows.append(where | {"label": label, "avg": average} | facts)
    return pd.DataFrame(rows, columns=list(CLASS_COLUMNS))


def boundary_classes(panels: Iterable[Panel]) -> pd.DataFrame:
    """Images by predicted class and class beyond the nearest boundary, in `BOUNDARY_COLUMNS`."""
    tables = []
    for panel in panels:
        for place, epoch in enumerate(panel.epochs):
            known = panel.target[:, place] >= 0
            pairs = np.stack([panel.prediction[known, place], panel.target[known, place]])
            kinds, counts = np.unique(pairs, axis=1, return_counts=True)
            where = {"epoch": epoch, "split": panel.split, "estimator": panel.estimator, "norm": panel.norm}
            tables.append(pd.DataFrame({**where, "prediction": kinds[0], "target": kinds[1], "count": counts}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(BOUNDARY_COLUMNS))


def boundary_changes(panels: Iterable[Panel]) -> pd.DataFrame:
    """Share of images with another predicted class, or class beyond the boundary, than at the measured epoch before.

    In `CHANGE_COLUMNS`, over the images that were found at both epochs.
    """
    rows = []
    for panel in panels:
        for place in range(1, len(panel.epochs)):
            pairs = [(panel.prediction[:, p], panel.target[:, p]) for p in (place - 1, place)]
            known = (pairs[0][1] >= 0) & (pairs[1][1] >= 0)
            if not known.any():
                continue
            changed = (pairs[0][0] != pairs[1][0]) | (pairs[0][1] != pairs[1][1])
            when = {"epoch": panel.epochs[place], "previous": panel.epochs[place - 1], "split": panel.split}
            who = {"estimator": panel.estimator, "norm": panel.norm, "images": int(known.sum())}
            rows.append(when | who | {"changed": float(changed[known].mean())})
    return pd.DataFrame(rows, columns=list(CHANGE_COLUMNS))


def image_paths(panels: Iterable[Panel], count: int = PATHS) -> pd.DataFrame:
    """Margins over epochs of at most ``count`` images per panel, in `PATH_COLUMNS`.

    The images lie at even quantiles of the margins at the last epoch; ``rank`` 0 has the smallest.
    """
    tables = []
    for panel in panels:
        last = panel.values[:, -1]
        found = np.flatnonzero(np.isfinite(last))
        if not len(found):
            continue
        ordered = found[np.argsort(last[found], kind="stable")]
        chosen = ordered[np.unique(np.linspace(0, len(ordered) - 1, count).round().astype(int))]
        for rank, place in enumerate(chosen):
            who = {"split": panel.split, "estimator": panel.estimator, "norm": panel.norm}
            image = {"image": panel.images[place], "label": panel.label[place], "epoch": panel.epochs}
            path = {"distance": panel.values[place], "correct": panel.correct[place], "rank": rank}
            tables.append(pd.DataFrame({**who, **image, **path})[list(PATH_COLUMNS)])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(PATH_COLUMNS))


def correctness(predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split -> ``(image x epoch)`` bool: whether each image of the set was classified correctly."""
    tables = {}
    for split, rows in predictions.groupby("split", sort=False, observed=True):
        right = rows.assign(correct=rows["prediction"] == rows["label"])
        table = right.pivot(index="image", columns="epoch", values="correct")
        # an image that is missing at an epoch cannot be followed
        tables[str(split)] = table.dropna().astype(bool)
    return tables


def confidence_correlation(panel: Panel, epoch: int) -> float:
    """Spearman's rank correlation of margin and confidence over the images at an epoch; NaN where undefined."""
    margin, confidence = panel.at(epoch), panel.confidence[:, panel.column(epoch)]
    both = np.isfinite(margin) & np.isfinite(confidence)
    if both.sum() < 3 or np.ptp(margin[both]) == 0 or np.ptp(confidence[both]) == 0:
        return np.nan
    return float(stats.spearmanr(margin[both], confidence[both]).statistic)
