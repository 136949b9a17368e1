"""The configuration of a run: one frozen dataclass for the command line, files, the manifest and the fingerprint.

This module does not import torch, so ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.registry import CERTIFIERS, check_certifier, check_name
from attacks.types import DOMAINS, NOISE_RETRIES, NORMS, EstimatorError
from harness.config.options import ConfigError, check_option, option, read_options
from harness.config.registry import (
    DATASETS,
    ENGINES,
    LIBRARIES,
    LOGGERS,
    MODELS,
    SOURCES,
    described,
    either,
    forms,
)

TRAININGS = ("standard", "pgd", "trades", "gaussian")
# trainings that attack the images
ADVERSARIAL = ("pgd", "trades")
LOSSES = ("cross-entropy", "label-smoothing", "hinge", "squared-error")
AUGMENTATIONS = ("none", "shift", "flip")
OPTIMIZERS = ("adam", "adamw", "sgd")

# L-infinity radii of adversarial training in the literature. mnist, cifar10: Madry et al. 2018,
# https://arxiv.org/abs/1706.06083, section 5; fashion-mnist: Wong & Kolter 2018,
# https://arxiv.org/abs/1711.00851, table 1. For digits there is no literature; 0.1 is our choice.
PGD_EPSILON = {"mnist": 0.3, "fashion-mnist": 0.1, "cifar10": 8 / 255, "digits": 0.1}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All options of a run; an option is ``None`` where the data set decides (see `resolve`)."""

    dataset: str = option("digits", either(described(DATASETS, SOURCES)))
    data_root: str = option("data", "folder of the data, in torchvision's layout", fixed=False)
    download: bool = option(False, "download the data set if it is missing", fixed=False)
    train_images: int | None = option(None, "use only N training images, drawn by --probe-seed", least=2, unset="all")
    test_images: int | None = option(None, "use only N test images, drawn by --probe-seed", least=1, unset="all")
    model: str = option(
        "cnn",
        f"{', '.join(described(MODELS, LIBRARIES))} or pkg.module:factory (which runs that code)",
    )
    normalize: str = option(
        "", "MEAN:STD of pixels in [0, 1], each one number or one per channel (0.49,0.48,0.45:0.2,0.2,0.2)", later=True
    )
    checkpoints: str = option(
        "",
        "track these files ('ckpt/*.pt') instead of training; the epoch is the number after 'epoch' or 'ep' in a name, "
        "else the only number that varies",
        fixed=False,
    )
    weights: str = option("", "safetensors file or state dict to start from", later=True)
    training: str = option("standard", "standard, PGD-adversarial, TRADES or Gaussian noise", choices=TRAININGS)
    pgd_epsilon: float | None = option(
        None,
        "radius (L-infinity) of adversarial training",
        above=0,
        unset="mnist 0.3, digits and fashion-mnist 0.1, else 8/255",
    )
    pgd_steps: int = option(10, "PGD steps of adversarial training", least=1)
    pgd_step_size: float | None = option(None, "PGD step size", above=0, unset="2.5 * epsilon / steps")
    pgd_norm: str = option("linf", "norm of the ball of adversarial training", choices=("linf", "l2"), later=True)
    trades_beta: float = option(6.0, "weight of the divergence of trades training", least=0, later=True)
    noise_sigma: float = option(0.25, "standard deviation of the noise of gaussian training", above=0, later=True)
    loss: str = option("cross-entropy", "training loss", choices=LOSSES)
    augment: str = option(
        "none",
        "shift training images by up to an eighth of a side (shift), also mirror them (flip)",
        choices=AUGMENTATIONS,
        later=True,
    )
    optimizer: str = option("adam", "optimiser", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, "learning rate", above=0)
    weight_decay: float = option(0.0, "weight decay", least=0)
    batch_size: int | None = option(None, "training batch", least=1, unset="32 on digits, else 128")
    epochs: int | None = option(None, "train for N epochs", least=0, fixed=False, unset="20 on digits, else 40")
    estimator: tuple[str, ...] = option(
        ("deepfool",), "NAME[:key=value,...], repeatable; see --list-estimators", fixed=False, many=True
    )
    norm: tuple[str, ...] = option(NORMS, "l2 or linf, repeatable", choices=NORMS, fixed=False, many=True)
    domain: str = option("box", "where witnesses may lie: the pixel bounds, or anywhere", choices=DOMAINS)
    noise_retries: int = option(NOISE_RETRIES, "noisy restarts for images that an attack fails on", least=0)
    probe: int = option(1000, "tracked images of each of the training and test set", least=1)
    probe_seed: int = option(0, "seed of the choice of tracked images", least=0)
    every: int = option(1, "measure every N epochs (0, 1 and the last always)", least=1, fixed=False)
    warm_start: bool = option(
        False,
        "start estimators from the witnesses of the epoch before, where they can; also measure their cold forms",
        later=True,
    )
    cold_every: int = option(
        5, "with --warm-start, measure the cold forms every N epochs (0, 1 and the last always)", least=1, fixed=False
    )
    keep_checkpoints: int = option(
        1,
        "keep the checkpoints of every N epochs, or of none with N = 0 (epochs 0, 1 and the last two always)",
        least=0,
        fixed=False,
    )
    certify: tuple[str, ...] = option(
        (),
        f"certifier of lower bounds: {either(CERTIFIERS)}, NAME[:key=value,...], repeatable",
        fixed=False,
        many=True,
    )
    certify_every: int = option(5, "certify every N epochs (0 and the last always)", least=1, fixed=False)
    certify_probe: int = option(100, "images of each split that are certified", least=1, later=True)
    expect_over: int = option(
        1, "for a model that draws at random in evaluation: average the softmax over N draws", least=1, later=True
    )
    binary: bool = option(False, "the model returns one logit z per image, which is read as (0, z)", later=True)
    seed: int = option(0, "seed of initialisation, batches and attacks", least=0)
    deterministic: bool = option(False, "deterministic CUDA kernels (slower)")
    log: tuple[str, ...] = option(
        (), f"send averages to {either(described(LOGGERS))}, repeatable", fixed=False, many=True
    )
    engine: str = option("local", "where attacks run: on this machine, or on Ray", choices=tuple(ENGINES), fixed=False)
    workers: int = option(
        0,
        "processes that attack in parallel; 0 for this process, on Ray for as many as fit",
        least=0,
        fixed=False,
    )
    gpus_per_worker: float = option(0.0, "GPUs of each Ray task, such as 0.25; 0 for the CPU", least=0, fixed=False)
    unit_timeout: float | None = option(
        None,
        "seconds that an estimator may take in a norm at an epoch, from its first image on, in a worker (certifiers "
        "have no limit); then it is stopped, and --resume tries it again",
        above=0,
        fixed=False,
        unset="no limit",
    )
    device: str = option("auto", "auto, cpu or cuda[:i]", fixed=False)
    threads: int | None = option(
        None, "torch threads", least=1, fixed=False, unset="1 on digits, too small to share, else torch's choice"
    )
    measure_batch: int | None = option(
        None, "images per pass at most", least=1, unset="500 on digits, else 128, on CUDA all of a split"
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_option(f, getattr(self, f.name))
        kind, _, place = self.dataset.partition(":")
        if self.dataset not in DATASETS and not (kind in SOURCES and place):
            near = difflib.get_close_matches(self.dataset, DATASETS, 1)
            hint = f"did you mean {near[0]}?" if near else "choose one"
            raise ConfigError(
                f"expected --dataset to be one of {', '.join(DATASETS)} or {', '.join(forms(SOURCES))}, got "
                f"{self.dataset!r}; {hint}"
            )
        if self.model not in MODELS and ":" not in self.model:
            raise ConfigError(
                f"expected --model {', '.join(forms(MODELS, LIBRARIES))} or pkg.module:factory, got {self.model!r}; "
                "choose one"
            )
        parse_normalize(self.normalize)
        check_provable(self.expect_over, self.certify)
        for check, texts in ((check_name, self.estimator), (check_certifier, self.certify)):
            try:
                for text in texts:
                    check(text)
            except EstimatorError as error:
                raise ConfigError(str(error)) from None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The options that identify the run; a resumed run may add estimators, norms and epochs."""
        values = {f: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["fixed"]}
        return {f.name: _plain(v) for f, v in values.items() if not (f.metadata["later"] and v == f.default)}


def check_provable(expect_over: int, certifiers: Collection[object]) -> None:
    """Refuse certifiers together with an average over random draws.

    Raises:
        ConfigError: both are given.
    """
    if expect_over != 1 and certifiers:
        raise ConfigError(
            f"expected no certifiers with --expect-over {expect_over}, got {len(certifiers)}: bounds are proved for "
            "one fixed network; leave one of the two out"
        )


def parse_normalize(text: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Parse ``MEAN:STD`` into means and standard deviations, one number each or one per channel; None if empty.

    Raises:
        ConfigError: not two lists of equal length, or a deviation that is not above 0.
    """
    if not text:
        return None
    try:
        mean, deviation = (tuple(float(number) for number in part.split(",")) for part in text.split(":"))
        valid = len(mean) == len(deviation) and all(map(math.isfinite, (*mean, *deviation))) and min(deviation) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"expected --normalize as MEAN:STD, numbers by commas and deviations above 0, got {text!r}; write it so"
        )
    return mean, deviation


def digest(fingerprint: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint's canonical JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def as_dict(config: RunConfig) -> dict[str, Any]:
    """All options as plain JSON values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Inverse of `as_dict`.

    Raises:
        ConfigError: unknown names or bad values.
    """
    names = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ConfigError(f"expected options of {', '.join(sorted(names))}, got {', '.join(unknown)}; remove them")
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for f in dataclasses.fields(RunConfig):
        # a file may hold 1 for 1.0; both are the same run
        value = options.get(f.name)
        if "float" in str(f.type) and type(value) is int and abs(value) < 2**63:
            options[f.name] = float(value)
    return RunConfig(**options)


def resolve(config: RunConfig) -> RunConfig:
    """Replace options that are ``None`` by the data set's defaults.

    Raises:
        ConfigError: adversarial training in L2 without a radius, which has no default.
    """
    small = config.dataset == "digits"
    if config.training in ADVERSARIAL and config.pgd_norm == "l2" and config.pgd_epsilon is None:
        raise ConfigError("expected --pgd-epsilon with --pgd-norm l2, got none; give the radius, such as 0.5")
    epsilon = PGD_EPSILON.get(config.dataset, 8 / 255) if config.pgd_epsilon is None else config.pgd_epsilon
    defaults: dict[str, Any] = {
        "pgd_epsilon": epsilon,
        "pgd_step_size": 2.5 * epsilon / config.pgd_steps,
        "batch_size": 32 if small else 128,
        # otherwise the device decides, see harness.config.devices.sized
        "measure_batch": 500 if small else None,
        "epochs": 20 if small else 40,
        "threads": 1 if small else None,
    }
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return RunConfig(**vars(config) | unset)


def from_namespace(given: argparse.Namespace, before: dict[str, Any] | None = None) -> RunConfig:
    """The resolved configuration of a command line.

    Later sources win: defaults, the resumed run, ``--config``'s file, the command line.

    Args:
        given: parsed command line.
        before: options of the resumed run (`as_dict`); ``epochs`` is at least as large as there.

    Raises:
        ConfigError: an option cannot be used; the message is one line.
    """
    names = {f.name for f in dataclasses.fields(RunConfig)}
    values = read_options(Path(given.config)) if given.config else {}
    values |= {name: value for name, value in vars(given).items() if name in names}
    if before:
        kept = {name: value for name, value in before.items() if name in names}
        asked, values = values, kept | values
        if isinstance(asked.get("epochs"), int) and isinstance(kept.get("epochs"), int):
            values["epochs"] = max(asked["epochs"], kept["epochs"]) if asked["epochs"] >= 0 else asked["epochs"]
    return resolve(from_dict(values))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
