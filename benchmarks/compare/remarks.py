"""Remarks on estimators, derived from their numbers.

Each rule is one line of `RULES`; its threshold is a constant of this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.compare.audit import EXACT

# Medians: deepfool was observed at 1.02 to 1.13 on networks where it works, at 1.38 where it fails (18 of 60 images
# from noisy starts only)
OVER, FAR = 1.02, 1.25
FEW_FOUND = 0.99
NOISY = 0.05
# witnesses of good estimators were observed at up to 1.03 times the boundary on their segment, those of Foolbox's stock
# L2 FMN at 1.17 to 47
OVERSTEP = 1.1
# rank correlation: good estimators were observed above 0.95, Foolbox's stock L2 FMN at -0.1 to 0.5
UNRELATED = 0.7
LEAST_IMAGES = 10
# a margin that is exact to rounding; bisection stops within 1e-4
UNSOUND = 1 - 1e-3
HIDES = 0.01


LEVELS = ("do not use", "beware", "note")


@dataclass(frozen=True)
class Remark:
    """A sentence on one estimator, with one of `LEVELS`."""

    problem: str
    norm: str
    estimator: str
    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.estimator} {self.norm} ({self.problem}): {self.text}"


Row = Mapping[str, Any]


def remark(estimators: pd.DataFrame, ratios: pd.DataFrame) -> list[Remark]:
    """The remarks on every estimator, most severe first.

    Args:
        estimators: rows of `audit.estimator_table`; references get no remark.
        ratios: rows of `audit.ratio_table`.
    """
    keys = ["problem", "norm", "estimator"]
    exact = ratios[ratios["against"] == EXACT].set_index(keys)[["least", "median", "declared"]].add_suffix("_exact")
    remarks = []
    for _, row in estimators[estimators["role"] != "reference"].iterrows():
        key = tuple(row[name] for name in keys)
        truth = exact.loc[key].to_dict() if key in exact.index else dict.fromkeys(exact.columns, math.nan)
        facts = {**row.to_dict(), **truth}
        for rule, level in RULES:
            text = rule(facts)
            if text:
                remarks.append(Remark(*key, level, text))
    return sorted(remarks, key=lambda item: LEVELS.index(item.level))


def no_witness(row: Row) -> str:
    """Includes images that were found from noisy starts only."""
    if _found(row) > row["after_noise"] + row["tied"]:
        return ""
    noise = f"; the {row['after_noise']} distances are those of noisy starts" if row["after_noise"] else ""
    return f"no witness of its own: none of {row['images']} images was moved (does it return clean images?){noise}"


def unsound(row: Row) -> str:
    if not row["least_exact"] < UNSOUND:
        return ""
    return f"unsound: a distance of {row['least_exact']:.4f} times the exact margin, below which there is no boundary"


def too_far(row: Row) -> str:
    """A median of `FAR`, or of `OVER` if no image is within 5%."""
    if not (row["median"] >= FAR or (row["median"] >= OVER and row["within_5"] == 0)) or no_witness(row):
        return ""
    return f"median {_times(row['median'])} the envelope, {_within(row)}: its margins are not those of the network"


def unrelated(row: Row) -> str:
    """Refined distances that are not correlated with the margin."""
    if no_witness(row) or not (row["rank"] < UNRELATED and row["images"] >= LEAST_IMAGES):
        return ""
    return f"its distances hardly follow the margin: rank correlation {row['rank']:.2f} with the others' envelope"


def own_points_unrelated(row: Row) -> str:
    """Witnesses of the attack, before refinement, whose distances are not correlated with the margin."""
    follows = not (row["attack_rank"] < UNRELATED and row["images"] >= LEAST_IMAGES)
    if row["overstep"] < OVERSTEP or math.isnan(row["overstep"]) or follows:
        return ""
    return (
        f"what it returns hardly follows the margin (rank correlation {row['attack_rank']:.2f}) and lies "
        f"{_times(row['overstep'])} as far as the boundary on its way (median); only refinement makes a margin of it"
    )


def overstep(row: Row) -> str:
    """Witnesses of the attack, before refinement, far beyond the boundary on their segment."""
    if not row["overstep"] >= OVERSTEP or own_points_unrelated(row):
        return ""
    return (
        f"oversteps: what it returns lies {_times(row['overstep'])} as far as the boundary on its way (median); "
        "never use its distances without refinement"
    )


def over_estimates(row: Row) -> str:
    if not row["median"] >= OVER or too_far(row) or no_witness(row):
        return ""
    return f"over-estimates: median {_times(row['median'])} the envelope, {_within(row)}"


def misses(row: Row) -> str:
    if _found(row) >= FEW_FOUND * row["images"] or no_witness(row):
        return ""
    return f"finds {_found(row)} of {row['images']} images only; averages of what it finds leave the hard ones out"


def noisy(row: Row) -> str:
    """`measure` retries from noise if an attack fails; such distances are only weakly related to the margin."""
    if row["after_noise"] < NOISY * row["images"] or no_witness(row):
        return ""
    return f"{row['after_noise']} of {row['images']} images were found from noisy starts only: it fails on them"


def raises(row: Row) -> str:
    return f"raised on {row['failed']} of {row['images']} images: {row['message']}" if row["failed"] else ""


def undeclared(row: Row) -> str:
    """Affine problems only: no tightness is declared for others."""
    if not row["median_exact"] > row["declared_exact"]:
        return ""
    return f"median {row['median_exact']:.4f} times the exact margin, where it declares {row['declared_exact']:g}"


def hides(row: Row) -> str:
    if not row["hidden"] >= HIDES:
        return ""
    return (
        f"its library hides which images {row['hidden']:.0%} of its forwards belong to: passes are averages over a "
        "batch there, and its anytime curve and any budget show it worse than it is"
    )


RULES: tuple[tuple[Callable[[Row], str], str], ...] = (
    (no_witness, "do not use"),
    (unsound, "do not use"),
    (too_far, "do not use"),
    (unrelated, "do not use"),
    (own_points_unrelated, "do not use"),
    (overstep, "beware"),
    (misses, "beware"),
    (noisy, "beware"),
    (raises, "beware"),
    (undeclared, "beware"),
    (over_estimates, "note"),
    (hides, "note"),
)


def _found(row: Row) -> int:
    return int(row["images"] - row["not_found"] - row["failed"])


def _times(value: float) -> str:
    return f"{value:.2f} times"


def _within(row: Row) -> str:
    share = row["within_1"]
    return f"{share:.0%} of images within 1%" if share else "no image within 1%"
