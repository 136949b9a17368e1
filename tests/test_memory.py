"""Batch size from memory: what autograd saves per image, and that margins do not depend on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import memory
from attacks.estimators.deepfool import DeepFool
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.memory import affordable, kept_bytes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_autograd_keeps_only_the_activations() -> None:
    """With frozen weights a linear layer saves nothing per image, and a ReLU saves its output."""
    image = images(1)
    with frozen_view(network(), (0.0, 1.0), "box", image.device) as view:
        assert kept_bytes(view, image) == 4 * (32 + 16)
    # control: a wider network saves more
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 320), nn.ReLU(), nn.Linear(320, 3))
    with frozen_view(wide, (0.0, 1.0), "box", image.device) as view:
        assert kept_bytes(view, image) == 4 * 320


def test_batches_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = images(4)
    with frozen_view(network(), (0.0, 1.0), "box", points.device) as view:
        assert affordable(view, points, 128) == 128, "nothing is asked of small images"
        monkeypatch.setattr(memory, "SMALL", 0)
        assert affordable(view, points, 128) == 128
        monkeypatch.setattr(memory, "KEPT", 5 * 192 + 1)
        assert affordable(view, points, 128) == 5
        assert affordable(view, points, 3) == 3
        monkeypatch.setattr(memory, "KEPT", 10)
        assert affordable(view, points, 128) == 1


@pytest.mark.slow
def test_smaller_batches_give_the_same_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, points, widths = network(), images(24), []
    model.register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    whole = measure(model, points, DeepFool(), "l2", batch_size=24)
    assert max(widths) == 24
    widths.clear()
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "KEPT", 5 * 192)
    parts = measure(model, points, DeepFool(), "l2", batch_size=24)
    assert max(widths) == 5
    assert parts.status == whole.status
    torch.testing.assert_close(parts.distance, whole.distance, rtol=2e-4, atol=0)
