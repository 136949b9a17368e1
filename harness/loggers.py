"""Loggers of average margins: TensorBoard, Weights & Biases and MLflow; each is an optional extra."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import pandas as pd

from attacks.arguments import several, shown
from attacks.types import EstimatorError
from harness.config.registry import LOGGERS, definition
from harness.store import Unit


class Logger(Protocol):
    """Receives the average margins of every measured epoch."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the epoch's averages, in pixel units, by names such as ``margin/test/deepfool/l2``."""

    def close(self) -> None:
        """Finish; no more calls of `log` follow."""


class TensorBoard:
    """Scalars in an event file: ``tensorboard:DIR``."""

    def __init__(self, place: str) -> None:
        self._writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(place or "runs/tensorboard")

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases: ``wandb:PROJECT``; with ``WANDB_MODE=offline`` it stays on this machine.

    If a run is already active, margins are logged to it, and it stays open.
    """

    def __init__(self, place: str) -> None:
        wandb = _package("wandb", "wandb")
        self._created = wandb.run is None
        self._run = wandb.init(project=place or "margins") if self._created else wandb.run
        # margins get their own axis, as a training loop logs by steps
        self._run.define_metric("margin/*", step_metric="margin_epoch")

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log({**values, "margin_epoch": epoch})

    def close(self) -> None:
        """See `Logger`."""
        if self._created:
            self._run.finish()


class MLflow:
    """A run of MLflow: ``mlflow:URI``; if a run is already active, margins are logged to it."""

    def __init__(self, place: str) -> None:
        self._mlflow = _package("mlflow", "mlflow")
        active = self._mlflow.active_run()
        self._created = active is None
        if self._created:
            if place:
                self._mlflow.set_tracking_uri(place)
            active = self._mlflow.start_run()
        self._run = active.info.run_id

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        # MLflow does not allow all characters of an estimator's text
        named = {"".join(c if c.isalnum() or c in "_-./ :" else "." for c in name): v for name, v in values.items()}
        self._mlflow.log_metrics(named, step=epoch, run_id=self._run)

    def close(self) -> None:
        """See `Logger`."""
        if self._created:
            self._mlflow.end_run()


def check_logger(text: str) -> None:
    """Check that a text names a logger, without importing the logger's package.

    Raises:
        EstimatorError: unknown name.
    """
    name = text.partition(":")[0]
    if name not in LOGGERS:
        raise EstimatorError(f"expected a logger of {', '.join(LOGGERS)}, got {name!r}; choose one of them")


def create_logger(text: str) -> Logger:
    """Start a logger from its text: ``tensorboard:DIR``, ``wandb:PROJECT`` or ``mlflow:URI``.

    Raises:
        EstimatorError: the name is unknown, or the package is not installed.
    """
    check_logger(text)
    name, _, place = text.partition(":")
    logger: Logger = definition(LOGGERS[name])(place)
    return logger


def averages(summary: pd.DataFrame, units: Collection[Unit]) -> dict[str, float]:
    """Average margins over all images of one epoch, by name (``margin/SPLIT/ESTIMATOR/NORM``).

    Args:
        summary: rows of `harness.statistics.summarise` for one epoch.
        units: estimators and norms to include.
    """
    rows = summary[(summary["subset"] == "all") & summary["avg"].notna()]
    return {
        f"margin/{r['split']}/{r['estimator']}/{r['norm']}": float(r["avg"])
        for _, r in rows.iterrows()
        if Unit(r["estimator"], r["norm"]) in units
    }


def made_loggers(given: Any) -> list[Logger]:
    """Create loggers from texts; `Logger` objects are kept.

    Args:
        given: a text, a `Logger`, or several of them.

    Raises:
        EstimatorError: an unknown text, or an object without ``log`` and ``close``.
    """
    loggers = several(given)
    for logger in loggers:
        if isinstance(logger, str):
            check_logger(logger)
        elif isinstance(logger, type) or not (hasattr(logger, "log") and hasattr(logger, "close")):
            raise EstimatorError(
                f"expected loggers with log and close, got {shown(logger)}; give a text such as wandb:NAME"
            )
    return [create_logger(logger) if isinstance(logger, str) else logger for logger in loggers]


def _package(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EstimatorError(
            f"expected the package of the logger {extra}, got {error}; install margin-harness[{extra}]"
        ) from None
