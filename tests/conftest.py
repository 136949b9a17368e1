"""Every test starts from the same seeds, on one thread."""

import gc
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of later garbage collections, each of which would walk it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on real digits for a second, 297 held-out images, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for batch in torch.randperm(1500).split(100) * 20:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimiser.step()
    network.eval().requires_grad_(False)
    return network, images[1500:], labels[1500:]
