"""Weights from files that others wrote, and normalisation as a part of the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.unwrapping import unwrapped

# where training scripts keep a state dict inside a larger file
KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
# what wrappers put before every name
PREFIXES = ("module.", "_orig_mod.", "model.")


class Normalized(nn.Module):
    """``model((pixels - mean) / std)``: what it takes, and so every distance, is in pixels.

    Args:
        mean, deviation: one number, or one a channel.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # not in the checkpoint, which stays that of the model
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` pixels -> logits."""
        logits: Tensor = self.model((pixels - self.mean.to(pixels)) / self.deviation.to(pixels))
        return logits


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a safetensors file or a torch file of tensors into the model, all of it; no code in it is run.

    Names may have the prefix of a wrapper (``module.``, ``_orig_mod.``, ``model.``), and the state dict may lie inside
    a larger one. A `Normalized` model's own model is filled, and the network that a wrapper holds.

    Raises:
        ValueError: no such file, or weights of another model.
    """
    network = unwrapped(model)
    inner = network.model if isinstance(network, Normalized) else network
    state = _state(path)
    wanted = inner.state_dict()
    for prefix in PREFIXES:
        if not set(state) & set(wanted) and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = sorted(n for n in set(wanted) & set(state) if wanted[n].shape != state[n].shape)
    if missing or unknown or other:
        got = [f"no {name}" for name in missing[:2]] + [f"also {name}" for name in unknown[:2]]
        got += [f"{name} of shape {tuple(state[name].shape)}" for name in other[:2]]
        raise ValueError(
            f"expected weights of this model in {path}, got {', '.join(got)}; give its own, or another --model"
        )
    inner.load_state_dict(state)


def _state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(str(path))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds, with advice that is none here
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        raise ValueError(f"expected weights as tensors in {path}, got {reason}; save a state dict") from None
    for key in KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"expected a state dict in {path}, got {type(found).__name__}; save model.state_dict()")
    return {str(name): value for name, value in found.items()}
