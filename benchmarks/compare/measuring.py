"""Run every estimator on a problem and keep rows, traces and times for the audit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attacks.estimator import Estimator, Margins
from attacks.measure import measure
from attacks.trace import Trace
from attacks.types import Norm
from benchmarks.problems import Problem, Truth
from harness.config.devices import device_of
from harness.measuring.plan import plan_units
from harness.measuring.rows import margin_rows
from harness.store import MARGIN_COLUMNS, Unit

TRUTH_COLUMNS = ("exact", "exact_lower", "exact_upper")
ROW_COLUMNS = ("problem", *MARGIN_COLUMNS, "hidden", *TRUTH_COLUMNS, "declared")
TRACE_COLUMNS = ("problem", "estimator", "norm", "image", "passes", "distance")


@dataclass(frozen=True)
class Measured:
    """Results of estimators on one or more problems.

    Attributes:
        rows: one row per image, estimator and norm, in `ROW_COLUMNS`: those of a run's margins, ``hidden`` (the
            image's forwards whose rows a library hides), ``exact`` (its margin; NaN if unknown), ``exact_lower`` and
            ``exact_upper`` (its proved bounds; NaN without any) and ``declared`` (the estimator's tightness; NaN
            except on affine problems).
        traces: one row per improvement of an image's nearest point, in `TRACE_COLUMNS`.
        skipped: a line for every estimator's norm or domain that a problem could not use.
    """

    rows: pd.DataFrame
    traces: pd.DataFrame
    skipped: tuple[str, ...] = ()


def join(parts: Sequence[Measured]) -> Measured:
    """Join several problems; every skipped line is kept once."""
    skipped = dict.fromkeys(line for part in parts for line in part.skipped)
    return Measured(
        pd.concat([part.rows for part in parts], ignore_index=True),
        pd.concat([part.traces for part in parts], ignore_index=True),
        tuple(skipped),
    )


def measure_problem(
    problem: Problem,
    estimators: Mapping[str, Estimator],
    norms: Sequence[Norm],
    *,
    repeats: int = 1,
    on_unit: Callable[[Unit, Margins, float], object] = lambda *_: None,
    on_truth: Callable[[Norm, Truth, float], object] = lambda *_: None,
) -> Measured:
    """Measure the images of a problem with every estimator in every norm that it supports.

    Estimators alternate in every round, so that a slower machine affects all of them. The first round is traced;
    ``seconds`` are the median of the other rounds, or those of the first if it is the only one. Tracing was observed
    to add up to 20%.

    Args:
        estimators: canonical text -> estimator; one without the problem's domain is skipped with a line.
        repeats: rounds.
        on_unit: called with every unit of the first round and its seconds.
        on_truth: called with the exact margins in every norm and their seconds.

    Raises:
        EstimatorError: an estimator supports none of the norms, or no estimator supports the domain.
    """
    able = {text: e for text, e in estimators.items() if problem.domain in e.domains}
    # if there is none, raise their error
    units, skipped = plan_units(able or estimators, norms, problem.domain)
    skipped += [f"{text} has no domain {problem.domain}: skipped there" for text in estimators if text not in able]
    rows, traces = [], []
    for norm in norms:
        chosen = [unit for unit in units if unit.norm == norm]
        results: dict[Unit, tuple[Margins, Trace]] = {}
        seconds: dict[Unit, list[float]] = {unit: [] for unit in chosen}
        for unit in chosen:
            _warm_up(problem, able[unit.estimator], norm)
        for turn in range(repeats):
            for unit in chosen:
                trace = None if turn else Trace()
                began = time.perf_counter()
                margins = _measure(problem, able[unit.estimator], unit, norm, trace)
                seconds[unit].append(time.perf_counter() - began)
                if trace is not None:
                    results[unit] = margins, trace
                    on_unit(unit, margins, seconds[unit][0])
        truth = None
        if problem.exact is not None and chosen:
            began = time.perf_counter()
            truth = problem.exact(norm)
            on_truth(norm, truth, time.perf_counter() - began)
        for unit in chosen:
            margins, trace = results[unit]
            timed = float(np.median(seconds[unit][1:] or seconds[unit])) / len(problem.images)
            declared = able[unit.estimator].tightness.get(norm, np.nan) if problem.affine else np.nan
            table = _unit_rows(problem, unit, margins, trace, truth)
            rows.append(table.assign(seconds=timed, declared=declared)[list(ROW_COLUMNS)])
            traces.append(_unit_trace(problem, unit, trace))
    return Measured(pd.concat(rows, ignore_index=True), pd.concat(traces, ignore_index=True), tuple(skipped))


def _measure(problem: Problem, estimator: Estimator, unit: Unit, norm: Norm, trace: Trace | None) -> Margins:
    return measure(
        problem.model,
        problem.images.to(device_of(problem.model)),
        estimator,
        norm,
        domain=problem.domain,
        noise_retries=problem.noise_retries,
        batch_size=problem.batch_size,
        seeds=problem.seeds(unit.estimator, norm),
        trace=trace,
    )


def _warm_up(problem: Problem, estimator: Estimator, norm: Norm) -> None:
    """Exclude imports and compilation at a library's first call from the estimator's cost."""
    image = problem.images[:1].to(device_of(problem.model))
    measure(problem.model, image, estimator, norm, domain=problem.domain, noise_retries=0)


def _unit_rows(problem: Problem, unit: Unit, margins: Margins, trace: Trace, truth: Truth | None) -> pd.DataFrame:
    table = margin_rows(problem.epoch, problem.split, problem.probe, unit, problem.domain, margins)
    known = (np.nan,) * 3 if truth is None else (truth.margin.numpy(), truth.lower.numpy(), truth.upper.numpy())
    facts = dict(zip(TRUTH_COLUMNS, known, strict=True))
    return table.assign(problem=problem.name, hidden=trace.hidden.numpy(), **facts)


def _unit_trace(problem: Problem, unit: Unit, trace: Trace) -> pd.DataFrame:
    key = {"problem": problem.name, "estimator": unit.estimator, "norm": unit.norm}
    columns = {"image": problem.probe.ids[trace.rows].numpy(), "passes": trace.passes, "distance": trace.distance}
    return pd.DataFrame({**key, **columns}, columns=list(TRACE_COLUMNS))
