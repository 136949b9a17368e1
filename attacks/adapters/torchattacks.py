"""How torchattacks is called.

torchattacks 3.5.1 is wrapped, not believed: it returns images only, which `attacks.measure` judges.
"""

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
    """A model as torchattacks wants it: with a parameter that tells the device, in the images' dtype.

    torchattacks reads the device from the first parameter, and some attacks compute in float32
    whatever they are given; ``dtype`` is the model's own.
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
    """torchattacks prints mode changes and triggers NumPy's deprecation warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
