"""Build classifiers: three architectures, those of libraries, and those of a user's factory.

All models map ``(B, C, H, W)`` float32 pixels in ``[0, 1]`` to ``(B, classes)`` logits.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.isolation.outputs import as_logits
from attacks.types import one_line
from harness.config.registry import LIBRARIES, MODELS, definition, forms
from harness.models.libraries import Shape
from harness.models.weights import Normalized, load_weights

Statistics = tuple[Sequence[float], Sequence[float]]

_CPU = torch.device("cpu")


def build(
    name: str,
    shape: Shape,
    classes: int,
    seed: int,
    *,
    normalize: Statistics | None = None,
    weights: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
    binary: bool = False,
) -> nn.Module:
    """Build a freshly initialised classifier; the same ``seed`` gives the same weights.

    Args:
        name: ``dense``, ``cnn``, ``resnet18``, ``torchvision:NAME``, ``timm:NAME``, ``robustbench:NAME`` (trained), or
            ``pkg.module:factory``. A factory is called with ``shape`` and ``classes`` as keyword arguments, as far as
            it has them, and is found from the working directory.
        shape: ``(C, H, W)`` of the images.
        classes: number of logits.
        seed: seed of the initialisation; torch's global generator is not advanced.
        normalize: mean and standard deviation of pixels, one for all channels or one per channel; the model gets
            normalised pixels (see `Normalized`), distances stay in pixels.
        weights: file whose weights are loaded into the model (see `load_weights`).
        say: called with each line that `load_weights` returns.
        binary: the model has one logit per image, for data with two classes; a factory gets ``classes=1``.

    Raises:
        ValueError: the name is unknown, a factory cannot be imported or called, the weights are of another model, or
            the model does not map images of ``shape`` to ``classes`` finite logits.
    """
    if name not in MODELS and ":" not in name:
        known = ", ".join(forms(MODELS, LIBRARIES))
        raise ValueError(f"expected a model of {known} or pkg.module:factory, got {name!r}; choose one")
    if binary and classes != 2:
        raise ValueError(f"expected data of 2 classes with --binary, got {classes}; leave --binary out")
    with seeded(seed):
        model = _maker(name)(shape, 1 if binary else classes)
        if weights is not None:
            for line in load_weights(weights, model):
                say(line)
        if normalize is not None:
            model = Normalized(model, *normalize)
        _check_logits(model, shape, classes, binary)
    return model


def _maker(name: str) -> Callable[[Shape, int], nn.Module]:
    library, _, model = name.partition(":")
    if library in LIBRARIES:
        return partial(definition(LIBRARIES[library]), model)
    return definition(MODELS[name]) if name in MODELS else partial(_from_factory, name)


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed the global generators of the CPU and ``device``; their states are restored at the end."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # torch.manual_seed would also reseed the devices that are not forked
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch ``model`` to eval mode, then restore the training flag of each module."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def dense(shape: Shape, classes: int) -> nn.Module:
    """Fully connected: 784-256-256-10 for 28x28 pixels, 64-64-64-10 for digits."""
    channels, height, width = shape
    pixels = channels * height * width
    hidden = 64 if pixels <= 64 else 256
    return _initialised(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """The small strided CNN of Wong & Kolter, 2018, https://arxiv.org/abs/1711.00851 (3x3 up to 8 pixels)."""
    channels, height, width = shape
    kernel = 3 if min(height, width) <= 8 else 4
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 16, kernel, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    features = convolutions(torch.zeros(1, *shape)).shape[1]
    return _initialised(nn.Sequential(*convolutions, nn.Linear(features, 100), nn.ReLU(), nn.Linear(100, classes)))


def _initialised(model: nn.Sequential) -> nn.Sequential:
    """Initialise as He et al., 2015, https://arxiv.org/abs/1502.01852: uniform weights, zero biases.

    With torch's default biases an untrained small network predicts one class nearly everywhere, and most images have
    no boundary to measure at epoch 0.
    """
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """ResNet-18 in its CIFAR form, He et al., 2016: a 3x3 stem that keeps the resolution, no max-pooling."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
    stem = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


def _from_factory(name: str, shape: Shape, classes: int) -> nn.Module:
    """Import and call a user's factory; any error becomes a ValueError with a one-line message."""
    module, _, attribute = name.partition(":")
    with _working_directory_importable():
        try:
            factory = operator.attrgetter(attribute)(importlib.import_module(module))
        except Exception as error:
            raise ValueError(
                f"expected an importable factory {name!r}, got {one_line(error)}; "
                "give it as pkg.module:factory, found from the working directory"
            ) from error
        if not callable(factory):
            kind = type(factory).__name__
            raise ValueError(f"expected {name!r} to be callable, got {kind}; name a function or a class")
        arguments = _arguments(name, factory, {"shape": shape, "classes": classes})
        try:
            model = factory(**arguments)
        except Exception as error:
            raise ValueError(f"expected {name!r} to return a model, got {one_line(error)}; fix it") from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"expected {name!r} to return a torch.nn.Module, got {kind}; return the model")
    return model


def _arguments(name: str, factory: Callable[..., object], offered: dict[str, object]) -> dict[str, object]:
    """Those of the ``offered`` arguments that ``factory`` has; it must not require others."""
    accepted: dict[str, object] = {}
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a builtin without a signature
        return accepted
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in offered and parameter.kind is not parameter.POSITIONAL_ONLY:
            accepted[parameter.name] = offered[parameter.name]
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"expected {name!r} to require no arguments but shape and classes, got {parameter.name!r}; "
                "give it a default"
            )
    return accepted


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    # as under `python -m`; for an installed command its own folder comes first instead
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _check_logits(model: nn.Module, shape: Shape, classes: int, binary: bool) -> None:
    """Check that ``model`` has trainable weights and maps two images to ``(2, classes)`` finite logits.

    Raises:
        ValueError: it does not.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("expected a model with weights to train, got none; leave at least one trainable")
    try:
        with eval_mode(model), torch.no_grad():
            logits = as_logits(model(torch.rand(2, *shape)), binary)
    except Exception as error:
        raise ValueError(
            f"expected a model of images of shape {(2, *shape)}, got {one_line(error)}; fit it to the data"
        ) from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"expected logits as one tensor, got {type(logits).__name__}; return the tensor alone")
    if classes == 2 and logits.shape in ((2,), (2, 1)):
        raise ValueError(
            f"expected logits of shape (2, 2), got one per image, {tuple(logits.shape)}; give --binary to read it as a "
            "binary classifier's"
        )
    if logits.shape != (2, classes):
        raise ValueError(
            f"expected logits of shape {(2, classes)}, got {tuple(logits.shape)}; "
            "return one logit per image and class of the data set"
        )
    if not logits.is_floating_point() or not logits.isfinite().all():
        got = f"{logits.dtype} with {int((~logits.isfinite()).sum())} that are NaN or infinite"
        raise ValueError(f"expected finite floating logits, got {got}; check the initialisation")
