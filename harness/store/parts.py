"""Read the parts of a run and check their rows: columns, types, ranges, and agreement with the file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.estimator import Status
from attacks.types import DOMAINS
from harness.store import BOUND_COLUMNS, MARGIN_COLUMNS, RunFolder
from harness.store.identity import StoreError

INTEGERS = ("epoch", "image", "label", "prediction", "target", "noise_retries")
TEXTS = ("split", "estimator", "certifier", "norm", "domain", "status", "message")
TRUTHS = ("correct", "solved")
PREDICTION_COLUMNS = ("split", "image", "label", "prediction", "confidence", "loss")
ALLOWED = {"domain": DOMAINS, "status": tuple(map(str, Status))}
# columns without NaN and negative values
DISTANCES = ("distance", "attack_distance", "lower", "upper")


def read_margins(folder: RunFolder, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read a margin part, with `MARGIN_COLUMNS`, and its facts.

    Raises:
        StoreError: the part is damaged, belongs to another place, or has rows that margins cannot have.
    """
    return _read(folder, path, MARGIN_COLUMNS, "estimator")


def read_bounds(folder: RunFolder, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read a part of a certifier, with `BOUND_COLUMNS`, and its facts.

    Raises:
        StoreError: see `read_margins`.
    """
    return _read(folder, path, BOUND_COLUMNS, "certifier")


def read_predictions(folder: RunFolder, path: Path) -> tuple[pd.DataFrame, int, float]:
    """Read an epoch's predictions, with `PREDICTION_COLUMNS`, its number, and the seconds that its training took.

    Raises:
        StoreError: see `read_margins`.
    """
    rows, facts = folder.read_part(path)
    checked = _checked(path, rows, PREDICTION_COLUMNS, {})
    try:
        return checked, int(facts["epoch"]), float(facts["seconds"])
    except (KeyError, ValueError):
        raise StoreError(
            f"expected the epoch and seconds of a part at {path}, got {sorted(facts)}; delete it and --resume"
        ) from None


def _read(folder: RunFolder, path: Path, columns: Iterable[str], method: str) -> tuple[pd.DataFrame, dict[str, str]]:
    rows, facts = folder.read_part(path)
    place = folder.place(path)
    unit = place.unit if place else None
    if method == "estimator" and "basins" not in rows:
        # parts of earlier versions
        rows = rows.assign(basins=np.nan)
    same = {"epoch": place.epoch, method: unit.estimator, "norm": unit.norm} if place and unit else {}
    return _checked(path, rows, columns, same), facts


def _checked(path: Path, rows: pd.DataFrame, columns: Iterable[str], same: Mapping[str, object]) -> pd.DataFrame:
    """The rows with ``columns``, checked.

    Args:
        same: values that all rows must have, by column.

    Raises:
        StoreError: a column is missing or of another type, or a row has a value that it cannot have.
    """
    missing = [name for name in columns if name not in rows]
    if missing:
        raise StoreError(f"expected the columns of a part at {path}, got none of {missing}; delete it and --resume")
    rows = rows[list(columns)]
    for name, kinds in map(_dtype_kinds, columns):
        if rows[name].dtype.kind not in kinds:
            raise StoreError(
                f"expected the types of a part's columns at {path}, got {rows[name].dtype} as {name}; "
                "delete it and --resume"
            )
    allowed = {name: values for name, values in ALLOWED.items() if name in rows}
    distances = [name for name in DISTANCES if name in rows]
    for name, wanted, valid in (
        *((name, f"{name} {value}", rows[name] == value) for name, value in same.items()),
        *((name, f"{name} of {', '.join(values)}", rows[name].isin(values)) for name, values in allowed.items()),
        *((name, f"{name} of at least 0", rows[name] >= 0) for name in distances),
        *((name, f"{name} of at least 1", ~(rows[name] < 1)) for name in ("basins",) if name in rows),
        ("image", "every image once", ~rows.duplicated(["split", "image"])),
    ):
        if not valid.all():
            got = rows[name][~valid].iloc[0]
            raise StoreError(f"expected {wanted} in the rows of {path}, got {name} {got}; delete it and --resume")
    return rows


def _dtype_kinds(name: str) -> tuple[str, str]:
    """A column and the kinds that its dtype may have (`numpy.dtype.kind`)."""
    if name in INTEGERS:
        return name, "iu"
    if name in TEXTS:
        return name, "OUT"
    return name, "b" if name in TRUTHS else "fiu"
