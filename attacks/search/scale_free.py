"""Logits divided by their standard deviation, for attacks that maximise cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaleFree(nn.Module):
    """A classifier whose logits are divided by their standard deviation per row, which keeps the argmax.

    The gradient of cross-entropy is exactly zero in float32 where logits are large, so that attacks that maximise it
    stop or drift as confidence grows. ``temperature * z / std(z)``, with the standard deviation constant in the
    backward pass, keeps the direction and removes the scale. If one class leads many others by far, the standard
    deviation is small compared with the gap; such rows are scaled down further until the two largest logits differ by
    ``MOST_GAP``, at which the softmax is still well resolved in float32.
    """

    MOST_GAP = 12.0

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        top = logits.detach().topk(2, dim=1).values
        deviation = logits.detach().std(1, keepdim=True)
        unit = torch.maximum(deviation, self.temperature / self.MOST_GAP * (top[:, :1] - top[:, 1:]))
        return self.temperature * logits / unit.clamp_min(torch.finfo(logits.dtype).tiny)
