"""Print and write the results: agreement of margins first, then times."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.agreement import SAME, Agreement
from benchmarks.speed.comparing import Row, Table
from benchmarks.speed.timing import Spread
from harness.store import environment, now
from harness.store.files import write_atomically

HEADINGS = ("side", "timed", "images/s", "ms per image", "times as long as ours", "margins", "peak MiB")
LISTED = 5
LEGEND = (
    "ms per image, ratios: median over the rounds (least to most); a ratio is of one round's times. "
    "Inside every time: making the attack, its steps, and one last pass over its points; no refinement.",
    "margins: ours over theirs on average, and on how many images each has one; "
    "of Foolbox's DeepFool, which ours must equal, how many are the same to 1e-4.",
    "floor: (steps + 1) forwards and steps x (classes - 1) input gradients of the bare network, in full batches.",
)


def title(table: Table) -> str:
    """The title of a table."""
    row = table.rows[0]
    return f"{row.problem}: {row.estimator} {row.norm}, {row.images} image{'s' * (row.images != 1)}"


def lines(table: Table) -> Iterator[str]:
    """The table for a terminal: agreement of margins, then times and, for comparable margins, ratios."""
    yield title(table)
    for row in table.rows[1:]:
        assert row.agreement is not None
        yield f"  {row.side}: {margins(row.agreement)}"
        for image, ours, theirs in row.agreement.differing[: LISTED if _same(row) else 0]:
            yield f"    image {image}: ours {ours:.6g}, theirs {theirs:.6g}"
    yield f"  {'':22} {HEADINGS[2]:>19} {HEADINGS[3]:>31}  {HEADINGS[4]:26} {HEADINGS[6]:>8}"
    for row in table.rows:
        left = f"  {row.side:22} {1 / row.an_image.median:19.1f} {_milliseconds(row.an_image):>31}"
        yield f"{left}  {_ratio(row):26} {_memory(row):>8}".rstrip()
    for line in notes(table):
        yield f"  {line}"


def notes(table: Table) -> Iterator[str]:
    """The notes below a table."""
    yield f"ours: {table.forwards:.1f} forwards + {table.backwards:.1f} backwards per image"
    if table.floor is not None:
        floor = table.floor
        yield (
            f"floor: {1000 * floor.an_image:.3f} ms per image ({floor.steps:.2f} steps; a forward "
            f"{1000 * floor.forward:.4f} ms, a gradient {1000 * floor.backward:.4f} ms); ours takes "
            f"{_spread(floor.over)} times that"
        )
    yield from table.remarks


def margins(agreement: Agreement) -> str:
    """The agreement of margins in words."""
    found = f"found {agreement.found} and {agreement.found_theirs} of {agreement.images}"
    mean = "no image with both" if math.isnan(agreement.mean) else f"ours / theirs {agreement.mean:.4f}"
    if agreement.touching:
        found += f", theirs on {agreement.touching} more no farther than on the boundary, to rounding"
    same = agreement.images - len(agreement.differing)
    text = f"{same} of {agreement.images} the same within {SAME:g}, {mean}, {found}"
    return text if agreement.comparable else f"NOT COMPARABLE: {text}"


def markdown(tables: Sequence[Table], facts: Mapping[str, Any]) -> str:
    """All tables, with machine and versions."""
    parts = ["# Speed side by side", *LEGEND, f"```json\n{json.dumps(facts, indent=2)}\n```"]
    for table in tables:
        parts.append(f"## {title(table)}")
        body = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * 4 + "---|---:|"]
        for row in table.rows:
            compared = "" if row.agreement is None else margins(row.agreement)
            cells = [row.side, str(row.timed), f"{1 / row.an_image.median:.1f}", _milliseconds(row.an_image)]
            body.append(f"| {' | '.join([*cells, _ratio(row), compared, _memory(row)])} |")
        parts.append("\n".join(body))
        parts.append("\n".join(f"- {line}" for line in notes(table)))
        listed = [line for row in table.rows for line in _differing(row)]
        if listed:
            parts.append("\n".join(listed))
    return "\n\n".join(parts) + "\n"


def write(out: Path, tables: Sequence[Table], options: Mapping[str, Any], device: torch.device) -> None:
    """Write ``speed.json`` and ``speed.md`` into the folder atomically."""
    facts = made_with(device)
    content = {
        "created": now(),
        "options": dict(options),
        **facts,
        "tables": [dataclasses.asdict(table) for table in tables],
    }
    text = json.dumps(_plain(content), indent=2, allow_nan=False, default=str) + "\n"
    write_atomically(out / "speed.json", lambda path: path.write_text(text, encoding="utf-8"))
    page = markdown(tables, facts)
    write_atomically(out / "speed.md", lambda path: path.write_text(page, encoding="utf-8"))


def made_with(device: torch.device) -> dict[str, Any]:
    """Machine and versions, including those of the optional libraries."""
    facts = environment(torch.get_num_threads())
    for library in ("torchattacks", "adv-lib", "adversarial-robustness-toolbox"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts["versions"][library] = metadata.version(library)
    facts["machine"]["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text()
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return "cpu"


def _differing(row: Row) -> Iterator[str]:
    if row.agreement is not None and _same(row):
        for image, ours, theirs in row.agreement.differing:
            yield f"- {row.side}, image {image}: ours {ours:.6g}, theirs {theirs:.6g}"


def _same(row: Row) -> bool:
    """Whether to list single images; for another algorithm most differ."""
    return row.agreement is not None and 10 * len(row.agreement.differing) <= row.agreement.images


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    mark = "" if row.agreement is not None and row.agreement.comparable else " (not comparable)"
    return f"{_spread(row.ratio)}×{mark}"


def _memory(row: Row) -> str:
    return "" if row.memory is None else f"{row.memory / 2**20:.1f}"


def _milliseconds(value: Spread) -> str:
    return f"{1000 * value.median:.3f} ({1000 * value.least:.3f} to {1000 * value.most:.3f})"


def _spread(value: Spread) -> str:
    return f"{value.median:.2f} ({value.least:.2f} to {value.most:.2f})"


def _plain(value: Any) -> Any:
    """Convert to JSON values: NaN becomes null, infinity a string."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
