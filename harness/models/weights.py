"""Load weights from files of other projects, and put normalisation into the model."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.isolation.unwrapping import unwrapped

# keys under which training scripts store a state dict, and an average of the weights
KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
AVERAGED = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema")
# names that wrapper modules put in front of, or into, the names of weights
WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "_fsdp_wrapped_module", "_forward_module"})
# batch norm's count of batches, which no output depends on
COUNT = "num_batches_tracked"
# buffers that profilers add to every layer
COUNTERS = frozenset({"total_ops", "total_params", COUNT})
# the function or class that torch's unpickler refused, in its message
ASKED = re.compile(r"GLOBAL ([\w.]+)")


class Normalized(nn.Module):
    """``model((pixels - mean) / deviation)``: inputs, and therefore all distances, are in pixels.

    Args:
        model: maps normalised pixels to logits.
        mean: one number, or one per channel.
        deviation: standard deviation; one number, or one per channel.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # not persistent: a checkpoint holds the model's weights alone
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` pixels -> logits."""
        logits: Tensor = self.model((pixels - self.mean.to(pixels)) / self.deviation.to(pixels))
        return logits


def load_weights(path: Path, model: nn.Module) -> list[str]:
    """Load all weights of the model from a safetensors file or a torch file of tensors; no code in the file is run.

    - Names may contain those of wrappers, in any order and at any depth (``module.``, ``_orig_mod.``, ``model.``).
    - The state dict may be part of a larger file.
    - If the file has plain and averaged (EMA) weights, the plain ones are loaded.
    - Other entries, such as a criterion's, are ignored. Batch norm's count of batches may be missing.
    - The weights go into the network inside of wrappers and of `Normalized`.

    Returns:
        One line per choice and for the ignored entries; no line if the file holds the model's weights alone.

    Raises:
        ValueError: the file is missing or damaged, or holds weights of another model.
    """
    network = unwrapped(model)
    inner = network.model if isinstance(network, Normalized) else network
    stored, lines = _state(path)
    wanted = inner.state_dict()
    names = _by_wanted(path, stored, wanted)
    state = {name: stored[in_file] for name, in_file in names.items()}
    left = [name for name in stored if name not in names.values()]
    missing = [name for name in wanted if name not in state and name.rpartition(".")[2] != COUNT]
    layers = [name for name in left if _is_layer(name, wanted)]
    other = [name for name, value in state.items() if wanted[name].shape != value.shape]
    if missing or layers or other:
        got = [f"no {name}" for name in sorted(missing)[:2]] + [f"also {name}" for name in sorted(layers)[:2]]
        got += [f"{name} of shape {tuple(state[name].shape)}" for name in sorted(other)[:2]]
        raise ValueError(
            f"expected weights of this model in {path}, got {', '.join(got)}; give its own, or another --model"
        )
    # a model that is filled from several files in turn must not keep an earlier file's count
    inner.load_state_dict(
        {name: torch.zeros_like(value) for name, value in wanted.items() if name not in state} | state
    )
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        lines.append(f"weights: left {shown}, which the model does not have")
    return lines


def _by_wanted(path: Path, stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Map the model's names to the file's names: the same name, else the same name apart from wrappers' names.

    Raises:
        ValueError: two names of the file fit one name of the model.
    """
    exact = {name: name for name in stored if name in set(wanted)}
    bare = {_bare(name): name for name in wanted}
    # if the model's own names contain wrappers' names, or the file has all of its names, names must be equal
    if len(bare) < len(set(wanted)) or all(name in exact for name in wanted if name.rpartition(".")[2] != COUNT):
        return exact
    names: dict[str, str] = {}
    for name in stored:
        of_model = bare.get(_bare(name))
        if of_model in names:
            raise ValueError(
                f"expected weights of one model in {path}, got {names[of_model]} and {name}; save one of them alone"
            )
        if of_model is not None:
            names[of_model] = name
    return names


def _bare(name: str) -> str:
    """The name without wrappers' names."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_layer(name: str, wanted: Iterable[str]) -> bool:
    """Whether an entry that the model does not have looks like a layer of a deeper model, which is not truncated."""
    first, last = _bare(name).partition(".")[0], name.rpartition(".")[2]
    parts = {_bare(known).partition(".")[0] for known in wanted}
    return last not in COUNTERS and (first in parts or first.isdigit())


def _state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and lines that say which of several state dicts in it was read."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights at {path}, got none; give the path of one")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(str(path))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types, with advice that does not apply
        raise ValueError(f"expected weights as tensors in {path}, got {_reason(error)}; save a state dict") from None
    lines = []
    for key in KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            averages = [name for name in AVERAGED if isinstance(content.get(name), Mapping)]
            lines += [f"weights: {key} is read, {name} is not" for name in averages]
            content = content[key]
    for key in AVERAGED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            lines += [f"weights: {key} is read, an average: the file has no others"]
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"expected a state dict in {path}, got {type(content).__name__}; save model.state_dict()")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, lines


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words; a library's message has many lines and options that do not apply."""
    asked = ASKED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if asked:
        return f"a pickle that asks for {asked[1]}, which is not run"
    reason = error.strerror if isinstance(error, OSError) else None
    return f"a damaged file or one of another kind ({reason or type(error).__name__})"
