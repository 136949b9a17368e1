"""Options that are fields of a dataclass: what they may be, how the command line and a file give them.

No torch: ``--help`` and usage errors answer at once.
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
    """A field that is also an option of the command line.

    Args:
        fixed: part of the fingerprint: another value is another run.
        unset: what ``None`` means, for ``--help``.
        many: repeatable; the value is a tuple.
        later: left out of the fingerprint while it is at its default, as runs without it are the same runs.
    """
    metadata = {"about": about, "choices": choices, "least": least, "above": above, "fixed": fixed, "unset": unset}
    return field(default=default, metadata=metadata | {"many": many, "later": later})


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


def add_options(parser: argparse.ArgumentParser, fields: Iterable[dataclasses.Field[Any]]) -> None:
    """Give the parser an option a field; what is not given stays out of the namespace."""
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
    """Options in a TOML file, by the names of fields.

    Raises:
        ConfigError: no such file, or an option twice.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expected a TOML file at {path}, got {error}; mend the file or its path") from None
    return undashed(table, path)


def undashed(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A table's options by the names of fields.

    Raises:
        ConfigError: an option with dashes and with underscores.
    """
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if len(values) < len(table):
        twice = sorted(key for key in table if "-" in key and key.replace("-", "_") in table)
        raise ConfigError(
            f"expected each option once in {path}, got {', '.join(twice)} with dashes and underscores; remove one"
        )
    return values


def check_option(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that the option cannot have.

    Raises:
        ConfigError: one line.
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


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value) or "none"
