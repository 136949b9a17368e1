"""One rank of two that train together: ``python -m tests.ranks plain|lightning RANK FOLDER``."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from harness import MarginTracker

IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 4
PATIENCE = timedelta(minutes=5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


def tracker(folder: Path) -> MarginTracker:
    return MarginTracker(folder / "run", {"test": (IMAGES[:6], LABELS[:6])}, ["deepfool:steps=5"], ["l2"])


def plain(rank: int, folder: Path) -> None:
    """A custom loop: both ranks create a tracker at the same time, rank 0 measures, and both continue."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE
    )
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distributed.barrier()
    margins = tracker(folder)
    for epoch in range(2):
        if rank == 0:
            margins.update(epoch, model)
        mine = slice(rank * 8, rank * 8 + 8)
        functional.cross_entropy(model(IMAGES[mine]), LABELS[mine]).backward()
        optimizer.step()
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total.item() == 2
    distributed.destroy_process_group()


def lightning(rank: int, folder: Path) -> None:
    """The same with Lightning's trainer and our callback."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from harness.callbacks.lightning import MarginCallback

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images)
            return logits

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    os.environ["LOCAL_RANK"] = str(rank)  # as a launcher would, so that Lightning starts no process
    callback = MarginCallback(tracker(folder))
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=PATIENCE),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(Module(), DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    assert callback.measured == [0, 1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"plain": plain, "lightning": lightning}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
