"""One frozen definition of a run: command line, file, manifest and fingerprint all come from it.

No torch: ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from attacks.estimator import DOMAINS, NORMS, EstimatorError
from attacks.registry import check_certifier, check_name

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")
# data of the user's own: a prefix and a place
SOURCES = ("npz", "folder", "torchvision")
TRAININGS = ("standard", "pgd", "trades", "gaussian")
# of them those that attack the images
ADVERSARIAL = ("pgd", "trades")
LOSSES = ("cross-entropy", "label-smoothing", "hinge", "squared-error")
AUGMENTATIONS = ("none", "shift", "flip")
OPTIMIZERS = ("adam", "adamw", "sgd")
BUILT_IN_MODELS = ("dense", "cnn", "resnet18")

# L-infinity radii that the literature trains with. mnist, cifar10: Madry et al. 2018,
# https://arxiv.org/abs/1706.06083, section 5; fashion-mnist: Wong & Kolter 2018,
# https://arxiv.org/abs/1711.00851, table 1; digits has no literature, 0.1 is ours
PGD_EPSILON = {"mnist": 0.3, "fashion-mnist": 0.1, "cifar10": 8 / 255, "digits": 0.1}


class ConfigError(ValueError):
    """An option that cannot be used; the message is one line that says what to do."""


def option(
    default: Any,
    about: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    fixed: bool = True,
    unset: str = "",
    many: bool = False,
    later: bool = False,
) -> Any:
    """A field of `RunConfig` that is also an option of the command line.

    Args:
        fixed: part of the fingerprint: another value is another run.
        unset: what ``None`` means, for ``--help``.
        many: repeatable; the value is a tuple.
        later: left out of the fingerprint while it is at its default, as runs without it are the same runs.
    """
    metadata = {"about": about, "choices": choices, "least": least, "above": above, "fixed": fixed, "unset": unset}
    return field(default=default, metadata=metadata | {"many": many, "later": later})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run; ``None`` where the data set decides (see `resolve`)."""

    dataset: str = option(
        "digits", "digits, mnist, fashion-mnist, cifar10, npz:FILE, folder:DIR (train/ and test/) or torchvision:NAME"
    )
    data_root: str = option("data", "folder of the data, in torchvision's layout", fixed=False)
    download: bool = option(False, "fetch the data set where it is missing", fixed=False)
    train_images: int | None = option(None, "use only N training images, drawn by --probe-seed", least=2, unset="all")
    test_images: int | None = option(None, "use only N test images, drawn by --probe-seed", least=1, unset="all")
    model: str = option(
        "cnn", "dense, cnn, resnet18, torchvision:NAME, timm:NAME or pkg.module:factory (which runs that code)"
    )
    normalize: str = option(
        "", "MEAN:STD of pixels in [0, 1], each one number or one a channel (0.49,0.48,0.45:0.2,0.2,0.2)", later=True
    )
    checkpoints: str = option(
        "",
        "track these ('ckpt/*.pt') instead of training; the last number in a name is its epoch",
        fixed=False,
    )
    weights: str = option("", "safetensors or state dict to begin with", later=True)
    training: str = option("standard", "standard, PGD-adversarial, TRADES or Gaussian noise", choices=TRAININGS)
    pgd_epsilon: float | None = option(
        None,
        "radius (L-infinity) of adversarial training",
        above=0,
        unset="mnist 0.3, digits and fashion-mnist 0.1, else 8/255",
    )
    pgd_steps: int = option(10, "PGD steps of adversarial training", least=1)
    pgd_step_size: float | None = option(None, "PGD step size", above=0, unset="2.5 * epsilon / steps")
    pgd_norm: str = option("linf", "of the ball of adversarial training", choices=("linf", "l2"), later=True)
    trades_beta: float = option(6.0, "weight of the divergence of trades training", least=0, later=True)
    noise_sigma: float = option(0.25, "standard deviation of the noise of gaussian training", above=0, later=True)
    loss: str = option("cross-entropy", "training loss", choices=LOSSES)
    augment: str = option(
        "none",
        "move training images by up to an eighth of a side (shift), also mirror them (flip)",
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
    noise_retries: int = option(6, "noisy restarts for images that an attack fails on", least=0)
    probe: int = option(1000, "tracked images of each of the training and test set", least=1)
    probe_seed: int = option(0, "seed of the choice of tracked images", least=0)
    every: int = option(1, "measure every N epochs (0, 1 and the last always)", least=1, fixed=False)
    warm_start: bool = option(
        False,
        "start estimators that can from the witnesses of the epoch before; measure their cold form beside",
        later=True,
    )
    cold_every: int = option(
        5, "with --warm-start, measure the cold forms every N epochs (0, 1 and the last always)", least=1, fixed=False
    )
    keep_checkpoints: int = option(
        1, "keep the checkpoints of every N epochs, or 0 of none (0, 1 and the last two always)", least=0, fixed=False
    )
    certify: tuple[str, ...] = option(
        (), "certifier of lower bounds: crown, ibp or exact, NAME[:key=value,...], repeatable", fixed=False, many=True
    )
    certify_every: int = option(5, "certify every N epochs (0 and the last always)", least=1, fixed=False)
    certify_probe: int = option(100, "images of each split that are certified", least=1, later=True)
    seed: int = option(0, "seed of initialisation, batches and attacks", least=0)
    deterministic: bool = option(False, "deterministic CUDA kernels (slower)")
    log: tuple[str, ...] = option(
        (), "send averages to tensorboard:DIR, wandb:PROJECT or mlflow:URI, repeatable", fixed=False, many=True
    )
    device: str = option("auto", "auto, cpu or cuda[:i]", fixed=False)
    threads: int | None = option(
        None, "torch threads", least=1, fixed=False, unset="1 on digits, too small to share, else torch's choice"
    )
    measure_batch: int | None = option(
        None, "images a pass at most", least=1, unset="500 on digits, else 128, on CUDA all of a split"
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        kind, _, place = self.dataset.partition(":")
        if self.dataset not in DATASETS and not (kind in SOURCES and place):
            near = difflib.get_close_matches(self.dataset, DATASETS, 1)
            hint = f"did you mean {near[0]}?" if near else "choose one"
            raise ConfigError(
                f"expected --dataset to be one of {', '.join(DATASETS)} or npz:FILE, folder:DIR, torchvision:NAME, got "
                f"{self.dataset!r}; {hint}"
            )
        if self.model not in BUILT_IN_MODELS and ":" not in self.model:
            raise ConfigError(
                f"expected --model {', '.join(BUILT_IN_MODELS)}, torchvision:NAME, timm:NAME or pkg.module:factory, "
                f"got {self.model!r}; choose one"
            )
        parse_normalize(self.normalize)
        for check, texts in ((check_name, self.estimator), (check_certifier, self.certify)):
            try:
                for text in texts:
                    check(text)
            except EstimatorError as error:
                raise ConfigError(str(error)) from None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The options that make it this run and no other; estimators, norms and epochs may grow."""
        values = {f: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["fixed"]}
        return {f.name: _plain(v) for f, v in values.items() if not (f.metadata["later"] and v == f.default)}


def parse_normalize(text: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Means and standard deviations of ``MEAN:STD``; None of an empty text.

    Raises:
        ConfigError: not two lists of as many numbers, or a deviation that is not above 0.
    """
    if not text:
        return None
    try:
        mean, deviation = (tuple(float(number) for number in part.split(",")) for part in text.split(":"))
        right = len(mean) == len(deviation) and all(map(math.isfinite, (*mean, *deviation))) and min(deviation) > 0
    except ValueError:
        right = False
    if not right:
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
        # a file may hold 1 for 1.0, which is the same run
        value = options.get(f.name)
        if "float" in str(f.type) and type(value) is int and abs(value) < 2**63:
            options[f.name] = float(value)
    return RunConfig(**options)


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the data set decides."""
    small = config.dataset == "digits"
    if config.training in ADVERSARIAL and config.pgd_norm == "l2" and config.pgd_epsilon is None:
        raise ConfigError("expected --pgd-epsilon with --pgd-norm l2, got none; give the radius, such as 0.5")
    epsilon = PGD_EPSILON.get(config.dataset, 8 / 255) if config.pgd_epsilon is None else config.pgd_epsilon
    chosen: dict[str, Any] = {
        "pgd_epsilon": epsilon,
        "pgd_step_size": 2.5 * epsilon / config.pgd_steps,
        "batch_size": 32 if small else 128,
        # else the device decides, which is not known here
        "measure_batch": 500 if small else None,
        "epochs": 20 if small else 40,
        "threads": 1 if small else None,
    }
    unset = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return RunConfig(**vars(config) | unset)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse's own words name the argument first: "argument --probe: expected one argument"
        unknown = message.removeprefix("unrecognized arguments: ")
        argument, _, trouble = message.removeprefix("argument ").partition(": ")
        if unknown != message:
            near = difflib.get_close_matches(unknown.split()[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"expected options that there are, got {unknown}; {hint}"
        elif trouble == "expected one argument":
            message = f"expected a value for {argument}, got none; give one"
        elif not message.startswith("expected "):
            message = f"expected options as in --help, got {message}; mend them"
        self.exit(2, f"{self.prog.rpartition('.')[2]}: error: {message}\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser an option a field; what is not given stays out of the namespace."""
    for f in dataclasses.fields(RunConfig):
        flag, meta = "--" + f.name.replace("_", "-"), f.metadata
        shown = meta["unset"] if f.default is None else _shown(f.default)
        text = f"{meta['about']} (default: {shown})".replace("%", "%%")
        if f.type == "bool":
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind = int if "int" in str(f.type) else float if "float" in str(f.type) else str
        parser.add_argument(
            flag,
            action="append" if meta["many"] else "store",
            type=partial(_converted, kind),
            default=argparse.SUPPRESS,
            help=text,
            metavar="|".join(meta["choices"]) or {int: "N", float: "X"}.get(kind, f.name.upper().replace("_", "-")),
        )
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a file; the command line wins")


def from_namespace(given: argparse.Namespace, before: dict[str, Any] | None = None) -> RunConfig:
    """Defaults, then the run that is resumed, then ``--config``'s file, then the command line, resolved.

    Args:
        before: options of the run that is resumed (`as_dict`), which gets no shorter.

    Raises:
        ConfigError: one line.
    """
    names = {f.name for f in dataclasses.fields(RunConfig)}
    values = _read_file(Path(given.config)) if given.config else {}
    values |= {name: value for name, value in vars(given).items() if name in names}
    if before:
        kept = {name: value for name, value in before.items() if name in names}
        asked, values = values, kept | values
        if isinstance(asked.get("epochs"), int) and isinstance(kept.get("epochs"), int):
            values["epochs"] = max(asked["epochs"], kept["epochs"]) if asked["epochs"] >= 0 else asked["epochs"]
    return resolve(from_dict(values))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected a TOML file at {path}, got {error}; mend the file or its path") from None
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if len(values) < len(table):
        twice = sorted(key for key in table if "-" in key and key.replace("-", "_") in table)
        raise ConfigError(
            f"expected each option once in {path}, got {', '.join(twice)} with dashes and underscores; remove one"
        )
    return values


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    flag, meta = "--" + f.name.replace("_", "-"), f.metadata
    if value is None and f.default is None:
        return
    if meta["many"]:
        if value == () == f.default:
            return
        if not isinstance(value, tuple) or not value or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"expected {flag} as one or more names, got {value!r}; give a list of words")
        if len(set(value)) < len(value):
            raise ConfigError(f"expected each {flag} once, got {', '.join(value)}; remove the repetition")
    kind = _kind(f)
    if not meta["many"] and not (isinstance(value, kind) and (kind == (bool,) or not isinstance(value, bool))):
        raise ConfigError(f"expected {flag} to be of type {kind[-1].__name__}, got {value!r}; write it so")
    for item in value if meta["many"] else (value,):
        if meta["choices"] and item not in meta["choices"]:
            raise ConfigError(f"expected {flag} to be one of {', '.join(meta['choices'])}, got {item!r}; choose one")
    if meta["least"] is not None and not value >= meta["least"]:
        raise ConfigError(f"expected {flag} of at least {meta['least']}, got {value}; give a larger number")
    if meta["above"] is not None and not value > meta["above"]:
        raise ConfigError(f"expected {flag} above {meta['above']}, got {value}; give a larger number")
    # torch's generators and sizes are 64-bit
    if isinstance(value, int | float) and value >= 2**63:
        raise ConfigError(f"expected {flag} below 2**63, got {value}; give a smaller number")


def _kind(f: dataclasses.Field[Any]) -> tuple[type, ...]:
    name = str(f.type).split(" | ")[0]
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    return kinds.get(name, (tuple,))


def _converted(kind: Callable[[str], Any], text: str) -> Any:
    """The value, or the text itself, which `RunConfig` then refuses in its own words."""
    try:
        return kind(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) or "none"
