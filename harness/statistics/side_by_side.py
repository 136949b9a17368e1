"""Comparison of several runs at their last epochs: average margins and their ratios to the first run's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.runs import Run
from harness.statistics.averages import standard_error
from harness.statistics.effects.paired import LogMeans
from harness.statistics.envelope import ENVELOPE
from harness.statistics.observations.pairing import Measured
from harness.statistics.panels import Panel

SIDE_COLUMNS = (
    *("run", "norm", "split", "estimator", "epoch", "error", "average", "se", "found"),
    *("ratio", "low", "high", "images"),
)
# options that decide which images are measured; runs of `MarginTracker` have ``probes``
SAME = ("data", "dataset", "train_images", "test_images", "probe", "probe_seed", "probes", "domain", "bounds")


def side_by_side(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per run, norm, split and estimator at the run's last measured epoch, in `SIDE_COLUMNS`; envelope first.

    ``ratio`` is the average margin divided by that of the first run, over the images that both have. ``low`` and
    ``high`` are its 95% interval, not corrected for the number of rows. All three are NaN for the first run itself,
    and where the two runs measured different images. Empty for a single run.
    """
    rows = []
    for subject in measured if len(measured) > 1 else ():
        first = {panel.key: panel for panel in measured[0].panels} if _comparable(subject, measured[0]) else {}
        errors = {(row.epoch, row.split): row.error for row in subject.run.epochs.itertuples()}
        for panel in subject.panels:
            if panel.measure != "distance":
                continue
            epoch = int(panel.epochs[-1])
            values = panel.at(epoch)
            found = values[np.isfinite(values)]
            where = {"run": panel.run, "norm": panel.norm, "split": panel.split, "estimator": panel.estimator}
            average = float(found.mean()) if len(found) else np.nan
            numbers = {"error": errors.get((epoch, panel.split), np.nan), "average": average}
            counts = {"epoch": epoch, "se": standard_error(found), "found": len(found)}
            reference = first.get(panel.key) if _same_parameters(subject, measured[0], panel.estimator) else None
            rows.append(where | counts | numbers | _ratio(panel, reference))
    table = pd.DataFrame(rows, columns=list(SIDE_COLUMNS))
    if not len(table):
        return table
    order = {name: place for place, name in enumerate(dict.fromkeys([ENVELOPE, *table["estimator"]]))}
    runs = {one.run.name: place for place, one in enumerate(measured)}
    ranks = table.assign(first=table["estimator"].map(order), last=table["run"].map(runs))
    by = ["first", "norm", "split", "last"]
    return ranks.sort_values(by, kind="stable")[list(SIDE_COLUMNS)].reset_index(drop=True)


def _comparable(one: Measured, other: Measured) -> bool:
    """Whether these are two different runs that measured the same images."""
    return one is not other and bool(_images(one.run)) and _images(one.run) == _images(other.run)


def _same_parameters(one: Measured, other: Measured, estimator: str) -> bool:
    """Whether all parameters agree: equal texts leave out defaults, which may differ between versions."""
    return one.run.parameters.get(estimator) == other.run.parameters.get(estimator)


def _images(run: Run) -> dict[str, object]:
    fingerprint = run.manifest.get("fingerprint", {})
    return {name: fingerprint[name] for name in SAME if name in fingerprint}


def _ratio(panel: Panel, first: Panel | None) -> dict[str, float]:
    nothing = dict.fromkeys(("ratio", "low", "high"), np.nan) | {"images": 0}
    if first is None or not np.array_equal(panel.images, first.images) or not np.array_equal(panel.label, first.label):
        return nothing
    values = np.stack([panel.values[:, -1], first.values[:, -1]], axis=1)
    effect = LogMeans(values, np.array([1.0, -1.0]))
    if effect.images < 2:
        return nothing
    ends = np.exp([effect.estimate, *effect.interval(0.05)])
    return dict(zip(("ratio", "low", "high"), ends.tolist(), strict=True)) | {"images": effect.images}
