"""Brackets: per image, a certified lower bound and the smallest verified distance; their averages and proofs."""

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
    """Rows of `harness.store.BOUND_COLUMNS` with ``upper`` lowered to the smallest distance of any estimator so far."""
    if not len(bounds):
        return bounds
    keys = ["epoch", "split", "norm", "domain", "image"]
    least = margins.groupby(keys)["distance"].min().rename("nearest").reset_index()
    rows = bounds.merge(least, on=keys, how="left")
    rows["upper"] = np.fmin(rows["upper"], rows.pop("nearest"))
    return rows


def bracket_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages of `bracketed` rows in `BRACKET_COLUMNS`, one row per epoch, split, norm and certifier.

    ``tightness`` is the mean of lower / upper, and ``tight`` is the share of images where lower / upper is at least
    `TIGHT`. ``since`` is the first certified epoch from 1 on. ``closer`` counts the images whose upper bound is below
    their lower bound at ``since``: their boundary has provably moved closer. ``farther`` counts those whose lower
    bound is above their upper bound at ``since``. Both are out of ``compared`` images. Images without a witness count
    in ``images`` only.
    """
    averages = [_averages(key, group) for key, group in rows.groupby(list(KEYS), sort=False)] if len(rows) else []
    table = pd.DataFrame(averages, columns=[name for name in BRACKET_COLUMNS if name not in ("closer", "farther")])
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
    since = min((measured for measured in alike["epoch"] if measured >= 1), default=None)
    if since is None or int(epoch) <= since:  # type: ignore[call-overload]
        return math.nan, 0, 0, 0
    pair = group.merge(alike[alike["epoch"] == since], on="image", suffixes=("", "_then"))
    closer = int((pair["upper"] < pair["lower_then"]).sum())
    return since, len(pair), closer, int((pair["lower"] > pair["upper_then"]).sum())


def proved(runs: dict[str, tuple[str, pd.DataFrame]], pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """The observations by both ends of the brackets, in `PROVED_COLUMNS`.

    A change of averages is ``certain`` where the brackets of the averages do not overlap: it then holds for all true
    margins of these images between their bounds. ``by_upper`` and ``by_lower`` are the changes of either end alone
    (differences; a ratio for observation 2). They may be due to a change of the bounds' tightness only.

    Args:
        runs: name of the run -> training, and `bracketed` rows.
        pairs: names of a standard and of an adversarial run that belong together.
    """
    proofs: list[dict[str, object]] = []
    for name, (training, rows) in runs.items():
        for (split, norm, certifier), group in rows.groupby(["split", "norm", "certifier"], sort=False):
            place = {"run": name, "split": split, "norm": norm, "certifier": certifier}
            if training not in ADVERSARIAL:
                proofs += [place | proof for proof in _decline(group)]
            proofs += [place | proof for proof in _misclassified(group)]
    for standard, adversarial in pairs:
        proofs += list(_level(standard, adversarial, runs))
    return pd.DataFrame(proofs, columns=list(PROVED_COLUMNS))


def _verdict(certain: bool, opposite: bool) -> str:
    return "holds" if certain else "does not hold" if opposite else "open"


def _finite(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.query("-inf < lower < inf and -inf < upper < inf")


def _decline(rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    epochs = sorted(epoch for epoch in rows["epoch"].unique() if epoch >= 1)
    if len(epochs) < 2:
        return
    first, last = (_finite(rows[rows["epoch"] == epoch]).set_index("image") for epoch in (epochs[0], epochs[-1]))
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
        "certain": _verdict(certain, opposite),
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
        "certain": _verdict(certain, opposite),
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
        base, robust = (_finite(table[table["epoch"] == both[-1]]) for table in (plain[key], rows))
        certain = robust["lower"].mean() > base["upper"].mean()
        opposite = robust["upper"].mean() < base["lower"].mean()
        yield dict(zip(keys, key, strict=True)) | {
            "observation": 2,
            "claim": "level",
            "run": f"{adversarial} / {standard}",
            "epochs": str(both[-1]),
            "by_upper": robust["upper"].mean() / base["upper"].mean(),
            "by_lower": robust["lower"].mean() / base["lower"].mean(),
            "certain": _verdict(certain, opposite),
            "images": len(robust),
        }
