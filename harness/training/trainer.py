"""Training as an iterator over epochs, resumable bit for bit; what is minimised is in `harness.training.objectives`.

Everything that an epoch draws (shuffling, dropout, which images are attacked and from where) comes from
generators seeded from (run seed, epoch). So neither what a caller draws between two epochs nor where a run
was interrupted changes the network, and a trainer's state is no more than its optimizer's and the epoch.
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
    """What a resumed trainer needs beside the network's weights; loadable with ``weights_only=True``."""

    epoch: int
    optimizer: dict[str, object]


class Trainer:
    """Train ``model`` in place, an epoch at a time; ``epoch`` counts the completed ones."""

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
        """Train for one pass over the images; the caller's generators are left as they were.

        ``on_batch`` is called after every batch with the number of batches done and their total.

        Raises:
            ValueError: the loss or a weight is not finite; the model is then of no further use.
        """
        entropy = np.random.SeedSequence((self.options.seed, self.epoch))
        own_seed, global_seed = map(int, entropy.generate_state(2, np.uint64))
        # on the CPU on every device, so that the draws are the same
        draws = torch.Generator().manual_seed(own_seed)
        batches = self._batches(draws)
        self._classifier.train()
        with torch.enable_grad(), seeded(global_seed, self.device):
            for done, index in enumerate(batches, start=1):
                self._step(index, draws, place=f"epoch {self.epoch + 1}, batch {done}")
                if on_batch is not None:
                    on_batch(done, len(batches))
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            epoch = self.epoch + 1
            raise ValueError(f"expected finite weights, got others after epoch {epoch}; lower the learning rate")
        self.epoch += 1

    def state_dict(self) -> TrainerState:
        """Return a snapshot of the training, without the model's weights, that later epochs do not change."""
        return {"epoch": self.epoch, "optimizer": copy.deepcopy(self._optimizer.state_dict())}

    def load_state_dict(self, state: TrainerState) -> None:
        """Continue from a snapshot; the model's weights of the same epoch are the caller's to load."""
        if set(state) != set(TrainerState.__annotations__):
            raise ValueError(
                f"expected a trainer state of epoch and optimizer, got {sorted(state)}; load what state_dict returned"
            )
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.epoch = state["epoch"]

    def _batches(self, draws: torch.Generator) -> list[Tensor]:
        """Return the shuffled image indices of each batch, the last incomplete one included."""
        order = torch.randperm(len(self._split), generator=draws)
        batches = list(torch.split(order, self.options.batch_size))
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.model.modules())
        # batch norm has no variance of a single row
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
        """The images that the loss is taken of."""
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
    """What a classifier says of the images: ``(N,)`` int64, float32 in ``[0, 1]``, float32, on the CPU.

    ``confidence`` is the softmax of the predicted class.
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
    """Classify every image in eval mode; the model's flags and the global generators are left as they were.

    Args:
        model: on ``device``.
        loss: the name of the per-image loss to report.
        batch_size: by default 1000, but 200 on a CPU, out of whose cache larger ones fall.
        binary: see `attacks.isolation.outputs.as_logits`.
    """
    per_image = loss_function(loss)
    size = batch_size or (200 if device.type == "cpu" else 1000)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    # seeded, because a user's model may draw in eval mode too
    with eval_mode(model), torch.no_grad(), seeded(0, device):
        for begin in range(0, len(split), size):
            part = slice(begin, begin + size)
            labels = split.labels[part].to(device)
            logits = as_logits(model(split.pixels(part).to(device)), binary)
            confidence, prediction = logits.float().softmax(1).max(1)
            parts.append((prediction.cpu(), confidence.cpu(), per_image(logits, labels).float().cpu()))
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))
