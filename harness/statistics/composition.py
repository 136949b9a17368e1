"""Decomposition of the change of a subset's average margin into stayers, entrants and leavers.

The paper argues that images that have just become correct are close to the boundary and so pull the correct images'
average down. The change from one epoch to the next is exactly

    change = (stayers' own change) + (effect of the entrants) + (effect of the leavers)

where stayers are in the subset, with a distance, at both epochs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from harness.statistics.effects.effect import LEAST_IMAGES, Student
from harness.statistics.panels import Panel

COMPOSITION_COLUMNS = (
    *("run", "epoch", "previous", "split", "estimator", "norm", "measure", "subset", "change", "stayers", "entrants"),
    *("leavers", "n_stayers", "n_entrants", "n_leavers", "gap"),
)


def composition(panel: Panel) -> list[dict[str, Any]]:
    """One row per pair of neighbouring measured epochs from 1 on, and per subset, in `COMPOSITION_COLUMNS`.

    ``gap`` is the average of the entrants minus the average of the stayers at the later epoch; NaN without either.
    A subset that is empty at one of the two epochs has no row.
    """
    rows = []
    later = panel.later
    for previous, epoch in itertools.pairwise(later):
        before, after = panel.column(previous), panel.column(epoch)
        for subset, member in (("correct", panel.correct), ("incorrect", ~panel.correct)):
            parts = _decompose(panel.values[:, before], panel.values[:, after], member[:, before], member[:, after])
            if parts is not None:
                key = {"run": panel.run, "epoch": int(epoch), "previous": int(previous), "split": panel.split}
                curve = {"estimator": panel.estimator, "norm": panel.norm, "measure": panel.measure, "subset": subset}
                rows.append(key | curve | parts)
    return rows


def _decompose(
    old: np.ndarray, new: np.ndarray, was_member: np.ndarray, is_member: np.ndarray
) -> dict[str, float] | None:
    was, now = was_member & np.isfinite(old), is_member & np.isfinite(new)
    if not was.any() or not now.any():
        return None
    stay, enter, leave = was & now, now & ~was, was & ~now
    change = float(new[now].mean() - old[was].mean())
    counts = {"n_stayers": int(stay.sum()), "n_entrants": int(enter.sum()), "n_leavers": int(leave.sum())}
    if not stay.any():
        # without stayers the whole change is due to entrants and leavers
        stayers, entrants, leavers, gap = 0.0, float(new[now].mean()), -float(old[was].mean()), np.nan
    else:
        stayers = float(new[stay].mean() - old[stay].mean())
        entrants = float(new[now].mean() - new[stay].mean())
        leavers = float(old[stay].mean() - old[was].mean())
        gap = float(new[enter].mean() - new[stay].mean()) if enter.any() else np.nan
    return {"change": change, "stayers": stayers, "entrants": entrants, "leavers": leavers, "gap": gap, **counts}


@dataclass(frozen=True, eq=False)
class NewcomerGap(Student):
    """Average margin of newly correct images minus that of images that stayed correct, over all epochs' newcomers.

    ``sum_t sum_{i new at t} (d_it - s_t) / (number of newcomers)`` with ``s_t`` the stayers' average. An image may
    be new more than once, and it stays in many epochs. The error is therefore over images, not over rows (the
    infinitesimal jackknife, clustered by image).

    Attributes:
        values: ``(N, T)`` margins at the later epoch of each pair; NaN without one.
        new, stayed: ``(N, T)`` bool.
    """

    name: ClassVar[str] = "average gap"
    values: np.ndarray
    new: np.ndarray
    stayed: np.ndarray

    @cached_property
    def _usable(self) -> tuple[np.ndarray, np.ndarray]:
        """New and stayed images with a distance, ``(N, T)`` bool each, in the epochs that have both."""
        found = np.isfinite(self.values)
        new, stayed = self.new & found, self.stayed & found
        both = new.any(axis=0) & stayed.any(axis=0)
        return new & both, stayed & both

    def _gap(self, counts: np.ndarray) -> np.ndarray:
        """``(B,)`` the gap where image ``i`` counts ``counts[b, i]`` times; ``counts`` is ``(B, N)``."""
        new, stayed = self._usable
        margins = np.nan_to_num(self.values)
        stayers = (counts @ (margins * stayed)) / np.maximum(counts @ stayed, 1e-300)
        newcomers = counts @ new
        total = np.maximum(newcomers.sum(axis=1), 1e-300)
        return np.asarray(((counts @ (margins * new)) - newcomers * stayers).sum(axis=1) / total)

    @cached_property
    def estimate(self) -> float:
        return float(self._gap(np.ones((1, len(self.values))))[0])

    @cached_property
    def error(self) -> float:
        new, stayed = self._usable
        margins = np.nan_to_num(self.values)
        stayers = (margins * stayed).sum(axis=0) / np.maximum(stayed.sum(axis=0), 1)
        per_stayer = new.sum(axis=0) / np.maximum(stayed.sum(axis=0), 1)
        influence = (new * (margins - stayers - self.estimate) - stayed * per_stayer * (margins - stayers)).sum(axis=1)
        # as for a sample variance, one degree of freedom is lost
        lost = self._newcomers / (self._newcomers - 1)
        return float(np.sqrt(np.square(influence).sum() * lost) / new.sum())

    @property
    def freedom(self) -> float:
        return self._newcomers - 1

    @cached_property
    def _newcomers(self) -> int:
        """Images that were newly correct at least once."""
        return int(self._usable[0].any(axis=1).sum())

    @property
    def images(self) -> int:
        """Images with a distance at every epoch at which they were newly correct or stayed correct."""
        return int((self.new | self.stayed).any(axis=1).sum()) - self.left_out

    @property
    def smaller_group(self) -> int:
        return self._newcomers

    @property
    def left_out(self) -> int:
        missing = (self.new | self.stayed) & ~np.isfinite(self.values)
        return int(missing.any(axis=1).sum())

    @property
    def size(self) -> int:
        return len(self.values)

    def obstacle(self) -> str:
        return f"fewer than {LEAST_IMAGES} images became correct" if self._newcomers < LEAST_IMAGES else ""

    def resample(self, counts: np.ndarray) -> np.ndarray:
        return self._gap(counts)


def newcomer_gap(panel: Panel) -> NewcomerGap | None:
    """The gap over the pairs of neighbouring measured epochs from 1 on; None where there is no pair."""
    places = [panel.column(epoch) for epoch in panel.later]
    if len(places) < 2:
        return None
    before, after = places[:-1], places[1:]
    was, now = panel.correct[:, before], panel.correct[:, after]
    return NewcomerGap(panel.values[:, after], now & ~was, now & was)


def composition_table(panels: list[Panel]) -> pd.DataFrame:
    """`composition` of all panels, in `COMPOSITION_COLUMNS`."""
    rows = [row for panel in panels for row in composition(panel)]
    return pd.DataFrame(rows, columns=list(COMPOSITION_COLUMNS))
