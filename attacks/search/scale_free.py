"""A classifier without the scale of its logits, for attacks that climb cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaleFree(nn.Module):
    """A classifier's logits divided by their spread, row by row: same argmax, no scale.

    Cross-entropy's gradient is exactly zero in float32 where logits are large, so that attacks that
    climb it die or drift as confidence grows. ``temperature * z / std(z)``, the spread held
    constant in the backward pass, leaves them the direction without the scale. With one class far
    ahead of many the spread is small beside the gap; rows are scaled down further until the two
    largest logits differ by ``MOST_GAP``, where the softmax still has digits to spare in float32.
    """

    MOST_GAP = 12.0

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        top = logits.detach().topk(2, dim=1).values
        spread = logits.detach().std(1, keepdim=True)
        unit = torch.maximum(spread, self.temperature / self.MOST_GAP * (top[:, :1] - top[:, 1:]))
        return self.temperature * logits / unit.clamp_min(torch.finfo(logits.dtype).tiny)
