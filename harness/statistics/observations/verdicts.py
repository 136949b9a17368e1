"""Verdicts on effects, with Holm's correction over all tests of an observation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness.statistics.effects.effect import Effect, is_sound

ALPHA = 0.05
MOST_LEFT_OUT = 0.05  # largest share of images without a distance at which an effect is tested
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
SIZES = ("images", "smaller_group", "left_out")
FINDING_COLUMNS = (
    *("observation", "claim", "run", "estimator", "norm", "split", "measure", "epochs", "effect"),
    *(
        "value",
        "low",
        "high",
        "level",
        "p",
        "p_holm",
        "images",
        "smaller_group",
        "left_out",
        "bound",
        "verdict",
        "reason",
        "detail",
    ),
)


@dataclass(frozen=True)
class Trial:
    """One test before the correction for multiple tests.

    Attributes:
        side: the claimed sign of the effect, -1 or 1; 0 claims that the effect is inside the bound.
        bound: half-width of the equivalence interval around 0, on the effect's own scale; NaN for no bound.
        obstacle: the reason why there is no effect to test.
        images, smaller_group, left_out: sizes of an effect that cannot be tested.
    """

    observation: int
    claim: str
    run: str
    estimator: str
    norm: str
    split: str
    measure: str
    epochs: str
    side: int
    effect: Effect | None = None
    bound: float = math.nan
    obstacle: str = ""
    images: int = 0
    smaller_group: int = 0
    left_out: int = 0

    def checked(self) -> Trial:
        """The trial, without its effect and with the obstacle where the effect cannot be tested."""
        if self.effect is None:
            return self
        obstacle = self.effect.obstacle()
        share = self.effect.left_out / max(1, self.effect.images + self.effect.left_out)
        if not obstacle and share > MOST_LEFT_OUT:
            obstacle = f"more than {100 * MOST_LEFT_OUT:.0f}% of the images have no distance"
        if not obstacle and not is_sound(self.effect):
            obstacle = "the images do not differ enough for an interval"
        if not obstacle:
            return self
        sizes = {name: getattr(self.effect, name) for name in SIZES}
        return replace(self, effect=None, obstacle=obstacle, **sizes)


def holm(p_values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Holm's (1979) adjusted p-values, and the level of each test's interval.

    The test with the i-th smallest p (from 0) of m has the level ``ALPHA / (m - i)`` while all tests before it are
    rejected. The first test that is not rejected, and all tests after it, have the level of that first test. An
    interval then excludes 0 exactly where its test is rejected.

    Returns:
        adjusted p-values and levels, ``(m,)`` each, in the order of ``p_values``.
    """
    count = len(p_values)
    adjusted, levels = np.ones(count), np.full(count, ALPHA)
    running, stopped = 0.0, math.inf
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        level = ALPHA / (count - rank)
        running = max(running, min(1.0, p_values[place] * (count - rank)))
        if stopped == math.inf and p_values[place] > level:
            stopped = level
        adjusted[place], levels[place] = running, min(level, stopped)
    return adjusted, levels


def judge(trials: Sequence[Trial]) -> pd.DataFrame:
    """All trials of one observation in one report, each with its verdict, in `FINDING_COLUMNS`.

    - ``not supported``: the interval lies inside the equivalence bound, or wholly on the side of 0 that is not
      claimed. The bound is checked first: a decline that is certainly below 2% does not count as a decline.
    - ``supported``: the corrected interval lies wholly on the claimed side of 0.
    - ``undecided`` otherwise.

    Holm's steps guard against false differences only. "Inside the bound" is therefore decided by the interval at the
    strictest level of the family, ``ALPHA / m``.
    """
    checked = [trial.checked() for trial in trials]
    tested = [trial for trial in checked if trial.effect is not None]
    adjusted, levels = holm([trial.effect.p for trial in tested if trial.effect is not None])
    strictest = ALPHA / max(1, len(tested))
    facts = {
        id(trial): _decide(trial, trial.effect, level, strictest) | {"p_holm": p}
        for trial, level, p in zip(tested, levels, adjusted, strict=True)
        if trial.effect is not None
    }
    rows = [_identity(trial) | facts.get(id(trial), _untested(trial)) for trial in checked]
    return pd.DataFrame(rows, columns=list(FINDING_COLUMNS))


def _identity(trial: Trial) -> dict[str, object]:
    names = ("observation", "claim", "run", "estimator", "norm", "split", "measure", "epochs", *SIZES)
    return {name: getattr(trial, name) for name in names}


def _untested(trial: Trial) -> dict[str, object]:
    return {"effect": "", "verdict": UNDECIDED, "reason": trial.obstacle, "detail": ""}


def _decide(trial: Trial, effect: Effect, level: float, strictest: float) -> dict[str, object]:
    low, high = effect.interval(level)
    narrow = effect.interval(strictest)
    inside = -trial.bound <= narrow[0] and narrow[1] <= trial.bound  # never where the bound is NaN
    reason, shown = "", (low, high, level)
    if trial.side == 0:
        shown = (*narrow, strictest)
        outside = narrow[0] > trial.bound or narrow[1] < -trial.bound
        verdict = SUPPORTED if inside else NOT_SUPPORTED if outside else UNDECIDED
        reason = {SUPPORTED: "", NOT_SUPPORTED: "the interval lies beyond the equivalence bound"}.get(
            verdict, "the interval crosses the equivalence bound"
        )
    elif inside:
        verdict, shown, reason = NOT_SUPPORTED, (*narrow, strictest), "inside the equivalence bound: as good as none"
    elif low > 0 or high < 0:
        verdict = SUPPORTED if (low > 0) == (trial.side > 0) else NOT_SUPPORTED
        reason = "" if verdict == SUPPORTED else "the interval lies on the other side"
    else:
        verdict, reason = UNDECIDED, f"the interval holds {effect.show(0):g}, which is no effect"
        if not math.isnan(trial.bound):
            reason += ", and at the family's strictest level more than the equivalence bound"
    show = effect.show
    return {
        "effect": effect.name,
        "value": show(effect.estimate),
        "low": show(shown[0]),
        "high": show(shown[1]),
        "level": 1 - shown[2],
        "p": effect.p,
        **{name: getattr(effect, name) for name in SIZES},
        "bound": show(trial.bound),
        "verdict": verdict,
        "reason": reason,
        "detail": effect.classical(),
    }
