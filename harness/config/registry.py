"""Tables of the names that options accept: data sets, models, engines and loggers.

This module does not import torch: a definition is named as ``module:attribute`` and imported when it is used.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One line of a table.

    Attributes:
        target: ``module:attribute`` of the definition.
        place: what follows the name and a colon, as FILE in ``npz:FILE``; empty where nothing does.
        about: a note for ``--help``.
    """

    target: str
    place: str = ""
    about: str = ""


# --dataset NAME: (root, download) -> harness.data.dataset.Dataset
DATASETS: dict[str, Entry] = {
    "digits": Entry("harness.data.builtin:digits"),
    "mnist": Entry("harness.data.builtin:mnist"),
    "fashion-mnist": Entry("harness.data.builtin:fashion_mnist"),
    "cifar10": Entry("harness.data.builtin:cifar10"),
}
# --dataset NAME:PLACE: (place, root, download) -> harness.data.sources.Arrays
SOURCES: dict[str, Entry] = {
    "npz": Entry("harness.data.sources:read_npz", "FILE"),
    "folder": Entry("harness.data.sources:read_folder", "DIR", "train/ and test/"),
    "torchvision": Entry("harness.data.sources:read_torchvision", "NAME"),
}
# --model NAME: (shape, classes) -> torch.nn.Module
MODELS: dict[str, Entry] = {
    "dense": Entry("harness.models.build:dense"),
    "cnn": Entry("harness.models.build:cnn"),
    "resnet18": Entry("harness.models.build:resnet18"),
}
# --model NAME:PLACE: (place, shape, classes) -> torch.nn.Module
LIBRARIES: dict[str, Entry] = {
    "torchvision": Entry("harness.models.libraries:torchvision_model", "NAME"),
    "timm": Entry("harness.models.libraries:timm_model", "NAME"),
    "robustbench": Entry("harness.models.libraries:robustbench_model", "NAME", "trained"),
}
# --engine NAME: (harness.engines.EngineOptions) -> harness.tasks.Engine
ENGINES: dict[str, Entry] = {
    "local": Entry("harness.engines:local_engine"),
    "ray": Entry("harness.engines:ray_engine"),
}
# --log NAME:PLACE: (place) -> harness.loggers.Logger
LOGGERS: dict[str, Entry] = {
    "tensorboard": Entry("harness.loggers:TensorBoard", "DIR"),
    "wandb": Entry("harness.loggers:WandB", "PROJECT"),
    "mlflow": Entry("harness.loggers:MLflow", "URI"),
}


def definition(entry: Entry) -> Any:
    """Import the definition of an entry."""
    return pkgutil.resolve_name(entry.target)


def forms(*tables: Mapping[str, Entry]) -> list[str]:
    """How each name is typed, as ``npz:FILE``."""
    return [":".join(filter(None, (name, entry.place))) for table in tables for name, entry in table.items()]


def described(*tables: Mapping[str, Entry]) -> list[str]:
    """`forms`, each with its note in brackets."""
    notes = [f" ({entry.about})" if entry.about else "" for table in tables for entry in table.values()]
    return [form + note for form, note in zip(forms(*tables), notes, strict=True)]


def either(words: Iterable[str]) -> str:
    """The words as a list in a sentence: ``a, b or c``."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
