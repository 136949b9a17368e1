"""Adapter to torchattacks 3.5.1, whose results are candidates, which `attacks.judging` verifies."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks.types import Norm

LIBRARY_NORM: dict[Norm, str] = {"l2": "L2", "linf": "Linf"}


class Anchored(nn.Module):
    """A model as torchattacks requires it: with a parameter on its device, and for images of any dtype.

    torchattacks reads the device from the first parameter, and some attacks compute in float32 for all images.
    ``dtype`` is that of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.to(images.dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torchattacks' prints of mode changes and NumPy's deprecation warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
