"""The best verified distance after a number of passes, from the trace of one run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attacks.estimator import Status
from benchmarks.compare.audit import RATIO_COLUMNS, describe, distances, envelope, ratios

POINTS = 60  # number of points of a curve
CURVE_COLUMNS = ("problem", "norm", "estimator", "passes", "images", "found", *RATIO_COLUMNS, "hidden")


def best_within(trace: pd.DataFrame, final: pd.Series, passes: np.ndarray) -> np.ndarray:
    """Each image's best verified distance within a number of passes: ``(P, N)``, inf before the first.

    Never below the final distance: iterates that the estimator discarded, and nearer points that refinement saw but did
    not keep, do not count.

    Args:
        trace: columns image, passes, distance of one problem, norm and estimator.
        final: distances by image; a tie is 0 from the start.
        passes: ``(P,)``.
    """
    best = np.full((len(passes), len(final)), np.inf)
    places = pd.Index(final.index).get_indexer(trace["image"])
    for place in np.unique(places):
        own = trace[places == place].sort_values("passes", kind="stable")
        least = np.concatenate([[np.inf], np.minimum.accumulate(own["distance"].to_numpy())])
        best[:, place] = least[np.searchsorted(own["passes"].to_numpy(), passes, side="right")]
    ends = final.to_numpy(dtype=float)
    return np.where(ends == 0, 0.0, np.maximum(best, ends))


def within_budget(rows: pd.DataFrame, traces: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The rows after a number of passes: distance, status and passes; other columns are those of the whole run.

    Images without a witness yet are ``not_found``. References are unchanged: they only enter the envelope.

    Args:
        rows: of `measuring.Measured`, with columns ``role`` and ``passes``.
    """
    parts = []
    for (problem, norm, estimator), unit in rows.groupby(["problem", "norm", "estimator"], sort=False):
        if unit["role"].iloc[0] == "reference":
            parts.append(unit)
            continue
        final = unit.set_index("image")["distance"]
        best = best_within(_own(traces, problem, norm, estimator), final, np.array([budget]))[0]
        lost = np.isinf(best) & np.isfinite(final.to_numpy())
        parts.append(
            unit.assign(
                distance=best,
                status=unit["status"].where(~lost, Status.NOT_FOUND.value),
                passes=unit["passes"].clip(upper=budget),
            )
        )
    return pd.concat(parts, ignore_index=True)


def curves(rows: pd.DataFrame, traces: pd.DataFrame) -> pd.DataFrame:
    """How near each estimator is to the envelope after a number of passes, in `CURVE_COLUMNS`.

    References have no curve.

    ``found`` is the share of images with a witness; images without one yet have the ratio inf. ``hidden`` is the share
    of the estimator's forwards whose rows its library hides: if it is not 0, the curve is too high before its end.
    """
    table = []
    for (problem, norm), own in rows.groupby(["problem", "norm"], sort=False):
        wide = distances(own)
        best = envelope(wide)
        for name, unit in own[own["role"] != "reference"].groupby("estimator", sort=False):
            most = float(unit["passes"].max())
            grid = np.unique(np.append(np.round(np.geomspace(2, max(most, 2), POINTS)), np.ceil(most)))
            hidden = float(unit["hidden"].sum() / max(unit["forwards"].sum(), 1))
            for passes, found in zip(
                grid, best_within(_own(traces, problem, norm, name), wide[name], grid), strict=True
            ):
                ratio = ratios(pd.Series(found, index=wide.index), best)
                facts = {"passes": passes, "images": len(found), "found": float(np.isfinite(found).mean())}
                table.append(
                    {"problem": problem, "norm": norm, "estimator": name, **facts, **describe(ratio), "hidden": hidden}
                )
    return pd.DataFrame(table, columns=list(CURVE_COLUMNS))


def _own(traces: pd.DataFrame, problem: object, norm: object, estimator: object) -> pd.DataFrame:
    chosen = (traces["problem"] == problem) & (traces["norm"] == norm) & (traces["estimator"] == estimator)
    return traces[chosen]
