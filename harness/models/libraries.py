"""Classifiers of libraries: torchvision's and timm's architectures, RobustBench's trained networks."""

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

# what RobustBench has networks for, by the number of classes
ROBUSTBENCH_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
ROBUSTBENCH_THREATS = ("Linf", "L2", "corruptions")


def torchvision_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """A freshly initialised model of ``torchvision.models.list_models()``.

    Raises:
        ValueError: unknown, or it cannot be made.
    """
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise ValueError(f"expected a model of torchvision.models.list_models(), got {name!r}; choose one of them")
    return _made(f"torchvision:{name}", lambda: get_model(name, weights=None, num_classes=classes))


def timm_model(name: str, shape: Shape, classes: int) -> nn.Module:
    """A freshly initialised model of ``timm.list_models()``.

    Raises:
        ValueError: no timm, unknown, or it cannot be made.
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

    RobustBench looks for them under ``models/`` and fetches them where they are not there.

    Args:
        name: ``NAME``, or ``THREAT/NAME`` of another threat model than ``Linf``.
        classes: says which data set's network is meant: 10 CIFAR-10, 100 CIFAR-100, 1000 ImageNet.

    Raises:
        ValueError: no RobustBench, no such network, or its weights cannot be had.
    """
    check_robustbench()
    try:
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from robustbench.utils import load_model
    except ImportError as error:
        raise ValueError(
            f"expected RobustBench with all that it needs, got {one_line(error)}; install that (pkg_resources is in "
            "setuptools before 82)"
        ) from error
    threat, _, own = name.rpartition("/")
    threat, data = threat or ROBUSTBENCH_THREATS[0], ROBUSTBENCH_DATA.get(classes)
    if data is None or threat not in ROBUSTBENCH_THREATS:
        raise ValueError(
            f"expected robustbench:NAME or {'/NAME, '.join(ROBUSTBENCH_THREATS)}/NAME for data of 10, 100 or 1000 "
            f"classes, got {name!r} for {classes}; choose one"
        )
    known = model_dicts[BenchmarkDataset(data)].get(ThreatModel(threat), {})
    if own not in known:
        raise ValueError(f"expected a network of RobustBench for {data}, {threat}, got {own!r}; see its model zoo")
    return _made(f"robustbench:{name}", lambda: load_model(own, dataset=data, threat_model=threat))


def check_robustbench() -> None:
    """Tell RobustBench from the folder of the same name that torchattacks brings along.

    Raises:
        ValueError: the package is not installed, or torchattacks' files lie over it.
    """
    try:
        files = metadata.distribution("robustbench").files or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            "expected the package robustbench, got none (torchattacks has a folder of that name, which is not it); "
            "install it"
        ) from None
    for file in files:
        if str(file) == "robustbench/utils.py" and file.hash is not None:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                raise ValueError(
                    "expected RobustBench's own files, got torchattacks' over them; reinstall robustbench after it"
                )


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model: nn.Module = make()
    except Exception as error:
        raise ValueError(f"expected {name} to be made, got {one_line(error)}; choose another model") from error
    return model
