"""Warnings of a report as sentences."""

from __future__ import annotations

import pandas as pd

from harness.runs import Run
from harness.statistics.envelope import ENVELOPE
from harness.statistics.excess import LARGE
from harness.statistics.observations.pairing import Measured
from harness.statistics.observations.verdicts import UNDECIDED
from harness.statistics.warm import cold_samples

MANY = 0.05  # share of images found only from noisy starts above which there is a warning


def warnings_of(one: Measured) -> list[str]:
    """Warnings about one run: notes of its manifest, missing epochs, and images without a distance."""
    run: Run = one.run
    lines = [str(note) for note in run.manifest.get("notes", ())]
    if not len(run.margins):
        return [*lines, "nothing was measured"]
    whole = one.summary[one.summary["subset"] == "all"]
    measured = set(run.margins["epoch"])
    planned = run.config.get("epochs")
    if planned is not None and max(measured) < planned:
        lines.append(
            f"unfinished: measured up to epoch {max(measured)} of {planned}, which counts as the last epoch here"
        )
    if not run.training:
        lines.append("the manifest does not name the training: observation 1 is tested as if it were standard training")
    samples = cold_samples(run)
    for text, epochs in samples.items():
        lines.append(f"{text}: cold sample of its warm form, measured at epochs {', '.join(map(str, epochs))} only")
    for (estimator, norm), rows in whole.groupby(["estimator", "norm"], sort=False):
        total = int(rows["count"].sum())
        for column, words in (
            ("not_found", "have no distance: the attack found no witness"),
            ("failed", "have no distance: the library raised an error"),
            ("tied", "lie on the boundary: their two largest logits are equal"),
        ):
            count = int(rows[column].sum())
            if count:
                lines.append(f"{estimator} {norm}: {count} of {total} measurements {words}")
        noisy = rows.loc[rows["after_noise"] > MANY * rows["count"], "epoch"]
        if len(noisy):
            share = rows["after_noise"].sum() / total
            lines.append(
                f"{estimator} {norm}: more than {100 * MANY:.0f}% of the images were found from noisy starts only at "
                f"{noisy.nunique()} epochs ({100 * share:.0f}% of all measurements): these distances may be too large"
            )
        if estimator != ENVELOPE:
            lines += _too_far(str(estimator), str(norm), rows)
        absent = sorted(measured - set(rows["epoch"]))
        if absent and estimator not in samples:
            lines.append(f"{estimator} {norm}: not measured at epochs {', '.join(map(str, absent))}")
    if not len(run.predictions):
        lines.append("no predictions of whole sets were kept: flow and calibration are those of the probe images")
    return lines


def _too_far(estimator: str, norm: str, rows: pd.DataFrame) -> list[str]:
    """A warning where averages are estimated to exceed the margins by more than `LARGE`."""
    large = rows[rows["excess"] > LARGE].sort_values("excess", kind="stable")
    if not len(large):
        return []
    worst = large.iloc[-1]
    low, middle, high = (f"{100 * worst[name]:.2g}%" for name in ("excess_low", "excess", "excess_high"))
    epochs, place = large["epoch"].nunique(), f"epoch {worst['epoch']} ({worst['split']})"
    return [
        f"{estimator} {norm}: averages are estimated to exceed the margins by more than {100 * LARGE:.0f}% at "
        f"{epochs} epoch{'s' * (epochs > 1)}, by {middle} ({low} to {high}) at {place}"
    ]


def undecided(findings: pd.DataFrame) -> list[str]:
    """One warning per observation and reason that left tests undecided."""
    rows = findings[findings["verdict"] == UNDECIDED]
    return [
        f"observation {observation}: {len(group)} test{'s' if len(group) > 1 else ''} undecided: {reason}"
        for (observation, reason), group in rows.groupby(["observation", "reason"], sort=False)
    ]
