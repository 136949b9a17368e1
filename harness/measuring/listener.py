"""Callbacks for the progress of measuring."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd

from attacks.checks import ModelWarning
from harness.store import Unit


class Listener:
    """Hears the progress of measuring; the command line draws it."""

    def units_started(self, epoch: int, units: Sequence[Unit], images: int) -> None:
        """A unit begins, or several next to each other, which this many images are measured for in all."""

    def images_done(self, count: int) -> None:
        """This many more images are done."""

    def unit_failed(self, epoch: int, unit: Unit, message: str) -> None:
        """A unit has no row but failures, and so no part; the others continue."""
        warnings.warn(f"{unit} failed on every image at epoch {epoch}: {message}", stacklevel=6)

    def told(self, warning: ModelWarning) -> None:
        """What spoils the model's margins."""
        warnings.warn(warning, stacklevel=5)

    def unit_overdue(self, epoch: int, unit: Unit, seconds: float) -> None:
        """A unit was stopped after its time, and has no part; the others continue."""
        warnings.warn(f"{unit} was stopped after {seconds:.3g} s at epoch {epoch}", stacklevel=7)

    def unit_ended(self, epoch: int, unit: Unit, rows: pd.DataFrame) -> None:
        """A unit's rows are written."""

    def remarked(self, line: str) -> None:
        """There is something to say of the run folder."""
        warnings.warn(line, stacklevel=4)

    def certifying_started(self, epoch: int, unit: Unit, images: int) -> None:
        """A certifier begins that this many images are bounded for."""
