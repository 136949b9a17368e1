"""Train and track: checkpoint, predictions and margins of every epoch, resumable part by part."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pandas as pd
import torch
from torch import nn

from harness.config.run_config import RunConfig
from harness.data.dataset import Dataset
from harness.models.weights import load_weights
from harness.runs import EPOCH_COLUMNS, epoch_table
from harness.statistics import SUMMARY_COLUMNS
from harness.store.files import write_text
from harness.store.growing import GrowingTable
from harness.store.parts import read_predictions
from harness.tracking.terminal import Terminal
from harness.tracking.tracker import MarginTracker
from harness.training.objectives import TrainingOptions
from harness.training.trainer import Trainer, TrainerState, evaluate


class TrackedRun:
    """Train ``model``, or load what others trained, and track it; what the run folder has already is not done again."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        model: nn.Module,
        device: torch.device,
        tracker: MarginTracker,
        existing: Mapping[int, Path] | None = None,
    ) -> None:
        """Prepare to train, or to go through ``existing`` checkpoints, epoch -> file."""
        self.config, self.dataset, self.model, self.device, self.tracker = config, dataset, model, device, tracker
        self.folder, self.existing = tracker.folder, existing or {}
        self.last = config.epochs or 0
        names = [field.name for field in dataclasses.fields(TrainingOptions)]
        options = TrainingOptions(**{name: getattr(config, name) for name in names})
        self.trainer = Trainer(model, dataset.train, options, device)
        self._initial = copy.deepcopy(model.state_dict()), self.trainer.state_dict()
        self._epochs = GrowingTable(EPOCH_COLUMNS, lambda path: epoch_table(*read_predictions(self.folder, path)))

    def go(self, terminal: Terminal) -> None:
        """Run to the last epoch.

        Raises:
            ValueError: training diverged, or the network cannot be measured.
            StoreError: a part is damaged or of another network.
        """
        for epoch in self.folder.trainer_epochs():
            self.folder.load_trainer(epoch)  # a damaged one is told now, not when training continues
        for epoch, seconds in self._existing(terminal) if self.existing else self._checkpointed(terminal):
            self._predict(epoch, seconds)
            summary = (
                self.tracker.update(epoch, self.model, last=epoch == self.last, refuse_late=False)
                if self._asked(epoch)
                else pd.DataFrame(columns=SUMMARY_COLUMNS)
            )
            table = self.epoch_table()
            here = table[table["epoch"] == epoch]
            errors = dict(zip(here["split"], here["error"], strict=True))
            terminal.epoch_ended(epoch, errors, summary)

    def epoch_table(self) -> pd.DataFrame:
        """Loss, error and seconds of every epoch, also written to ``epochs.csv``."""
        parts = self.folder.prediction_parts()
        table = self._epochs.of(parts)
        write_text(self.folder.epochs_csv, self._epochs.csv(parts))
        return table

    def _checkpointed(self, terminal: Terminal) -> Iterator[tuple[int, float]]:
        """Put each epoch's weights into the model, from its checkpoint or by training; yield epoch and seconds."""
        folder = self.folder
        trained = True  # model and optimizer are those of `trainer.epoch`
        for epoch in range(self.last + 1):
            if folder.checkpoint(epoch).exists():
                folder.load_checkpoint(epoch, self.model)
                trained = False
                yield epoch, math.nan
                continue
            if self._done(epoch) and not self._kept(epoch, self._newest()):
                trained = False
                continue
            began = time.perf_counter()
            if not trained:
                self._rewind(epoch)
                trained = True
            while self.trainer.epoch < epoch:
                terminal.training_started(self.trainer.epoch + 1)
                self.trainer.run_epoch(terminal.batch_done)
                self.tracker.check(self.trainer.epoch, self.model)
                if self.trainer.epoch < epoch and self._kept(self.trainer.epoch, epoch):
                    # it was lost, else training would have begun with it
                    folder.save_trainer(self.trainer.epoch, self.trainer.state_dict())
            seconds = time.perf_counter() - began
            # the state first: a checkpoint without one could not be trained further
            folder.save_trainer(epoch, self.trainer.state_dict())
            folder.save_checkpoint(epoch, self.model)
            self._drop_old_states()
            yield epoch, seconds
            self._drop_checkpoints()
        self._drop_old_states()
        self._drop_checkpoints()

    def _existing(self, terminal: Terminal) -> Iterator[tuple[int, float]]:
        """Put the weights of each checkpoint that was there already into the model, and keep them as our own."""
        said = set[str]()
        for epoch, path in self.existing.items():
            if self.folder.checkpoint(epoch).exists():
                self.folder.load_checkpoint(epoch, self.model)
            elif self._done(epoch):
                continue
            else:
                lines = [line for line in load_weights(path, self.model) if line not in said]
                said.update(lines)
                for line in lines:
                    terminal.say(f"{path.name}: {line}")
                self.tracker.check(epoch, self.model)
                self.folder.save_checkpoint(epoch, self.model)
            yield epoch, math.nan
            self._drop_checkpoints()

    def _asked(self, epoch: int) -> bool:
        """Whether margins are measured at the epoch."""
        return epoch in (0, 1, self.last) or epoch % self.config.every == 0

    def _done(self, epoch: int) -> bool:
        """Whether nothing is left to be done at the epoch."""
        # without its checkpoint, witnesses alone are not worth training again
        kept = self.folder.checkpoint(epoch).exists()
        whole = not self._asked(epoch) or self.tracker.has(epoch, last=epoch == self.last, witnesses=kept)
        return whole and self.folder.predictions(epoch).exists()

    def _rewind(self, epoch: int) -> None:
        """Go back to the last epoch before this one that can be trained on from, at worst to the start."""
        folder, (weights, state) = self.folder, self._initial
        whole = (e for e in reversed(range(epoch)) if folder.checkpoint(e).exists() and folder.trainer(e).exists())
        base = next(whole, None)
        if base is None:
            self.model.load_state_dict(weights)
        else:
            state = cast(TrainerState, folder.load_trainer(base))
            folder.load_checkpoint(base, self.model)
        self.trainer.load_state_dict(state)

    def _drop_old_states(self) -> None:
        """Keep the trainer's states of the last two epochs only."""
        newest = self._newest()
        for epoch in self.folder.trainer_epochs():
            if epoch < newest - 1:
                self.folder.drop(self.folder.trainer(epoch))

    def _kept(self, epoch: int, newest: int) -> bool:
        """Whether the epoch's checkpoint is to stay: of every so many epochs, the first two, and the last two.

        The last two are trained on from.
        """
        every = self.config.keep_checkpoints
        return epoch < 2 or epoch >= newest - 1 or (every > 0 and epoch % every == 0)

    def _newest(self) -> int:
        """The last epoch that has a checkpoint."""
        return max(self.folder.checkpoint_epochs(), default=0)

    def _drop_checkpoints(self) -> None:
        there = self.folder.checkpoint_epochs()
        for epoch in there:
            if not self._kept(epoch, there[-1]) and self._done(epoch):
                self.folder.drop(self.folder.checkpoint(epoch))

    def _predict(self, epoch: int, seconds: float) -> None:
        """Keep what the network says of the whole training and test set."""
        path = self.folder.predictions(epoch)
        if path.exists():
            return
        tables = []
        for name, split in (("train", self.dataset.train), ("test", self.dataset.test)):
            said = evaluate(self.model, split, self.config.loss, self.device, binary=self.config.binary)
            tables.append(
                pd.DataFrame(
                    {
                        "split": name,
                        "image": split.ids.numpy(),
                        "label": split.labels.numpy(),
                        "prediction": said.prediction.numpy(),
                        "confidence": said.confidence.numpy(),
                        "loss": said.loss.numpy(),
                    }
                )
            )
        self.folder.write_part(path, pd.concat(tables, ignore_index=True), seconds=repr(seconds))
