"""Margins in the loggers that people look at: TensorBoard, Weights & Biases, MLflow. Each is an extra."""

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
    """Gets the averages of every epoch that was measured."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Names such as ``margin/test/deepfool/l2`` and averages in pixel units."""

    def close(self) -> None:
        """No more will come."""


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
    """A run of Weights & Biases: ``wandb:PROJECT``; ``WANDB_MODE=offline`` keeps it here.

    A run that is active already is logged to and left open.
    """

    def __init__(self, place: str) -> None:
        wandb = _package("wandb", "wandb")
        self._own = wandb.run is None
        self._run = wandb.init(project=place or "margins") if self._own else wandb.run
        # margins have an axis of their own: a training loop logs by its steps
        self._run.define_metric("margin/*", step_metric="margin_epoch")

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log({**values, "margin_epoch": epoch})

    def close(self) -> None:
        """See `Logger`."""
        if self._own:
            self._run.finish()


class MLflow:
    """A run of MLflow: ``mlflow:URI``, of its own unless one is active."""

    def __init__(self, place: str) -> None:
        self._mlflow = _package("mlflow", "mlflow")
        active = self._mlflow.active_run()
        self._own = active is None
        if self._own:
            if place:
                self._mlflow.set_tracking_uri(place)
            active = self._mlflow.start_run()
        self._run = active.info.run_id

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        # MLflow's names may not have all characters that an estimator's text has
        named = {"".join(c if c.isalnum() or c in "_-./ :" else "." for c in name): v for name, v in values.items()}
        self._mlflow.log_metrics(named, step=epoch, run_id=self._run)

    def close(self) -> None:
        """See `Logger`."""
        if self._own:
            self._mlflow.end_run()


def check_logger(text: str) -> None:
    """Refuse a text that names no logger; needs none of them.

    Raises:
        EstimatorError: it does not.
    """
    name = text.partition(":")[0]
    if name not in LOGGERS:
        raise EstimatorError(f"expected a logger of {', '.join(LOGGERS)}, got {name!r}; choose one of them")


def create_logger(text: str) -> Logger:
    """Start a logger from its text: ``tensorboard:DIR``, ``wandb:PROJECT`` or ``mlflow:URI``.

    Raises:
        EstimatorError: there is none of that name, or its package is missing.
    """
    check_logger(text)
    name, _, place = text.partition(":")
    logger: Logger = definition(LOGGERS[name])(place)
    return logger


def averages(summary: pd.DataFrame, units: Collection[Unit]) -> dict[str, float]:
    """Average margins of all images of one epoch by split, estimator and norm.

    Args:
        summary: rows of `harness.statistics.summarise`.
        units: those whose averages are asked for.
    """
    rows = summary[(summary["subset"] == "all") & summary["avg"].notna()]
    return {
        f"margin/{r['split']}/{r['estimator']}/{r['norm']}": float(r["avg"])
        for _, r in rows.iterrows()
        if Unit(r["estimator"], r["norm"]) in units
    }


def made_loggers(given: Any) -> list[Logger]:
    """Loggers of texts and objects; a text or an object alone is one.

    Raises:
        EstimatorError: an unknown text, or something that does not log.
    """
    asked = several(given)
    for one in asked:
        if isinstance(one, str):
            check_logger(one)
        elif isinstance(one, type) or not (hasattr(one, "log") and hasattr(one, "close")):
            raise EstimatorError(
                f"expected loggers with log and close, got {shown(one)}; give a text such as wandb:NAME"
            )
    return [create_logger(one) if isinstance(one, str) else one for one in asked]


def _package(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EstimatorError(
            f"expected the package of the logger {extra}, got {error}; install margin-harness[{extra}]"
        ) from None
