"""Models from libraries: architectures of torchvision and timm, trained networks of RobustBench."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

from torch import nn

from attacks.types import one_line

Shape = tuple[int, int, int]

# RobustBench's data sets by number of classes
ROBUSTBENCH_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
ROBUSTBENCH_THREATS = ("Linf", "L2", "corruptions")


def torchvision_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """A freshly initialised model of ``torchvision.models.list_models()``.

    Raises:
        ValueError: the name is unknown, or the model cannot be made.
    """
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise ValueError(f"expected a model of torchvision.models.list_models(), got {name!r}; choose one of them")
    return _made(f"torchvision:{name}", lambda: get_model(name, weights=None, num_classes=classes))


def timm_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """A freshly initialised model of ``timm.list_models()``.

    Raises:
        ValueError: timm is not installed, the name is unknown, or the model cannot be made.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("expected the package timm, got none; install margin-harness[timm]") from None
    if not timm.is_model(name):
        raise ValueError(f"expected a model of timm.list_models(), got {name!r}; choose one of them")
    make = partial(timm.create_model, name, pretrained=False, num_classes=classes, in_chans=shape[0])
    return _made(f"timm:{name}", make)


def robustbench_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """A trained network of RobustBench (Croce et al. 2021, https://arxiv.org/abs/2010.09670), with its weights.

    RobustBench looks for the weights under ``models/`` and downloads them if they are missing.

    Args:
        name: ``NAME`` for the threat model ``Linf``, or ``THREAT/NAME`` for another one.
        shape: not used; RobustBench's networks have a fixed input.
        classes: selects the data set: 10 CIFAR-10, 100 CIFAR-100, 1000 ImageNet.

    Raises:
        ValueError: RobustBench is not installed, has no such network, or the weights cannot be loaded.
    """
    check_robustbench()
    try:
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from robustbench.utils import load_model
    except ImportError as error:
        raise ValueError(
            f"expected RobustBench with its dependencies, got {one_line(error)}; install the missing one "
            "(pkg_resources is in setuptools before 82)"
        ) from error
    threat, _, network = name.rpartition("/")
    threat, data = threat or ROBUSTBENCH_THREATS[0], ROBUSTBENCH_DATA.get(classes)
    if data is None or threat not in ROBUSTBENCH_THREATS:
        raise ValueError(
            f"expected robustbench:NAME or {'/NAME, '.join(ROBUSTBENCH_THREATS)}/NAME for data of 10, 100 or 1000 "
            f"classes, got {name!r} for {classes}; choose one"
        )
    known = model_dicts[BenchmarkDataset(data)].get(ThreatModel(threat), {})
    if network not in known:
        raise ValueError(f"expected a network of RobustBench for {data}, {threat}, got {network!r}; see its model zoo")
    return _made(f"robustbench:{name}", lambda: load_model(network, dataset=data, threat_model=threat))


def check_robustbench() -> None:
    """Check that RobustBench is installed, and not just the folder of the same name that torchattacks installs.

    Raises:
        ValueError: the package is not installed, or torchattacks has overwritten its files.
    """
    try:
        files = metadata.distribution("robustbench").files or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            "expected the package robustbench, got none (torchattacks installs a folder of that name, which "
            "is not it); install it"
        ) from None
    for file in files:
        if str(file) == "robustbench/utils.py" and file.hash is not None:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                raise ValueError(
                    "expected RobustBench's own files, got torchattacks' in their place; reinstall robustbench after it"
                )


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model: nn.Module = make()
    except Exception as error:
        raise ValueError(f"expected {name} to be made, got {one_line(error)}; choose another model") from error
    return model
