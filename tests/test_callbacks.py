"""Training loops of libraries give the margins of a plain loop; each test needs its library (`tox -e libraries`)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from harness import MarginTracker
from harness.store import RunFolder
from harness.store.tables import read_part
from tests import ranks as two

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
EPOCHS = 3
ROOT = Path(__file__).resolve().parent.parent


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def tracker(folder: Path) -> MarginTracker:
    return MarginTracker(folder, {"test": (IMAGES[:6], LABELS[:6])}, ["deepfool:steps=5"], ["l2"])


def plain(folder: Path, model: nn.Module) -> MarginTracker:
    """A plain loop: SGD over the batches in order."""
    tracked, optimizer = tracker(folder), torch.optim.SGD(model.parameters(), lr=0.1)
    tracked.update(0, model)
    for epoch in range(1, EPOCHS + 1):
        for images, labels in DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        tracked.update(epoch, model, last=epoch == EPOCHS)
    return tracked


def rows(found: MarginTracker) -> pd.DataFrame:
    parts = [read_part(path)[0].drop(columns="seconds") for path in found.folder.margin_parts()]
    return pd.concat(parts, ignore_index=True)


def test_a_lightning_loop_gives_the_margins_of_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from harness.callbacks.lightning import MarginCallback

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def trainer(epochs: int, callback: MarginCallback, **more: Any) -> Any:
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback],
            logger=CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1),
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **more,
        )

    def callback() -> MarginCallback:
        return MarginCallback(tracker(tmp_path / "lightning"), model=lambda module: module.model)

    batches = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    first = trainer(EPOCHS - 1, one := callback())
    first.fit(Module(), batches)
    assert one.state_dict() == {"measured": [0, 1, 2]}
    first.save_checkpoint(tmp_path / "two.ckpt")
    # resumed from a checkpoint, by the callback of a new process
    again = callback()
    trainer(EPOCHS, again).fit(Module(), batches, ckpt_path=tmp_path / "two.ckpt", weights_only=False)
    assert again.measured == [0, 1, 2, 3]
    wanted = rows(plain(tmp_path / "plain", network()))
    pd.testing.assert_frame_equal(rows(again.tracker), wanted, check_exact=True)
    logged = pd.concat([pd.read_csv(path) for path in sorted((tmp_path / "logs").rglob("metrics.csv"))])
    assert logged["margin/test/deepfool:steps=5/l2"].notna().sum() == EPOCHS + 1


def test_a_hugging_face_loop_gives_the_margins_of_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    from transformers.modeling_outputs import ImageClassifierOutput

    from harness.callbacks.transformers import MarginCallback

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
            logits = self.network(pixel_values)
            loss = None if labels is None else functional.cross_entropy(logits, labels)
            return ImageClassifierOutput(loss=loss, logits=logits)

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Classifier()
    tracked = tracker(tmp_path / "transformers")
    options = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    InOrder(
        model=model,
        args=options,
        train_dataset=[{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        callbacks=[MarginCallback(tracked)],
    ).train()
    pd.testing.assert_frame_equal(rows(tracked), rows(plain(tmp_path / "plain", network())), check_exact=True)
    assert json.loads((tmp_path / "transformers" / "manifest.json").read_text())["fingerprint"]["domain"] == "box"


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["plain", "lightning"])
def test_two_ranks_track_a_single_run(tmp_path: Path, loop: str) -> None:
    """Each rank creates a tracker, rank 0 measures a network with batch norm, and neither rank waits forever."""
    if loop == "lightning":
        pytest.importorskip("lightning")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", loop, str(rank), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | around,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    folder = RunFolder(tmp_path / "run")
    parts = [read_part(path)[0] for path in folder.margin_parts()]
    assert [rows["epoch"].unique().tolist() for rows in parts] == [[0], [1]]
    alone = MarginTracker(tmp_path / "alone", {"test": (two.IMAGES[:6], two.LABELS[:6])}, ["deepfool:steps=5"], ["l2"])
    alone.update(0, two.network())
    assert parts[0]["distance"].tolist() == read_part(alone.folder.margin_parts()[0])[0]["distance"].tolist()
