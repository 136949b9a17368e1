"""A finished (or unfinished) run folder read into tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from attacks.arguments import plain_path, several
from attacks.types import one_line
from harness.data.probes import read_probe
from harness.store import BOUND_COLUMNS, MARGIN_COLUMNS, RunFolder
from harness.store.files import concatenate, from_csv
from harness.store.identity import StoreError, check_regular
from harness.store.parts import read_bounds, read_margins, read_predictions

EPOCH_COLUMNS = ("epoch", "split", "loss", "error", "seconds")
# what a whole training set at forty epochs is kept in: 15 bytes a row
PREDICTION_TYPES = {
    "epoch": "int32",
    "split": "category",
    "image": "int64",
    "label": "int32",
    "prediction": "int32",
    "confidence": "float32",
}
PGD_OPTIONS = ("pgd_epsilon", "pgd_steps", "pgd_step_size", "pgd_norm", "trades_beta")


@dataclass(frozen=True)
class Run:
    """One run: what it was, and every row of it.

    Attributes:
        name: how it is called in a report.
        margins: rows in `harness.store.MARGIN_COLUMNS`; empty where nothing was measured.
        epochs: epoch, split, loss, error, seconds; empty where the caller trained.
        predictions: epoch, split, image, label, prediction, confidence of the whole sets; may be empty.
        bounds: rows in `harness.store.BOUND_COLUMNS`; empty where nothing was certified.
        remarks: what is to be said of the folder's files, a line each (see `harness.store.RunFolder.remarks`).
    """

    name: str
    folder: RunFolder
    manifest: dict[str, Any]
    margins: pd.DataFrame
    epochs: pd.DataFrame
    predictions: pd.DataFrame
    bounds: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(BOUND_COLUMNS)))
    remarks: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The options; empty for a run of `MarginTracker`."""
        return dict(self.manifest.get("config", {}))

    @property
    def training(self) -> str:
        """``standard``, ``pgd``, or nothing where the run does not say."""
        return str(self.config.get("training", ""))

    @property
    def seed(self) -> int | None:
        """The training's seed, where the run says it."""
        return self.config.get("seed")

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Canonical text of an estimator -> all its parameters: the text leaves out defaults, which may change."""
        entries = self.manifest.get("estimators", ())
        return {entry["estimator"]: json.dumps(entry.get("parameters"), sort_keys=True) for entry in entries}

    def alike(self, *, but: tuple[str, ...]) -> str:
        """What runs share that differ at most in the options named; nothing for a run without options."""
        fingerprint = self.manifest.get("fingerprint", {}) if self.config else {}
        return json.dumps({k: v for k, v in fingerprint.items() if k not in but}, sort_keys=True) if fingerprint else ""


def read_runs(paths: str | Path | Sequence[str | Path]) -> list[Run]:
    """The runs, each with a name of its own: the folder's, with its parents' where two are called the same.

    Raises:
        StoreError: no run, a damaged one, or one given twice.
    """
    given = [plain_path("a run folder", path) for path in several(paths)]
    whole = [path.resolve() for path in given]
    twice = [path for place, path in enumerate(whole) if path in whole[:place]]
    if twice:
        raise StoreError(f"expected each run once, got {twice[0]} twice; name it once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return [read_run(one, "/".join(path.parts[-depth:])) for one, path in zip(given, whole, strict=True)]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run folder, finished or not.

    Raises:
        StoreError: no run here, or a damaged part.
    """
    path = plain_path("a run folder", path)
    folder = RunFolder(path)
    if not folder.exists():
        raise StoreError(f"expected a run folder, got {path} without manifest.json; give the folder that a run wrote")
    manifest = folder.read_manifest()
    folder.check_places()
    margins = concatenate((read_margins(folder, part)[0] for part in folder.margin_parts()), MARGIN_COLUMNS)
    bounds = concatenate((read_bounds(folder, part)[0] for part in folder.bound_parts()), BOUND_COLUMNS)
    predictions, epochs = [], []
    for part in folder.prediction_parts():
        rows, epoch, seconds = read_predictions(folder, part)
        predictions.append(rows.assign(epoch=epoch)[list(PREDICTION_TYPES)])
        epochs.append(epoch_table(rows, epoch, seconds))
    return Run(
        name=name or path.resolve().name,
        folder=folder,
        manifest=manifest,
        margins=margins,
        # the table itself has no checksum
        epochs=concatenate(epochs, EPOCH_COLUMNS) if epochs else _read_epochs(folder.epochs_csv),
        predictions=concatenate(predictions, PREDICTION_TYPES).astype(PREDICTION_TYPES),
        bounds=bounds,
        remarks=tuple(folder.remarks()),
    )


def _read_epochs(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=list(EPOCH_COLUMNS))
    check_regular(path)
    try:
        table = from_csv(path)
    except (ValueError, OSError, OverflowError) as error:
        raise StoreError(
            f"expected a table at {path}, got {one_line(error, kind=False)}; delete it and --resume"
        ) from None
    missing = set(EPOCH_COLUMNS) - set(table.columns)
    if missing:
        raise StoreError(
            f"expected the columns of epochs.csv at {path}, got none of {sorted(missing)}; delete it and --resume"
        )
    return table


def epoch_table(predictions: pd.DataFrame, epoch: int, seconds: float) -> pd.DataFrame:
    """Mean loss and error of each split at one checkpoint: rows of ``epochs.csv``.

    Args:
        predictions: columns split, label, prediction, loss.
        seconds: what training the epoch took.
    """
    rows = [
        {
            "epoch": epoch,
            "split": split,
            "loss": float(group["loss"].mean()),
            "error": float((group["prediction"] != group["label"]).mean()),
            "seconds": seconds,
        }
        for split, group in predictions.groupby("split", sort=False)
    ]
    return pd.DataFrame(rows, columns=list(EPOCH_COLUMNS))


def check_files(folder: RunFolder) -> None:
    """Read the parts that only a report or a longer run reads, against their checksums.

    Raises:
        StoreError: a damaged one, or one in another's place; names it.
    """
    for split in folder.probe_splits():
        read_probe(folder, split)
    for path in folder.witness_files():
        folder.load_tensors(path)
    for path in folder.bound_parts():
        read_bounds(folder, path)
