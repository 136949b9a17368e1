"""Run folders, finished or not, read into tables."""

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
from harness.store.identity import StoreError, check_regular
from harness.store.parts import read_bounds, read_margins, read_predictions
from harness.store.tables import concatenate, from_csv

EPOCH_COLUMNS = ("epoch", "split", "loss", "error", "seconds")
# small types, because a whole training set at forty epochs has millions of rows: 15 bytes per row
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
    """One run: its manifest and all its rows.

    Attributes:
        name: its name in a report.
        folder: the run folder that it was read from.
        manifest: contents of ``manifest.json``.
        margins: rows in `harness.store.MARGIN_COLUMNS`; empty where nothing was measured.
        epochs: rows in `EPOCH_COLUMNS` (error in 0..1); empty where the caller trained.
        predictions: rows of the whole sets, with the columns and types of `PREDICTION_TYPES`; may be empty.
        bounds: rows in `harness.store.BOUND_COLUMNS`; empty where nothing was certified.
        remarks: one line per finding about the folder's files, see `harness.store.RunFolder.remarks`.
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
        """The options of the run; empty for a run of `MarginTracker`."""
        return dict(self.manifest.get("config", {}))

    @property
    def training(self) -> str:
        """``standard``, ``pgd``, ``trades`` or ``gaussian``; empty where the manifest does not name it."""
        return str(self.config.get("training", ""))

    @property
    def seed(self) -> int | None:
        """The seed of the training; None where the manifest does not name it."""
        return self.config.get("seed")

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Canonical text of an estimator -> JSON of all its parameters.

        The text alone leaves out defaults, which may differ between versions.
        """
        entries = self.manifest.get("estimators", ())
        return {entry["estimator"]: json.dumps(entry.get("parameters"), sort_keys=True) for entry in entries}

    def alike(self, *, but: tuple[str, ...]) -> str:
        """JSON of the fingerprint without the options in ``but``; empty for a run without options.

        Equal texts mean that two runs differ at most in these options.
        """
        fingerprint = self.manifest.get("fingerprint", {}) if self.config else {}
        return json.dumps({k: v for k, v in fingerprint.items() if k not in but}, sort_keys=True) if fingerprint else ""


def read_runs(paths: str | Path | Sequence[str | Path]) -> list[Run]:
    """Read run folders, finished or not, each under a unique name.

    The name is the folder's, preceded by its parents' as far as needed to tell equal names apart.

    Raises:
        StoreError: a folder is not a run, a part of it is damaged, or a run is given twice.
    """
    folders = [plain_path("a run folder", path) for path in several(paths)]
    whole = [path.resolve() for path in folders]
    twice = [path for place, path in enumerate(whole) if path in whole[:place]]
    if twice:
        raise StoreError(f"expected each run once, got {twice[0]} twice; name it once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return [read_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, whole, strict=True)]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run folder, finished or not.

    Raises:
        StoreError: the folder is not a run, or a part of it is damaged.
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
        # predictions have checksums, epochs.csv has none
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
            f"expected the columns {', '.join(EPOCH_COLUMNS)} in {path}, got a table without "
            f"{', '.join(sorted(missing))}; delete it and --resume"
        )
    return table


def epoch_table(predictions: pd.DataFrame, epoch: int, seconds: float) -> pd.DataFrame:
    """Mean loss and error of each split at one checkpoint: rows of ``epochs.csv``.

    Args:
        predictions: columns split, label, prediction, loss.
        seconds: training time of the epoch.
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
    """Verify the checksums of the files that only a report or a longer run reads: probes, witnesses, bounds.

    Raises:
        StoreError: a file is damaged or does not belong in its place; the message names it.
    """
    for split in folder.probe_splits():
        read_probe(folder, split)
    for path in folder.witness_files():
        folder.load_tensors(path)
    for path in folder.bound_parts():
        read_bounds(folder, path)
