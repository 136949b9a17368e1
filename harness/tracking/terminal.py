"""Terminal output of a run: progress, and a summary at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attacks.checks import ModelWarning
from harness.measuring.listener import Listener
from harness.store import RunFolder, Unit

WIDE, NARROW = 10_000, 9  # letters: more than any table has, and of a column that folds


def open_console(width: int = 120) -> Console:
    """The console of the standard output, with this number of columns where that is no terminal: rich takes 80."""
    console = Console(width=None if sys.stdout.isatty() else width)
    # with COLUMNS=0, rich would print nothing
    console.width = max(console.width, 1)
    return console


class Terminal(Listener):
    """Bars on a terminal; one plain line an epoch everywhere."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.began = time.monotonic()
        self.done_epochs = 0
        self.measured, self.measuring_seconds = 0, 0.0
        self._progress: Progress | None = None
        self._clock = 0.0
        self._told = set[str]()

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:>6.0f}/{task.total:.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._all = self._progress.add_task("epochs", total=self.epochs + 1, unit="epochs", note="")
            self._now = self._progress.add_task("training", total=1, unit="batches", note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, line: str) -> None:
        """One plain line; names in it are never read as markup."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def training_started(self, epoch: int) -> None:
        self._task(f"training epoch {epoch}", 1, "batches")

    def batch_done(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.update(self._now, completed=done, total=total)

    def units_started(self, epoch: int, units: Sequence[Unit], images: int) -> None:
        self._clock = time.monotonic()
        self._task(f"measuring {units[0] if len(units) == 1 else f'{len(units)} units'}", images, "images")

    def certifying_started(self, epoch: int, unit: Unit, images: int) -> None:
        self._task(f"certifying {unit}", images, "images")

    def unit_failed(self, epoch: int, unit: Unit, message: str) -> None:
        """Said at the end, once."""

    def told(self, warning: ModelWarning) -> None:
        """Say it once."""
        if str(warning) not in self._told:
            self._told.add(str(warning))
            self.say(str(warning))

    def unit_overdue(self, epoch: int, unit: Unit, seconds: float) -> None:
        """Said at the end, once."""

    def remarked(self, line: str) -> None:
        self.say(line)

    def images_done(self, count: int) -> None:
        self.measured += count
        now = time.monotonic()
        self.measuring_seconds, self._clock = self.measuring_seconds + now - self._clock, now
        if self._progress is not None:
            self._progress.update(self._now, advance=count, note=f"{self._rate():.0f} images/s")

    def epoch_ended(self, epoch: int, errors: dict[str, float], summary: pd.DataFrame) -> None:
        """Say how the epoch came out: errors, average margins, images without a distance, time left."""
        self.done_epochs += 1
        left = self._left(epoch)
        if self._progress is not None:
            self._progress.update(self._all, completed=epoch + 1, note=f"about {_clock(left)} left")
        parts = [f"epoch {epoch:>3}/{self.epochs}"]
        if errors:
            parts.append("error " + " ".join(f"{split} {100 * error:.2f}%" for split, error in errors.items()))
        for (estimator, norm), rows in summary[summary["subset"] == "all"].groupby(["estimator", "norm"], sort=False):
            margins = " ".join(f"{split} {_number(avg)}" for split, avg in zip(rows["split"], rows["avg"], strict=True))
            parts.append(f"{estimator} {norm} {margins}{_troubles(rows)}")
        parts.append(f"{self._rate():.0f} images/s, {_clock(left)} left")
        self.say(" | ".join(parts))

    def _task(self, description: str, total: int, unit: str) -> None:
        if self._progress is not None:
            self._progress.reset(self._now, total=total, description=description, unit=unit, note="")

    def _rate(self) -> float:
        return self.measured / self.measuring_seconds if self.measuring_seconds else 0.0

    def _left(self, epoch: int) -> float:
        return (time.monotonic() - self.began) / self.done_epochs * (self.epochs - epoch)


def print_summary(console: Console, summary: pd.DataFrame, folder: RunFolder, epochs: pd.DataFrame) -> None:
    """Average margins at the first, second (where there is room) and last measured epoch, failures, the files."""
    measured = sorted(summary["epoch"].unique())
    places = {0, 1 if console.width >= 100 else 0, len(measured) - 1}
    shown = [epoch for place, epoch in enumerate(measured) if place in places]
    sign = "+/-" if console.options.ascii_only else "±"
    title = f"average margin of the predicted class {sign} standard error"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    # names wrap where the table is too wide, so that no number is cut off
    table.add_column("estimator", overflow="fold")
    for heading in ("norm", "images"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(f"epoch {epoch}" for epoch in shown), "passes", "found"):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = summary[summary["subset"] == "all"]
    for (estimator, norm, split), rows in whole.groupby(["estimator", "norm", "split"], sort=False):
        cells = [_average(rows[rows["epoch"] == epoch], sign) for epoch in shown]
        passes = f"{(rows['forwards'] + rows['backwards']).mean():.0f}"
        found = f"{int(rows['found'].sum())}/{int(rows['count'].sum())}"
        table.add_row(escape(str(estimator)), str(norm), f"{int(rows['count'].max())} {split}", *cells, passes, found)
    print_table(console, table)
    said = "passes: forwards and backwards per image; found: images of all epochs"
    console.print(said, highlight=False, soft_wrap=True)
    for (estimator, norm), rows in whole.groupby(["estimator", "norm"], sort=False):
        if _troubles(rows):
            line = f"{estimator} {norm}: {int(rows['count'].sum())} images{_troubles(rows)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(epochs):
        last = epochs[epochs["epoch"] == epochs["epoch"].max()]
        words = ", ".join(f"{row['split']} {100 * row['error']:.2f}%" for _, row in last.iterrows())
        said = f"error at epoch {last['epoch'].iloc[0]}: {words}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(f"run folder: {folder.path}", markup=False, highlight=False, soft_wrap=True)
    files = "summary.csv  epochs.csv  margins/  predictions/  checkpoints/  figures/"
    console.print(f"  {files}", highlight=False, soft_wrap=True)
    console.print(f"report: {folder.report}", markup=False, highlight=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table whose folding columns give way to the others, but no cell is cut: rather it is too wide."""
    spare = 0
    for column in table.columns:
        if column.overflow == "fold":
            longest = max(Text.from_markup(str(text)).cell_len for text in (column.header, *column.cells))
            spare += max(longest - (column.min_width or NARROW), 0)
    least = Measurement.get(console, console.options.update(width=WIDE), table).maximum - spare
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _troubles(rows: pd.DataFrame) -> str:
    names = {"after_noise": "after noise", "not_found": "not found", "tied": "tied", "failed": "failed"}
    counts = [f"{int(rows[column].sum())} {words}" for column, words in names.items() if rows[column].sum()]
    return f" ({', '.join(counts)})" if counts else ""


def _average(rows: pd.DataFrame, sign: str) -> str:
    if not len(rows):
        return ""
    row = rows.iloc[0]
    if math.isnan(row["avg"]):
        return "none found"
    spread = "" if math.isnan(row["se"]) else f" {sign} {_number(row['se'])}"
    return _number(row["avg"]) + spread


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
