"""Hugging Face Trainer callback that measures margins before training and after every epoch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.tracking.tracker import MarginTracker


class Logits(nn.Module):
    """Wraps an image classifier of `transformers`: maps pixels to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` pixels -> ``(B, K)`` logits."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


class MarginCallback(TrainerCallback):  # type: ignore[misc]
    """Measures margins at epoch 0, before the first update, and after every training epoch.

    The process of rank 0 measures. The model gets the tracker's images as ``pixel_values``, without an image processor.
    If the processor normalises, put the normalisation into the model (see `harness.models.weights.Normalized`).

    Args:
        tracker: holds the probe images and estimators.
        wrap: whether the model returns an object with ``logits`` instead of logits.
    """

    def __init__(self, tracker: MarginTracker, *, wrap: bool = True) -> None:
        self.tracker, self.wrap = tracker, wrap

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Measure epoch 0, unless training resumes from a checkpoint."""
        if not state.global_step:
            self._measure(0, state, objects["model"], last=False)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Measure the epoch that has ended."""
        epoch = round(state.epoch or 0)
        self._measure(epoch, state, objects["model"], last=epoch >= args.num_train_epochs)

    def _measure(self, epoch: int, state: TrainerState, model: nn.Module, last: bool) -> None:
        if state.is_world_process_zero:
            self.tracker.update(epoch, Logits(model) if self.wrap else model, last=last)
