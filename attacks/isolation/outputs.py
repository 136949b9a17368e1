"""Read a model's output as one row of logits per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attacks.types import InputError


def as_logits(output: Any, binary: bool = False) -> Any:
    """The logits in a model's output.

    Args:
        output: a tensor; an object with an attribute or a mapping with a key ``logits``; a tuple of which the logits
            are the first item.
        binary: the model returns one logit z per image, ``(B,)`` or ``(B, 1)``, which becomes the row ``(0, z)``.

    Returns:
        ``(B, K)``; any other output unchanged, for `check_rows` to refuse.
    """
    logits = output if isinstance(output, Tensor) else _logits_inside(output)
    if not binary or not isinstance(logits, Tensor):
        return logits
    # no branch on the shape, which `torch.fx` could not trace
    logit = logits.reshape(-1, 1)
    return torch.cat([torch.zeros_like(logit), logit], 1)


def _logits_inside(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    return output[0] if isinstance(output, tuple) and output else output


class Logits(nn.Module):
    """``model`` with its output read as logits, see `as_logits`; `torch.fx` can trace it."""

    def __init__(self, model: nn.Module, *, binary: bool = False) -> None:
        super().__init__()
        self.model, self.binary = model, binary

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, K)``."""
        logits: Tensor = as_logits(self.model(pixels), self.binary)
        return logits


def check_rows(logits: object, count: int, device: torch.device, binary: bool = False) -> None:
    """Refuse anything but one row of at least two logits for each of ``count`` images.

    Raises:
        InputError: states the type or shape of the output.
    """
    if not isinstance(logits, Tensor):
        got = type(logits).__name__
    elif logits.ndim == 2 and logits.shape[0] == count and logits.shape[1] >= 2 and logits.device == device:
        return
    elif binary:
        raise InputError(
            f"expected one logit per image with binary, got {len(logits)} for {count} images on {logits.device}; "
            "leave binary out where there is one per class"
        )
    elif logits.is_floating_point() and logits.shape in ((count,), (count, 1)) and logits.device == device:
        raise InputError(
            f"expected at least 2 classes, got one logit per image, {tuple(logits.shape)}; read it as a binary "
            "classifier's with binary=True (--binary)"
        )
    else:
        got = f"{tuple(logits.shape)} on {logits.device}"
    raise InputError(
        f"expected a model output of shape ({count}, classes) with at least 2 classes on {device}, "
        f"got {got}; return one row of logits per image"
    )
