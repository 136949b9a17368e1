"""Terminal output of a comparison."""

from __future__ import annotations

import math

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attacks.estimator import Margins
from attacks.types import Norm
from benchmarks.compare.audit import ENVELOPE, EXACT, OTHERS
from benchmarks.compare.remarks import LEVELS
from benchmarks.compare.results import Results
from benchmarks.problems import Problem, Truth
from harness.store import Unit
from harness.tracking.terminal import open_console, print_table

STYLES = dict(zip(LEVELS, ("bold red", "yellow", ""), strict=True))
LEGEND = (
    "ratios: distance / envelope, the smallest verified distance of all, image by image; one missed makes the mean inf",
    "found: mean over the images found | others: mean over the envelope of the others | missed: not found, or raised",
    "wins: images where no other is nearer by 0.01%; alone: all others are farther | noise: found from noisy starts",
    "f + b: forwards + backwards | ms: milliseconds per image | own: median distance before / after refinement",
    "rank: Spearman, with the envelope of the others | optimality: AttackBench's local one, of the true labels",
)


class Screen:
    """One plain line per measured unit, then tables and remarks."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or open_console(160)

    def say(self, line: str, style: str = "") -> None:
        """Print one line without interpreting markup."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True, style=style)

    def begin(self, problem: Problem) -> None:
        self.say(f"{problem.name}: {len(problem.images)} images, {problem.domain} domain")

    def unit(self, unit: Unit, margins: Margins, seconds: float) -> None:
        found = margins.distance[margins.distance.isfinite()]
        average = f"average {found.mean():.4f}, " if len(found) else ""
        passes = (margins.forwards + margins.backwards).mean()
        self.say(f"  {unit}: {average}{len(found)} found, {passes:.0f} passes, {seconds:.1f} s")

    def truth(self, norm: Norm, truth: Truth, seconds: float) -> None:
        self.say(f"  exact margins {norm}: {int(truth.solved.sum())} of {len(truth.solved)} solved, {seconds:.1f} s")

    def show(self, results: Results, skipped: tuple[str, ...] = ()) -> None:
        """Print all results: one table per problem and norm, known exact margins, rank correlations, remarks."""
        for line in skipped:
            self.say(line)
        for (problem, norm), rows in results.estimators.groupby(["problem", "norm"], sort=False):
            self.say("")
            limit = "" if results.budget is None else f", within {results.budget} passes per image"
            self.say(f"{problem}, {norm}: {rows['images'].iloc[0]} images{limit}", style="bold")
            print_table(self.console, _main_table(rows[rows["role"] == "estimator"]))
            here = (results.ratios["problem"] == problem) & (results.ratios["norm"] == norm)
            self._show_references(rows, results.ratios[here])
            left = results.unsolved
            self._show_unsolved(left[(left["problem"] == problem) & (left["norm"] == norm)])
            ranks = results.correlations
            self._show_ranks(ranks[(ranks["problem"] == problem) & (ranks["norm"] == norm)])
        self.say("")
        for line in LEGEND:
            self.say(line)
        if results.budget is not None:
            self.say(
                "within a budget: nearest points on the way, unrefined; f + b, ms, own, envelope are of whole runs"
            )
        self.say("")
        of = "" if results.budget is None else " on whole runs"
        self.say(f"remarks{of}:" if results.remarks else f"no remarks{of}: nothing speaks against these estimators")
        for item in results.remarks:
            self.say(str(item), style=STYLES[item.level])

    def _show_references(self, estimators: pd.DataFrame, ratios: pd.DataFrame) -> None:
        """Print the effect of references on the envelope, and ratios to further references."""
        references = estimators[estimators["role"] == "reference"]
        if len(references):
            alone = ", ".join(f"{row['estimator']} {row['sole_wins']}" for _, row in references.iterrows())
            self.say(f"in the envelope only (images on which it beats every estimator): {alone}")
        if estimators["nobody"].iloc[0]:
            self.say(f"no estimator found {estimators['nobody'].iloc[0]} of the images, which counts against all")
        # ratios against the others are in the table above
        asked = ratios[(ratios["role"] != "reference") & ~ratios["against"].isin([ENVELOPE, OTHERS])]
        for against, rows in asked.groupby("against", sort=False):
            images, left_open = rows[["images", "open"]].iloc[0]
            told = f", {left_open} of them open: in no share within 1% or 5%, and in no mean" if left_open else ""
            title = f"the exact margins ({images} images{told})" if against == EXACT else f"the envelope {against}"
            self.say(f"against {title}")
            print_table(self.console, _ratio_table(rows))

    def _show_unsolved(self, unsolved: pd.DataFrame) -> None:
        """Print every unsolved image with its bracket."""
        for _, row in unsolved.iterrows():
            bracket = f"between {row['lower']:.6g} and {row['upper']:.6g}"
            nearest = f"{row['envelope']:.6g} by {row['nearest']}"
            self.say(f"left open: image {row['image']}, its margin is {bracket}; the nearest found is {nearest}")

    def _show_ranks(self, correlations: pd.DataFrame) -> None:
        names = list(correlations["estimator"].unique())
        if len(names) < 2:
            return
        self.say("rank correlation of distances (images not found rank last)")
        table = _table(*(str(place) for place, _ in enumerate(names, 1)))
        for place, (name, rows) in enumerate(correlations.groupby("estimator", sort=False), 1):
            table.add_row(escape(f"{place} {name}"), *(_number(value, 3) for value in rows["rank"]))
        print_table(self.console, table)


def _main_table(rows: pd.DataFrame) -> Table:
    missed = bool((rows["not_found"] + rows["failed"]).any())
    more = ("others", "wins", "alone", "missed", "noise", "passes", "f + b", "ms", "own", "rank", "optimality")
    table = _table(*_ratio_headings(missed), *more)
    for _, row in rows.iterrows():
        cells = (
            *(_number(row["others"], 4), str(row["wins"]), str(row["sole_wins"])),
            *(str(row["not_found"] + row["failed"]), str(row["after_noise"])),
            *(f"{row['passes']:.0f}", f"{row['forwards']:.0f} + {row['backwards']:.0f}"),
            *(_number(1000 * row["seconds"], 1), _number(row["overstep"], 2), _number(row["rank"], 3)),
            _number(row["optimality"], 3),
        )
        table.add_row(escape(str(row["estimator"])), *_ratio_cells(row, missed), *cells)
    return table


def _ratio_table(rows: pd.DataFrame) -> Table:
    missed, declared = bool((rows["mean"] != rows["mean_found"]).any()), bool(rows["declared"].notna().any())
    table = _table("least", *_ratio_headings(missed), "missed", *(("declared",) if declared else ()))
    for _, row in rows.iterrows():
        cells = [_number(row["least"], 4), *_ratio_cells(row, missed), str(row["missed"])]
        table.add_row(escape(str(row["estimator"])), *cells, *([_number(row["declared"], 4)] if declared else []))
    return table


def _ratio_headings(missed: bool) -> list[str]:
    return ["mean", *(["found"] if missed else []), "median", "p90", "worst", "≤1%", "≤5%"]


def _ratio_cells(row: pd.Series, missed: bool) -> list[str]:
    names = ("mean", *(("mean_found",) if missed else ()), "median", "p90")
    shares = ["" if math.isnan(row[name]) else f"{row[name]:.1%}" for name in ("within_1", "within_5")]
    return [*(_number(row[name], 4) for name in names), _number(row["worst"], 3), *shares]


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    # names wrap if the table is too wide, so that no number is truncated
    table.add_column("estimator", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
