"""Weights from files that others wrote, and normalisation as a part of the model."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.isolation.unwrapping import unwrapped

# where training scripts keep a state dict inside a larger file, and where an average of the weights
KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
AVERAGED = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema")
# modules around a model or a part of it, whose names stand in those of its weights
WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "_fsdp_wrapped_module", "_forward_module"})
# of batch norm, used by none of its outputs
COUNT = "num_batches_tracked"
# what profilers hang on every layer
COUNTERS = frozenset({"total_ops", "total_params", COUNT})
ASKED = re.compile(r"GLOBAL ([\w.]+)")


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


def load_weights(path: Path, model: nn.Module) -> list[str]:
    """Load a safetensors file or a torch file of tensors into the model, all of it; no code in it is run.

    Names may have those of wrappers in them, in any order and at any depth (``module.``, ``_orig_mod.``, ``model.``).
    The state dict may lie inside a larger file. Of a file with plain and averaged (EMA) weights, the plain ones are
    loaded. Entries besides the model's, such as a criterion's, are left. Batch norm's count of batches may be missing.
    A `Normalized` model's own model is filled, and the network that a wrapper holds.

    Returns:
        What was chosen and what was left, a line each; no line where the file holds the model's weights alone.

    Raises:
        ValueError: no such file, or weights of another model.
    """
    network = unwrapped(model)
    inner = network.model if isinstance(network, Normalized) else network
    given, said = _state(path)
    wanted = inner.state_dict()
    names = _by_wanted(path, given, wanted)
    state = {name: given[own] for name, own in names.items()}
    left = [name for name in given if name not in names.values()]
    missing = [name for name in wanted if name not in state and name.rpartition(".")[2] != COUNT]
    layers = [name for name in left if _is_layer(name, wanted)]
    other = [name for name, value in state.items() if wanted[name].shape != value.shape]
    if missing or layers or other:
        got = [f"no {name}" for name in sorted(missing)[:2]] + [f"also {name}" for name in sorted(layers)[:2]]
        got += [f"{name} of shape {tuple(state[name].shape)}" for name in sorted(other)[:2]]
        raise ValueError(
            f"expected weights of this model in {path}, got {', '.join(got)}; give its own, or another --model"
        )
    # a model that goes from file to file keeps no count of an earlier one
    inner.load_state_dict(
        {name: torch.zeros_like(value) for name, value in wanted.items() if name not in state} | state
    )
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        said.append(f"weights: left {shown}, which the model does not have")
    return said


def _by_wanted(path: Path, given: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The file's name of each wanted one that it has: the same, else the same without the wrappers' names in it.

    Raises:
        ValueError: two names of the file fit one of the model.
    """
    exact = {name: name for name in given if name in set(wanted)}
    bare = {_bare(name): name for name in wanted}
    # with names of wrappers of its own, or all of its names in the file, the model's are taken as they are
    if len(bare) < len(set(wanted)) or all(name in exact for name in wanted if name.rpartition(".")[2] != COUNT):
        return exact
    found: dict[str, str] = {}
    for name in given:
        own = bare.get(_bare(name))
        if own in found:
            raise ValueError(
                f"expected weights of one model in {path}, got {found[own]} and {name}; save one of them alone"
            )
        if own is not None:
            found[own] = name
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_layer(name: str, wanted: Iterable[str]) -> bool:
    """Whether an entry that the model does not have looks like a layer of a deeper one, which would be cut short."""
    first, last = _bare(name).partition(".")[0], name.rpartition(".")[2]
    own = {_bare(one).partition(".")[0] for one in wanted}
    return last not in COUNTERS and (first in own or first.isdigit())


def _state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and which of several state dicts in it they are."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights at {path}, got none; give the path of one")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(str(path))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds, with advice that is none here
        raise ValueError(f"expected weights as tensors in {path}, got {_said(error)}; save a state dict") from None
    said = []
    for key in KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            averages = [name for name in AVERAGED if isinstance(found.get(name), Mapping)]
            said += [f"weights: {key} is read, {name} is not" for name in averages]
            found = found[key]
    for key in AVERAGED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            said += [f"weights: {key} is read, an average: the file has no others"]
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"expected a state dict in {path}, got {type(found).__name__}; save model.state_dict()")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}, said


def _said(error: Exception) -> str:
    """What is wrong with a file; a library's own words are many lines, coloured and of options that are none here."""
    asked = ASKED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if asked:
        return f"a pickle that asks for {asked[1]}, which is not run"
    reason = error.strerror if isinstance(error, OSError) else None
    return f"a damaged file or one of another kind ({reason or type(error).__name__})"
