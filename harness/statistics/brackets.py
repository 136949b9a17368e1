"""Brackets: per image, a certified lower bound and the smallest verified distance, and what both say together."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from harness.config.run_config import ADVERSARIAL
from harness.statistics.averages import standard_error

KEYS = ("epoch", "split", "norm", "certifier", "domain")
BRACKET_COLUMNS = (
    *(*KEYS, "images", "lower", "lower_se", "upper", "upper_se", "tightness", "tight", "solved"),
    *("since", "compared", "closer", "farther"),
)
PROVED_COLUMNS = (
    *("observation", "claim", "run", "norm", "split", "certifier", "epochs"),
    *("by_upper", "by_lower", "certain", "images"),
)
TIGHT = 0.9  # lower / upper from which a bracket is called tight


def bracketed(bounds: pd.DataFrame, margins: pd.DataFrame) -> pd.DataFrame:
    """Rows of `harness.store.BOUND_COLUMNS` whose ``upper`` is the smallest distance that any estimator has by now."""
    if not len(bounds):
        return bounds
    keys = ["epoch", "split", "norm", "domain", "image"]
    least = margins.groupby(keys)["distance"].min().rename("nearest").reset_index()
    rows = bounds.merge(least, on=keys, how="left")
    rows["upper"] = np.fmin(rows["upper"], rows.pop("nearest"))
    return rows


def bracket_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages of `bracketed` rows in `BRACKET_COLUMNS`, one row an epoch, split, norm and certifier.

    ``tightness`` is the mean of lower / upper and ``tight`` the share of images where it is at least `TIGHT`.
    ``closer`` counts the images whose boundary has provably moved closer since the epoch ``since`` (the first from 1
    on that was certified): their upper bound is below the lower bound of then; ``farther`` the opposite; of
    ``compared`` images. Images without a witness count in ``images`` only.
    """
    found = [_averages(key, group) for key, group in rows.groupby(list(KEYS), sort=False)] if len(rows) else []
    table = pd.DataFrame(found, columns=[name for name in BRACKET_COLUMNS if name not in ("closer", "farther")])
    moves = [_moves(key, group, rows) for key, group in rows.groupby(list(KEYS), sort=False)] if len(rows) else []
    table[["since", "compared", "closer", "farther"]] = pd.DataFrame(
        moves, columns=["since", "compared", "closer", "farther"], index=table.index
    )
    return table[list(BRACKET_COLUMNS)].sort_values(list(KEYS)).reset_index(drop=True)


def _averages(key: tuple[object, ...], group: pd.DataFrame) -> dict[str, object]:
    both = group[np.isfinite(group["upper"]) & np.isfinite(group["lower"])]
    share = both["lower"] / both["upper"].where(both["upper"] > 0)
    share = share.fillna(1.0)
    return dict(zip(KEYS, key, strict=True)) | {
        "images": len(group),
        "lower": both["lower"].mean(),
        "lower_se": standard_error(both["lower"].to_numpy()),
        "upper": both["upper"].mean(),
        "upper_se": standard_error(both["upper"].to_numpy()),
        "tightness": share.mean(),
        "tight": (share >= TIGHT).mean() if len(share) else math.nan,
        "solved": group["solved"].mean(),
    }


def _moves(key: tuple[object, ...], group: pd.DataFrame, rows: pd.DataFrame) -> tuple[object, ...]:
    epoch, split, norm, certifier, _ = key
    alike = rows[(rows["split"] == split) & (rows["norm"] == norm) & (rows["certifier"] == certifier)]
    since = min((one for one in alike["epoch"] if one >= 1), default=None)
    if since is None or int(epoch) <= since:  # type: ignore[call-overload]
        return math.nan, 0, 0, 0
    pair = group.merge(alike[alike["epoch"] == since], on="image", suffixes=("", "_then"))
    closer = int((pair["upper"] < pair["lower_then"]).sum())
    return since, len(pair), closer, int((pair["lower"] > pair["upper_then"]).sum())


def proved(runs: dict[str, tuple[str, pd.DataFrame]], pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """The observations by both ends of the brackets, in `PROVED_COLUMNS`.

    A change of averages is ``certain`` where the averages' brackets do not overlap: whatever the true margins of these
    images are between their bounds. ``by_upper`` and ``by_lower`` are the changes at either end alone (differences, or
    the ratio of observation 2), which may only be those of the bounds' tightness.

    Args:
        runs: name -> training and `bracketed` rows. pairs: standard and adversarial run that belong together.
    """
    found: list[dict[str, object]] = []
    for name, (training, rows) in runs.items():
        for (split, norm, certifier), group in rows.groupby(["split", "norm", "certifier"], sort=False):
            place = {"run": name, "split": split, "norm": norm, "certifier": certifier}
            if training not in ADVERSARIAL:
                found += [place | one for one in _decline(group)]
            found += [place | one for one in _misclassified(group)]
    for standard, adversarial in pairs:
        found += list(_level(standard, adversarial, runs))
    return pd.DataFrame(found, columns=list(PROVED_COLUMNS))


def _finite(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.query("-inf < lower < inf and -inf < upper < inf")


def _decline(rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    epochs = sorted(one for one in rows["epoch"].unique() if one >= 1)
    if len(epochs) < 2:
        return
    first, last = (_finite(rows[rows["epoch"] == one]).set_index("image") for one in (epochs[0], epochs[-1]))
    common = first.index.intersection(last.index)
    first, last = first.loc[common], last.loc[common]
    certain = last["upper"].mean() < first["lower"].mean()
    opposite = last["lower"].mean() > first["upper"].mean()
    yield {
        "observation": 1,
        "claim": "decline",
        "epochs": f"{epochs[0]} → {epochs[-1]}",
        "by_upper": last["upper"].mean() - first["upper"].mean(),
        "by_lower": last["lower"].mean() - first["lower"].mean(),
        "certain": "holds" if certain else "does not hold" if opposite else "open",
        "images": len(common),
    }


def _misclassified(rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    last = _finite(rows[rows["epoch"] == rows["epoch"].max()])
    correct, incorrect = last[last["correct"]], last[~last["correct"]]
    if not len(correct) or not len(incorrect):
        return
    certain = incorrect["upper"].mean() < correct["lower"].mean()
    opposite = incorrect["lower"].mean() > correct["upper"].mean()
    yield {
        "observation": 3,
        "claim": "misclassified images closer",
        "epochs": str(rows["epoch"].max()),
        "by_upper": incorrect["upper"].mean() - correct["upper"].mean(),
        "by_lower": incorrect["lower"].mean() - correct["lower"].mean(),
        "certain": "holds" if certain else "does not hold" if opposite else "open",
        "images": len(last),
    }


def _level(standard: str, adversarial: str, runs: dict[str, tuple[str, pd.DataFrame]]) -> Iterator[dict[str, object]]:
    keys = ["split", "norm", "certifier"]
    plain = dict(iter(runs[standard][1].groupby(keys, sort=False)))
    for key, rows in runs[adversarial][1].groupby(keys, sort=False):
        if key not in plain:
            continue
        both = sorted(set(rows["epoch"]) & set(plain[key]["epoch"]))
        if not both:
            continue
        one, other = (_finite(table[table["epoch"] == both[-1]]) for table in (plain[key], rows))
        certain = other["lower"].mean() > one["upper"].mean()
        opposite = other["upper"].mean() < one["lower"].mean()
        yield dict(zip(keys, key, strict=True)) | {
            "observation": 2,
            "claim": "level",
            "run": f"{adversarial} / {standard}",
            "epochs": str(both[-1]),
            "by_upper": other["upper"].mean() / one["upper"].mean(),
            "by_lower": other["lower"].mean() / one["lower"].mean(),
            "certain": "holds" if certain else "does not hold" if opposite else "open",
            "images": len(other),
        }
