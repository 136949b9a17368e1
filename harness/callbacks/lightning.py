"""Lightning callback that measures margins before training and after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from attacks.arguments import whole
from harness.tracking.tracker import MarginTracker


class MarginCallback(Callback):  # type: ignore[misc]
    """Measures margins at epoch 0, before the first update, and after every training epoch.

    The rows equal those of a plain loop that calls ``tracker.update(epoch, model)``. On several devices the process of
    rank 0 measures and the others wait. Averages are also sent to the trainer's loggers.

    Args:
        tracker: holds the probe images and estimators; created on every rank, but only rank 0's tracker writes.
        model: returns the part of the Lightning module that maps pixels to logits; by default the module itself.
        every: measure every N epochs; epochs 0 and 1 and the last one are always measured.
    """

    def __init__(
        self,
        tracker: MarginTracker,
        *,
        model: Callable[[LightningModule], nn.Module] = lambda module: module,
        every: int = 1,
    ) -> None:
        self.tracker, self.model, self.every = tracker, model, whole("every", every, 1)
        self.measured: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure epoch 0, unless training resumes from a checkpoint."""
        # in this hook, epochs and steps are already those of the checkpoint
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._measure(0, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the epoch that has ended."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        if epoch == 1 or last or epoch % self.every == 0:
            self._measure(epoch, trainer, pl_module, last=last)

    def state_dict(self) -> dict[str, Any]:
        """The measured epochs; the margins are in the run folder."""
        return {"measured": list(self.measured)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.measured = list(state_dict["measured"])

    def _measure(self, epoch: int, trainer: Trainer, module: LightningModule, last: bool = False) -> None:
        if trainer.is_global_zero:
            self.tracker.update(epoch, self.model(module), last=last)
            measured = self.tracker.measured_averages
            for logger in trainer.loggers if measured else ():
                logger.log_metrics(measured, step=epoch)
        self.measured.append(epoch)
        trainer.strategy.barrier("margins")
