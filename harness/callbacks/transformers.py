"""A callback of Hugging Face's Trainer: margins before training and after every epoch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.tracking.tracker import MarginTracker


class Logits(nn.Module):
    """Pixels -> the logits of an image classifier of `transformers`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K)``."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


class MarginCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the tracker's images at epoch 0, before the first update, and after every training epoch.

    The process of rank 0 measures. The model gets ``pixel_values`` as the tracker's images are: give it a normalisation
    of its own (see `harness.models.weights.Normalized`) where its image processor has one.

    Args:
        tracker: of the images and estimators.
        wrap: whether the model returns an object with ``logits``, rather than logits.
    """

    def __init__(self, tracker: MarginTracker, *, wrap: bool = True) -> None:
        self.tracker, self.wrap = tracker, wrap

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Measure epoch 0, unless training goes on from a checkpoint."""
        if not state.global_step:
            self._measure(0, state, given["model"], last=False)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure the epoch that has ended."""
        epoch = round(state.epoch or 0)
        self._measure(epoch, state, given["model"], last=epoch >= args.num_train_epochs)

    def _measure(self, epoch: int, state: TrainerState, model: nn.Module, last: bool) -> None:
        if state.is_world_process_zero:
            self.tracker.update(epoch, Logits(model) if self.wrap else model, last=last)
