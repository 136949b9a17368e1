"""Options as fields of a dataclass: checks of values, command-line arguments and TOML files.

This module does not import torch, so ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


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
    """A dataclass field that is also an option of the command line.

    Args:
        default: value when the option is not given.
        about: description for ``--help``.
        choices: allowed values; empty for any.
        least: smallest allowed number.
        above: number that the value must exceed.
        fixed: whether the option is part of the fingerprint, so that another value means another run.
        unset: meaning of ``None``, for ``--help``.
        many: whether the option is repeatable; the value is a tuple.
        later: whether the option was added after version 0.1.0 and is left out of the fingerprint at its default, so
            that older runs keep theirs.
    """
    metadata = {"about": about, "choices": choices, "least": least, "above": above, "fixed": fixed, "unset": unset}
    return field(default=default, metadata=metadata | {"many": many, "later": later})


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse's messages name the argument first: "argument --probe: expected one argument"
        unknown = message.removeprefix("unrecognized arguments: ")
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        if unknown != message:
            near = difflib.get_close_matches(unknown.split()[0], self._option_string_actions, 1)
            kind = "unknown option" if unknown.startswith("-") else "unexpected argument"
            message = f"{kind} {unknown}; {f'did you mean {near[0]}?' if near else 'see --help'}"
        elif problem == "expected one argument":
            message = f"expected a value for {argument}, got none; give one"
        elif not message.startswith("expected "):
            message = f"expected options as in --help, got {message}; fix them"
        self.exit(2, f"{self.prog.rpartition('.')[2]}: error: {message}\n")


def add_options(parser: argparse.ArgumentParser, fields: Iterable[dataclasses.Field[Any]]) -> None:
    """Add one option per field to the parser; options that are not given are absent from the namespace."""
    for f in fields:
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


def read_options(path: Path) -> dict[str, Any]:
    """Read options from a TOML file, by field name.

    Raises:
        ConfigError: the file is missing or not TOML, or has an option twice.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected a TOML file at {path}, got {error}; fix the file or its path") from None
    return undashed(table, path)


def undashed(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A table's options by field name, dashes replaced by underscores.

    Raises:
        ConfigError: an option is given with dashes and with underscores.
    """
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if len(values) < len(table):
        twice = sorted(key for key in table if "-" in key and key.replace("-", "_") in table)
        raise ConfigError(
            f"expected each option once in {path}, got {', '.join(twice)} with dashes and underscores; remove one"
        )
    return values


def check_option(f: dataclasses.Field[Any], value: Any) -> None:
    """Check the value of an option: its type, choices and limits.

    Raises:
        ConfigError: the option cannot have the value; the message is one line.
    """
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
    # torch's seeds and sizes are 64-bit
    if isinstance(value, int | float) and value >= 2**63:
        raise ConfigError(f"expected {flag} below 2**63, got {value}; give a smaller number")


def _kind(f: dataclasses.Field[Any]) -> tuple[type, ...]:
    name = str(f.type).split(" | ")[0]
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    return kinds.get(name, (tuple,))


def _converted(kind: Callable[[str], Any], text: str) -> Any:
    """The converted value, or the text itself, which `check_option` then refuses with our message."""
    try:
        return kind(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) or "none"
