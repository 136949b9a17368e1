"""Read a study from its TOML file: groups of runs, each run once."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.options import ConfigError
from harness.config.run_config import from_dict

OWN = ("checkpoints",)
GROUP_KEYS = {"name", "title", "stage", "options", "runs", "seeds", "added", "certified", "checkpoints", "pictures"}
Epochs = tuple[int, ...]


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        options: the set options of `harness.track`, by their names in `RunConfig`.
        added: estimator -> epochs whose checkpoints it measures afterwards.
        checkpoints: epochs at which free margins and random directions are measured.
        certified: certifier -> epochs whose checkpoints it bounds the margins of afterwards.
    """

    name: str
    options: Mapping[str, Any]
    added: Mapping[str, Epochs]
    checkpoints: Epochs
    certified: Mapping[str, Epochs]


@dataclass(frozen=True)
class Group:
    """Runs that are reported together.

    Attributes:
        pictures: path of a report figure -> caption; these figures are stored.
    """

    name: str
    title: str
    stage: int
    runs: tuple[str, ...]
    pictures: Mapping[str, str]

    def place(self, picture: str) -> Path:
        """The path of a picture in the folder of the tables."""
        return Path(self.name, f"{picture.replace('/', '-')}.png")


@dataclass(frozen=True)
class Study:
    """Groups in the order of their stages, and their planned runs."""

    groups: tuple[Group, ...]
    runs: Mapping[str, Planned]

    def first_of(self, group: Group) -> tuple[str, ...]:
        """The runs of a group that are in no earlier group."""
        before = {name for other in self.groups[: self.groups.index(group)] for name in other.runs}
        return tuple(name for name in group.runs if name not in before)

    def upto(self, stage: int | None) -> Study:
        """The groups up to a stage, and their runs."""
        groups = tuple(group for group in self.groups if stage is None or group.stage <= stage)
        names = list(dict.fromkeys(name for group in groups for name in group.runs))
        return Study(groups, {name: self.runs[name] for name in names})


def read_study(path: Path) -> Study:
    """Read ``path``.

    Raises:
        ConfigError: an invalid file, an unknown option, or a run with two conflicting definitions.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected a TOML file at {path}, got {error}; fix the file or its path") from None
    try:
        return _study(table, path)
    except (TypeError, AttributeError, KeyError) as error:  # for example a string in place of a table
        raise ConfigError(
            f"expected groups as benchmarks/reproduce.toml has them in {path}, got {type(error).__name__}: {error}; "
            "write them so"
        ) from None


def _study(table: Mapping[str, Any], path: Path) -> Study:
    runs: dict[str, Planned] = {}
    groups = []
    for given in table.get("group", ()):
        missing, unknown = {"name", "title", "stage", "runs"} - set(given), set(given) - GROUP_KEYS
        if missing or unknown:
            got = ", ".join(sorted(missing | unknown))
            raise ConfigError(f"expected groups of {', '.join(sorted(GROUP_KEYS))} in {path}, got or missed {got}")
        names = []
        for planned in _runs_of(given, table.get("defaults", {})):
            before = runs.get(planned.name)
            runs[planned.name] = planned if before is None else _merged(before, planned)
            names.append(planned.name)
        pictures = dict(given.get("pictures", {}))
        groups.append(Group(given["name"], given["title"], given["stage"], tuple(names), pictures))
    if not groups:
        raise ConfigError(f"expected groups in {path}, got none; write one")
    return Study(tuple(sorted(groups, key=lambda group: group.stage)), runs)


def _runs_of(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Planned]:
    checkpoints = tuple(group.get("checkpoints", defaults.get("checkpoints", ())))
    added = {text: tuple(epochs) for text, epochs in group.get("added", {}).items()}
    certified = {text: tuple(epochs) for text, epochs in group.get("certified", {}).items()}
    common = {key: value for key, value in defaults.items() if key not in OWN} | group.get("options", {})
    found = []
    for own in group["runs"]:
        for seed in group.get("seeds", [common.get("seed", 0)]):
            options = common | own | {"seed": seed}
            from_dict(options)
            found.append(Planned(_name(options, own), options, added, checkpoints, certified))
    return found


def _name(options: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The name of a run within a study."""
    parts = [options["dataset"], options["model"], options.get("training", "standard")]
    parts += [f"{key.replace('_', '-')}-{value}" for key, value in own.items() if key != "training"]
    return "-".join(map(str, parts + ([f"seed-{options['seed']}"] if options["seed"] else [])))


def _merged(one: Planned, other: Planned) -> Planned:
    """Merge a run of two groups: all estimators at all epochs that either group requests."""
    differing = [
        key
        for key in {**one.options, **other.options}
        if key != "estimator" and one.options.get(key) != other.options.get(key)
    ]
    if differing:
        raise ConfigError(f"expected {one.name} to be one run, got two of different {', '.join(differing)}; fix one")
    estimators = list(dict.fromkeys([*one.options.get("estimator", ()), *other.options.get("estimator", ())]))
    added = {text: at for text, at in _together(one.added, other.added).items() if text not in estimators}
    certified = _together(one.certified, other.certified)
    epochs = tuple(sorted({*one.checkpoints, *other.checkpoints}))
    return Planned(one.name, {**one.options, "estimator": estimators}, added, epochs, certified)


def _together(one: Mapping[str, Epochs], other: Mapping[str, Epochs]) -> dict[str, Epochs]:
    """All texts, each with the union of epochs."""
    return {text: tuple(sorted({*one.get(text, ()), *other.get(text, ())})) for text in {**one, **other}}
