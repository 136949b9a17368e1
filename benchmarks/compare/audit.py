"""Quality measures of margin estimators, computed from tables.

A ratio is an estimator's distance over a reference distance. Every image counts: an image that an estimator did not
find has the ratio inf, even if no other estimator found it. Quantiles and shares are over all images. A mean with one
such image is inf; ``mean_found`` excludes them. An unsolved image has no ratio to its exact margin, but counts as
outside every share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from attacks.estimator import Status
from harness.statistics import quantile

ENVELOPE = "envelope"
OTHERS = "the others"
EXACT = "exact"
# estimators that are exact margins and are excluded from the envelope
TRUTHS = ("affine", "exact")
# the bracket of refinement and its step beyond the boundary are each half of this fraction of a distance
RESOLUTION = 1e-4

RATIO_COLUMNS = ("least", "mean", "mean_found", "median", "p90", "worst", "within_1", "within_5")
KEY_COLUMNS = ("problem", "norm", "estimator", "role")
AGAINST_COLUMNS = (*KEY_COLUMNS, "against", "images", "open", *RATIO_COLUMNS, "missed", "declared")
OPEN_COLUMNS = ("problem", "norm", "image", "lower", "upper", "envelope", "nearest")
ESTIMATOR_COLUMNS = (
    *(*KEY_COLUMNS, "images", *RATIO_COLUMNS, "others", "wins", "sole_wins"),
    *("not_found", "failed", "after_noise", "tied", "nobody", "message"),
    *("forwards", "backwards", "passes", "seconds", "optimality", "rank", "overstep", "attack_rank", "hidden"),
)


def distances(rows: pd.DataFrame, column: str = "distance") -> pd.DataFrame:
    """Rows of one problem and norm as images by estimators, both in order of appearance."""
    wide = rows.pivot(index="image", columns="estimator", values=column)
    return wide.loc[rows["image"].unique(), rows["estimator"].unique()]


def envelope(wide: pd.DataFrame, leaving: Sequence[str] = ()) -> pd.Series:
    """The smallest distance of each image over all estimators except ``leaving`` and `TRUTHS`; inf without any."""
    names = [name for name in wide if name not in leaving and str(name).partition(":")[0] not in TRUTHS]
    return wide[names].min(axis=1) if names else pd.Series(np.inf, index=wide.index)


def settings_of(wide: pd.DataFrame, name: str) -> list[str]:
    """The estimators that match a text: a bare name matches all of its settings (``cascade:budget=100`` too)."""
    return [text for text in map(str, wide) if name in (text, text.partition(":")[0])]


def ratios(distance: pd.Series, reference: pd.Series) -> np.ndarray:
    """``distance / reference`` per image: 1 if both are 0, inf if the distance is inf, NaN without a reference."""
    near, far = distance.to_numpy(dtype=float), reference.to_numpy(dtype=float)
    result = np.divide(near, far, out=np.full(len(near), np.inf), where=np.isfinite(near) & (far > 0))
    result[(near == 0) & (far == 0)] = 1.0
    result[np.isnan(far)] = np.nan
    return result


def describe(ratio: np.ndarray, left_open: int = 0) -> dict[str, float]:
    """`RATIO_COLUMNS` over the ratios that are not NaN; NaN without any.

    Args:
        left_open: number of unsolved images, which are outside every share.
    """
    known = ratio[~np.isnan(ratio)]
    found = known[np.isfinite(known)]
    images = len(known) + left_open
    return {
        "least": quantile(known, 0.0),
        "mean": float(known.mean()) if len(known) else np.nan,
        "mean_found": float(found.mean()) if len(found) else np.nan,
        "median": quantile(known, 0.5),
        "p90": quantile(known, 0.9),
        "worst": quantile(known, 1.0),
        "within_1": float((known <= 1.01).sum() / images) if images else np.nan,
        "within_5": float((known <= 1.05).sum() / images) if images else np.nan,
    }


def wins(wide: pd.DataFrame, name: str) -> dict[str, int]:
    """Numbers of images: no other is nearer by more than `RESOLUTION`; all others are farther by more."""
    ratio = ratios(wide[name], envelope(wide, [name]))
    return {"wins": int((ratio <= 1 + RESOLUTION).sum()), "sole_wins": int((ratio < 1 - RESOLUTION).sum())}


def local_optimality(distance: np.ndarray, best: np.ndarray, correct: np.ndarray) -> float:
    """AttackBench's local optimality in 0..1 (Cinà et al. 2025, https://arxiv.org/abs/2404.19460).

    ``(rho e0 - A) / (rho e0 - A*)`` with the clean accuracy rho, the largest best distance e0, and the areas A, A*
    under the robust accuracy up to e0, which are the means of ``min(d, e0)``. Distances are to the true label's
    boundary: 0 for misclassified images.

    Args:
        distance, best: ``(N,)`` to the boundary of the predicted class.
        correct: ``(N,)`` bool.

    Returns:
        NaN if an image has no best distance, as e0 is then undefined, or if all are 0.
    """
    own, least = np.where(correct, distance, 0.0), np.where(correct, best, 0.0)
    largest = least.max(initial=0.0)
    most = correct.mean() * largest if len(correct) else 0.0
    if not np.isfinite(largest) or not most > least.mean():
        return float("nan")
    return float(np.clip((most - np.minimum(own, largest).mean()) / (most - least.mean()), 0.0, 1.0))


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's rank correlation; images not found are tied at infinity. NaN if one side is constant."""
    first, second = (np.asarray(values.rank(), dtype=float) for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    spread = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float(first @ second / spread) if spread > 0 else float("nan")


def correlation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of every pair of estimators per problem and norm: problem, norm, estimator, other, rank."""
    table = [
        {**key, "estimator": one, "other": other, "rank": rank_correlation(wide[one], wide[other])}
        for key, _, wide, _ in _groups(rows, None)
        for one in wide
        for other in wide
    ]
    return pd.DataFrame(table, columns=["problem", "norm", "estimator", "other", "rank"])


def estimator_table(rows: pd.DataFrame, whole: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each estimator against the envelope, in `ESTIMATOR_COLUMNS`, one row per problem, norm and estimator.

    `wins` are counted against estimators, not references. ``others`` is the mean ratio to the envelope of the others.
    ``rank`` and ``attack_rank`` are the rank correlations of ``distance`` and ``attack_distance`` with that envelope.
    ``overstep`` is the median of attack_distance / distance, which refinement removes. ``nobody`` counts images that
    no estimator found. ``hidden`` is the share of forwards whose rows a library hides.

    Args:
        rows: of `measuring.Measured` with a column ``role``, perhaps within a budget.
        whole: the same without a budget, for the envelope.
    """
    table = []
    for key, own, wide, full in _groups(rows, whole):
        best, references = envelope(full), pd.Index(own.loc[own["role"] == "reference", "estimator"].unique())
        for name in wide:
            unit = own[own["estimator"] == name].set_index("image").loc[wide.index]
            distance, others = unit["distance"], envelope(full, [str(name)])
            ratio, alone = ratios(distance, best), ratios(distance, others)
            found = np.isfinite(full[name]) & (full[name] > 0)
            facts = {
                "images": len(unit),
                **describe(ratio),
                "others": describe(alone)["mean"],
                **wins(wide.drop(columns=references.difference([name])), str(name)),
                **_counts(unit),
                "nobody": int(np.isinf(best).sum()),
                **{column: float(unit[column].mean()) for column in ("forwards", "backwards", "passes", "seconds")},
                "optimality": local_optimality(distance.to_numpy(), best.to_numpy(), unit["correct"].to_numpy()),
                "rank": rank_correlation(distance, others),
                "overstep": quantile((unit["attack_distance"] / full[name])[found].to_numpy(), 0.5),
                "attack_rank": rank_correlation(unit["attack_distance"], others),
                "hidden": float(unit["hidden"].sum() / max(unit["forwards"].sum(), 1)),
            }
            table.append({**key, "estimator": name, "role": unit["role"].iloc[0], **facts})
    return pd.DataFrame(table, columns=list(ESTIMATOR_COLUMNS))


def _counts(unit: pd.DataFrame) -> dict[str, object]:
    status = unit["status"]
    names = {"not_found": Status.NOT_FOUND, "failed": Status.FAILED}
    names |= {"after_noise": Status.FOUND_AFTER_NOISE, "tied": Status.TIED}
    messages = [text for text in unit["message"] if text]
    counts = {name: int((status == value.value).sum()) for name, value in names.items()}
    return {**counts, "message": messages[0] if messages else ""}


def ratio_table(rows: pd.DataFrame, whole: pd.DataFrame | None = None, leaving: Sequence[str] = ()) -> pd.DataFrame:
    """Each estimator against every reference, in `AGAINST_COLUMNS`.

    References are the envelope, the envelope of the others (an estimator better than all of them has ratios below 1),
    the envelope without each of ``leaving`` (see `settings_of`), and known exact margins. ``images`` are
    those with a reference, or whose exact margin is ``open``; ``missed`` those with a reference that the estimator did
    not find.

    Args:
        rows, whole: see `estimator_table`.
    """
    table = []
    for key, own, wide, full in _groups(rows, whole):
        best = {ENVELOPE: envelope(full)} | {
            f"without {name}": envelope(full, settings) for name in leaving if (settings := settings_of(full, name))
        }
        known = own.groupby("image", sort=False)[["exact", "exact_lower"]].first().loc[wide.index]
        bracketed, exact = known["exact_lower"].notna(), known["exact"]
        left_open = int((bracketed & exact.isna()).sum())
        # images without a reachable other class have no margin to compare with
        truth = {EXACT: exact.where(np.isfinite(exact))} if bracketed.any() else {}
        for name, unit in own.groupby("estimator", sort=False):
            references = best | {OTHERS: envelope(full, [str(name)])}
            facts = {"estimator": name, "role": unit["role"].iloc[0], "declared": unit["declared"].iloc[0]}
            table += [key | facts | _against(wide[name], *reference) for reference in references.items()]
            table += [key | facts | _against(wide[name], *reference, left_open) for reference in truth.items()]
        for reference in truth.items():
            facts = {"estimator": ENVELOPE, "role": ENVELOPE}
            table.append(key | facts | _against(best[ENVELOPE], *reference, left_open))
    return pd.DataFrame(table, columns=list(AGAINST_COLUMNS))


def _against(distance: pd.Series, name: str, reference: pd.Series, left_open: int = 0) -> dict[str, object]:
    ratio = ratios(distance, reference)
    images, missed = int((~np.isnan(ratio)).sum()) + left_open, int(np.isposinf(ratio).sum())
    return {"against": name, "images": images, "open": left_open, **describe(ratio, left_open), "missed": missed}


def open_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Unsolved images, in `OPEN_COLUMNS`: the bracket of the exact margin and the smallest distance of an estimator.

    Args:
        rows: see `estimator_table`; without a budget.
    """
    table = []
    for key, own, wide, _ in _groups(rows, None):
        known = own.groupby("image", sort=False)[["exact", "exact_lower", "exact_upper"]].first().loc[wide.index]
        best = envelope(wide)
        for image in known.index[known["exact_lower"].notna() & known["exact"].isna()]:
            bracket = {"lower": known.loc[image, "exact_lower"], "upper": known.loc[image, "exact_upper"]}
            nearest = {"envelope": best[image], "nearest": wide.loc[image].idxmin()}
            table.append({**key, "image": image, **bracket, **nearest})
    return pd.DataFrame(table, columns=list(OPEN_COLUMNS))


def pareto_front(passes: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """The points that no other point dominates in cost and quality; points without a number are excluded."""
    usable = np.isfinite(passes) & np.isfinite(quality)
    cheap = passes[None] <= passes[:, None]
    good = quality[None] <= quality[:, None]
    more = (passes[None] < passes[:, None]) | (quality[None] < quality[:, None])
    return np.asarray(usable & ~(cheap & good & more & usable[None]).any(axis=1))


def _groups(
    rows: pd.DataFrame, whole: pd.DataFrame | None
) -> Iterator[tuple[dict[str, object], pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """For every problem and norm: key, rows, their distances and those for the envelope, images by estimators."""
    for (problem, norm), own in rows.groupby(["problem", "norm"], sort=False):
        full = own if whole is None else whole[(whole["problem"] == problem) & (whole["norm"] == norm)]
        yield {"problem": problem, "norm": norm}, own, distances(own), distances(full)
