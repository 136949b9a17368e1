"""Write the files of a comparison atomically, after everything is measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attacks.estimator import Estimator
from benchmarks.compare.drawing import anytime_figure, cost_figure, security_figure
from benchmarks.compare.results import Results
from benchmarks.problems import slug
from harness.figures import save
from harness.store import environment, now
from harness.store.files import write_atomically
from harness.store.tables import write_csv
from harness.tracking.manifest import describe


def write(out: Path, results: Results, options: Mapping[str, Any], estimators: Mapping[str, Estimator]) -> list[str]:
    """Write tables and figures into the folder; returns their names, a figure's without its two endings."""
    tables = {
        "estimators": results.estimators,
        "ratios": results.ratios,
        "unsolved": results.unsolved,
        "correlations": results.correlations,
        "anytime": results.curves,
    }
    for name, table in tables.items():
        write_csv(out / f"{name}.csv", table)
    write_csv(out / "margins.csv", results.whole)
    facts = {
        "created": now(),
        "options": {key: _plain(value) for key, value in options.items()},
        "settings": describe(estimators),
        "remarks": [dataclasses.asdict(item) for item in results.remarks],
        **{name: [_plain(row) for row in table.to_dict("records")] for name, table in tables.items()},
        **environment(torch.get_num_threads()),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    write_atomically(out / "comparison.json", lambda path: path.write_text(text, encoding="utf-8"))
    return ["comparison.json", *(f"{name}.csv" for name in (*tables, "margins")), *_draw(out, results)]


def _draw(out: Path, results: Results) -> list[str]:
    names = []
    for problem in results.rows["problem"].unique():
        tables = (results.estimators, results.curves, results.rows, results.whole)
        estimators, curves, rows, whole = (table[table["problem"] == problem] for table in tables)
        shown = estimators[estimators["role"] == "estimator"]
        figures = {
            "cost": cost_figure(shown),
            "anytime": anytime_figure(curves, list(shown["estimator"])),
            "security": security_figure(rows, whole),
        }
        for kind, figure in figures.items():
            names.append(f"{kind}-{slug(str(problem))}")
            save(figure, out, names[-1])
    return names


def _plain(value: Any) -> Any:
    """Convert to JSON values: NaN becomes null, infinity the string inf."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
