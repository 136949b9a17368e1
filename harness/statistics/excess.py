"""The estimated excess of measured margins over the margins, from the disagreement of an estimator's own searches.

An estimator that searches several times reports per image how much nearer the later searches came (``basins``, see
`attacks.estimator.Margins`). Where that is much, there are nearer witnesses still. How much nearer follows from
networks whose margins are known (``benchmarks.excess``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

EXCESS_COLUMNS = ("excess", "excess_low", "excess_high")
END_COLUMNS = ("estimator", "norm", "split", "epoch", "avg", *EXCESS_COLUMNS)
# the estimator whose basins were calibrated, with its default settings: with more passes, the same gain means less
CALIBRATED = "cascade"
# excess above which a unit's averages are called out
LARGE = 0.02
# smallest share of the found images with basins that says something about the others
KNOWN = 0.9
# excess of an average over n images that n images cannot rule out, times n: three images of n may be missed where none
# was seen to be (the rule of three), by 5% each
UNSEEN = 0.15


@dataclass(frozen=True)
class Calibration:
    """The excess is about ``scale * gain**power``, and in nine of ten units between ``low`` and ``high`` times that.

    ``gain`` is the share by which an average after the first search exceeds that after all.
    """

    scale: float
    power: float
    low: float
    high: float


# fitted to the exact margins of small networks and to envelopes of long runs of larger ones
CALIBRATION: Mapping[str, Calibration] = {
    "l2": Calibration(scale=3.5, power=1.3, low=1 / 5, high=4.0),
    "linf": Calibration(scale=2.8, power=1.14, low=1 / 30, high=5.0),
}


def own_excess(estimator: str, norm: str, distance: np.ndarray, basins: np.ndarray) -> dict[str, float]:
    """`EXCESS_COLUMNS` of one unit's average; NaN where the estimator's basins are unknown or were not calibrated.

    Args:
        distance, basins: ``(n,)`` of the images found.
    """
    known = np.isfinite(basins)
    calibration = CALIBRATION.get(norm)
    if calibration is None or estimator != CALIBRATED or not len(known) or known.mean() < KNOWN:
        return dict.fromkeys(EXCESS_COLUMNS, math.nan)
    gain = max(float((distance * basins)[known].sum() / distance[known].sum() - 1), 0.0)
    excess = calibration.scale * gain**calibration.power
    ends = excess, calibration.low * excess, calibration.high * excess + UNSEEN / len(distance)
    return dict(zip(EXCESS_COLUMNS, ends, strict=True))


def with_others(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with `EXCESS_COLUMNS` of other estimators too, by comparison with the calibrated one.

    An average that is larger by some factor has an excess that is larger by it. No excess is below that over the
    smallest average. Estimators that did not find all images are not compared.

    Args:
        summary: rows in `harness.statistics.SUMMARY_COLUMNS`.
    """
    result = summary.copy()
    for _, rows in summary.groupby(["epoch", "split", "subset", "norm", "domain"], sort=False):
        same = rows[(rows["found"] + rows["tied"] == rows["count"]) & (rows["avg"] > 0)]
        known = same[same["excess"].notna()]
        if not len(known):
            continue
        reference = known.iloc[0]
        ratio, least = same["avg"] / reference["avg"], reference["avg"] / same["avg"].min() - 1
        for column in EXCESS_COLUMNS:
            seen = least + UNSEEN / reference["found"] if column == "excess_high" else least
            result.loc[same.index, column] = ratio * (1 + max(reference[column], seen)) - 1
    return result


def excess_at_ends(summary: pd.DataFrame) -> pd.DataFrame:
    """The estimated excess of all images' averages at the first measured epoch from 1 on and the last: `END_COLUMNS`.

    Args:
        summary: see `with_others`.
    """
    rows = summary[(summary["subset"] == "all") & (summary["epoch"] >= 1) & summary["excess"].notna()]
    ends = rows.groupby(["estimator", "norm", "split"], sort=False)["epoch"].transform
    return rows[(rows["epoch"] == ends("min")) | (rows["epoch"] == ends("max"))][list(END_COLUMNS)]
