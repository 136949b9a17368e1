"""Training as an iterator over epochs that resumes bit for bit; see `harness.training.objectives` for the losses.

All random draws of an epoch (shuffling, dropout, choice and start of attacked images) come from generators seeded with
(run seed, epoch). Therefore neither a caller's draws between epochs nor an interruption changes the network, and the
state of a trainer is the optimizer's state and the epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.isolation.outputs import Logits, as_logits
from harness.data.dataset import Split
from harness.models.build import eval_mode, seeded
from harness.training.objectives import OPTIMIZERS, TrainingOptions, augmented, loss_function, pgd, trades_loss

OnBatch = Callable[[int, int], None]


class TrainerState(TypedDict):
    """The state of a trainer apart from the network's weights; loadable with ``weights_only=True``."""

    epoch: int
    optimizer: dict[str, object]


class Trainer:
    """Train ``model`` in place, one epoch at a time; ``epoch`` is the number of completed epochs."""

    def __init__(self, model: nn.Module, split: Split, options: TrainingOptions, device: torch.device) -> None:
        """Move ``model`` to ``device`` and prepare to train it on ``split``."""
        self.model = model.to(device)
        self._classifier = Logits(self.model, binary=options.binary)
        self.options = options
        self.device = device
        self.epoch = 0
        self._split = Split(split.images.to(device), split.labels.to(device), split.levels)
        self._loss = loss_function(options.loss)
        self._optimizer = OPTIMIZERS[options.optimizer](
            model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def run_epoch(self, on_batch: OnBatch | None = None) -> None:
        """Train for one pass over the images; the caller's generators are not advanced.

        Args:
            on_batch: called after every batch with the number of finished batches and their total.

        Raises:
            ValueError: the loss or a weight is not finite; the model cannot be trained further.
        """
        entropy = np.random.SeedSequence((self.options.seed, self.epoch))
        draws_seed, global_seed = map(int, entropy.generate_state(2, np.uint64))
        # always a CPU generator, so that the draws are the same on every device
        draws = torch.Generator().manual_seed(draws_seed)
        batches = self._batches(draws)
        self._classifier.train()
        with torch.enable_grad(), seeded(global_seed, self.device):
            for done, index in enumerate(batches, start=1):
                self._step(index, draws, place=f"epoch {self.epoch + 1}, batch {done}")
                if on_batch is not None:
                    on_batch(done, len(batches))
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            epoch = self.epoch + 1
            raise ValueError(
                f"expected finite weights, got NaN or infinity after epoch {epoch}; lower the learning rate"
            )
        self.epoch += 1

    def state_dict(self) -> TrainerState:
        """A snapshot of the training without the model's weights; later epochs do not change it."""
        return {"epoch": self.epoch, "optimizer": copy.deepcopy(self._optimizer.state_dict())}

    def load_state_dict(self, state: TrainerState) -> None:
        """Continue from a snapshot; the caller loads the model's weights of the same epoch.

        Raises:
            ValueError: ``state`` has other keys than epoch and optimizer.
        """
        if set(state) != set(TrainerState.__annotations__):
            raise ValueError(
                f"expected a trainer state of epoch and optimizer, got {sorted(state)}; load what state_dict returned"
            )
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.epoch = state["epoch"]

    def _batches(self, draws: torch.Generator) -> list[Tensor]:
        """The shuffled image indices of each batch, including the last incomplete one."""
        order = torch.randperm(len(self._split), generator=draws)
        batches = list(torch.split(order, self.options.batch_size))
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.model.modules())
        # batch norm cannot compute the variance of a single row
        if has_batch_norm and len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _step(self, index: Tensor, draws: torch.Generator, place: str) -> None:
        """Update the weights on the images at ``index``; ``place`` names the batch in an error."""
        images, labels = self._split.pixels(index), self._split.labels[index]
        images = augmented(images, self.options.augment, draws)
        if self.options.training == "trades":
            loss = trades_loss(self._classifier, images, labels, self._loss, self.options, draws)
        else:
            loss = self._loss(self._classifier(self._prepared(images, labels, draws)), labels).mean()
        if not loss.isfinite():
            raise ValueError(f"expected a finite loss, got {loss.item()} in {place}; lower the learning rate")
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()

    def _prepared(self, images: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        """The training images of a batch: clean, half of them attacked, or with noise."""
        if self.options.training == "pgd":
            return self._attack_half(images, labels, draws)
        if self.options.training == "gaussian":
            # as Cohen et al., 2019, https://arxiv.org/abs/1902.02918, section 3.3: every image, not clipped
            noise = torch.randn(images.shape, generator=draws).to(images.device)
            return images + self.options.noise_sigma * noise
        return images

    def _attack_half(self, images: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        """Replace a random half of ``images`` by adversarials (Mickisch et al., 2020, observation 2)."""
        half = torch.randperm(len(images), generator=draws)[: len(images) // 2]
        if not len(half):
            return images
        attacked = images.clone()
        attacked[half] = pgd(self._classifier, images[half], labels[half], self.options, draws)
        return attacked


def epochs(trainer: Trainer, last: int, on_batch: OnBatch | None = None) -> Iterator[int]:
    """Train up to epoch ``last``: yield the trainer's current epoch (0 if fresh), then each one completed."""
    yield trainer.epoch
    while trainer.epoch < last:
        trainer.run_epoch(on_batch)
        yield trainer.epoch


@dataclass(frozen=True, eq=False)
class Predictions:
    """A classifier's predictions, on the CPU.

    Attributes:
        prediction: ``(N,)`` int64, the predicted class.
        confidence: ``(N,)`` float32 in ``[0, 1]``, softmax of the predicted class.
        loss: ``(N,)`` float32, per image.
    """

    prediction: Tensor
    confidence: Tensor
    loss: Tensor


def evaluate(
    model: nn.Module,
    split: Split,
    loss: str,
    device: torch.device,
    batch_size: int | None = None,
    *,
    binary: bool = False,
) -> Predictions:
    """Classify every image in eval mode; training flags and global generators are restored.

    Args:
        model: on ``device``.
        loss: name of the per-image loss to report (see `harness.training.objectives.loss_function`).
        batch_size: by default 1000; on a CPU 200, as larger batches fall out of the cache.
        binary: see `attacks.isolation.outputs.as_logits`.
    """
    per_image = loss_function(loss)
    size = batch_size or (200 if device.type == "cpu" else 1000)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    # seeded, as a user's model may draw in eval mode too
    with eval_mode(model), torch.no_grad(), seeded(0, device):
        for begin in range(0, len(split), size):
            part = slice(begin, begin + size)
            labels = split.labels[part].to(device)
            logits = as_logits(model(split.pixels(part).to(device)), binary)
            confidence, prediction = logits.float().softmax(1).max(1)
            parts.append((prediction.cpu(), confidence.cpu(), per_image(logits, labels).float().cpu()))
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))
