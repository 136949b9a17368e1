"""Registry of estimators and certifiers, and their text form ``name:field=value,field=value``.

Entries hold ``module:Class`` strings and one line of facts each, so that ``--list-estimators`` needs no torch. Other
packages add estimators through the entry-point group ``margin_harness.estimators``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from attacks.estimator import Estimator
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, Norm

if TYPE_CHECKING:
    from attacks.certifier import Certifier

ENTRY_POINTS = "margin_harness.estimators"


@dataclass(frozen=True)
class Entry:
    """A registered class: ``module:Class``, what it supports, its cost, one line about it, and a package it needs."""

    target: str
    norms: tuple[Norm, ...]
    domains: tuple[Domain, ...]
    cost: str
    about: str
    needs: str = ""


_BOX: tuple[Domain, ...] = ("box",)

# cost: forwards and backwards per image on the digits network of benchmarks/estimators.py
ESTIMATORS: dict[str, Entry] = {
    "deepfool": Entry("attacks.estimators.deepfool:DeepFool", NORMS, DOMAINS, "40", "linearise and step (the paper's)"),
    "fmn": Entry("attacks.estimators.fmn:FMN", NORMS, DOMAINS, "140", "fast minimum norm: adaptive radius"),
    "ddn": Entry("attacks.estimators.ddn:DDN", ("l2",), DOMAINS, "140", "decoupled direction and norm"),
    "cw": Entry("attacks.estimators.cw:CW", ("l2",), _BOX, "1200", "Carlini-Wagner, search over c"),
    "bb": Entry(
        "attacks.estimators.bb:BB", NORMS, _BOX, "300", "Brendel-Bethge along the boundary; needs numba", "numba"
    ),
    "pgd": Entry("attacks.estimators.pgd:PGD", NORMS, _BOX, "300", "PGD, radius bisected per image"),
    "apgd": Entry("attacks.estimators.apgd:APGD", NORMS, DOMAINS, "900", "auto-PGD on DLR and targeted DLR, bisected"),
    "fab": Entry("attacks.estimators.fab:FAB", NORMS, _BOX, "140", "fast adaptive boundary"),
    "sdf": Entry(
        "attacks.estimators.sdf:SuperDeepFool", ("l2",), DOMAINS, "50", "DeepFool, straightened by projections"
    ),
    "linear": Entry(
        "attacks.estimators.linear:Linear", NORMS, DOMAINS, "30", "one linearised step, doubled until it crosses"
    ),
    "cascade": Entry(
        "attacks.estimators.cascade:Cascade", NORMS, DOMAINS, "300", "walks to the nearest classes, under a budget"
    ),
    "best": Entry(
        "attacks.estimators.best:Best", NORMS, DOMAINS, "its members'", "nearest of several, best:of=fmn+apgd:steps=40"
    ),
    "foolbox": Entry(
        "attacks.estimators.foolbox:FoolboxAttack", NORMS, _BOX, "its own", "foolbox:<ClassName>, any of its attacks"
    ),
    "torchattacks": Entry(
        "attacks.estimators.torchattacks:TorchAttack",
        NORMS,
        _BOX,
        "its own",
        "torchattacks:<ClassName>, any of its attacks",
    ),
}

CERTIFIERS: dict[str, Entry] = {
    "crown": Entry("attacks.certify.certifiers:Crown", NORMS, DOMAINS, "", "linear relaxation"),
    "ibp": Entry("attacks.certify.certifiers:IBP", NORMS, DOMAINS, "", "intervals and one pass of lines: fast, loose"),
    "exact": Entry("attacks.certify.certifiers:Exact", NORMS, DOMAINS, "", "branch and bound, seconds per image"),
}
# refinements of any estimator's witnesses: only the bisection of `measure`, or `Polished` before it
REFINEMENTS = ("segment", "polish")
POLISHED = "attacks.polish:Polished"

# estimators that take a library's class name as their first argument
WRAPPERS = ("foolbox", "torchattacks")


def known() -> dict[str, Entry]:
    """All estimators by name: the built-in ones, then those of installed packages, whose facts are in their class."""
    outside = {
        point.name: Entry(point.value, (), (), "see its package", f"from {point.value.partition(':')[0]}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
        if point.name not in ESTIMATORS
    }
    return ESTIMATORS | outside


def check_name(text: str) -> str:
    """The name in an estimator's text form, which must exist; needs no torch.

    Raises:
        EstimatorError: unknown name; lists the known names and the closest one.
    """
    return _entry(text)[0]


def _entry(text: str) -> tuple[str, Entry]:
    """The name in a text form, and its entry; see `check_name`."""
    name = text.partition(":")[0]
    # searching the installed packages takes 16 ms
    names = ESTIMATORS if name in ESTIMATORS else known()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise EstimatorError(f"expected an estimator of {', '.join(names)}, got {name!r}; {hint}")
    return name, names[name]


def check_needs(name: str) -> None:
    """Refuse an estimator that needs a package which is not installed, before any work is done.

    Raises:
        EstimatorError: names the package.
    """
    entry = known().get(name)
    if entry is not None and entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise EstimatorError(
            f"expected the package {entry.needs} for the estimator {name}, got none; pip install {entry.needs}"
        )


def create(text: str) -> Estimator:
    """Build an estimator from its text form, as in ``fmn:steps=200`` or ``foolbox:L2BasicIterativeAttack``.

    Every estimator has the parameter ``refine``, ``segment`` or ``polish``; see `attacks.polish.Polished`.

    Raises:
        EstimatorError: unknown name or parameter, or a value of the wrong type; lists the choices.
    """
    name, entry = _entry(text)
    cls, attack, rest = _load(entry.target), "", text.partition(":")[2]
    if name in WRAPPERS:
        attack, _, rest = rest.partition(":")
        if not attack:
            raise EstimatorError(f"expected {name}:<ClassName>, got {text!r}; name one of the library's attacks")
    pairs = _pairs(rest)
    refine = pairs.pop("refine", REFINEMENTS[0])
    if refine not in REFINEMENTS:
        raise EstimatorError(f"expected refine={' or refine='.join(REFINEMENTS)}, got {refine!r}; choose one of them")
    estimator: Estimator = _wrapper(cls, attack, pairs) if attack else _build("estimator", name, cls, pairs)
    if refine == "segment":
        return estimator
    polished: Estimator = _load(POLISHED)(inner=estimator)
    return polished


def _wrapper(cls: Any, attack: str, pairs: dict[str, str]) -> Estimator:
    wrapped: Estimator = cls(attack=attack, parameters=tuple((k, _literal(v)) for k, v in sorted(pairs.items())))
    return wrapped


def check_certifier(text: str) -> str:
    """The name in a certifier's text form, which must exist; needs no torch.

    Raises:
        EstimatorError: unknown name; lists the known names.
    """
    name = text.partition(":")[0]
    if name not in CERTIFIERS:
        raise EstimatorError(f"expected a certifier of {', '.join(CERTIFIERS)}, got {name!r}; choose one of them")
    return name


def create_certifier(text: str) -> Certifier:
    """Build a certifier from its text form, as in ``crown:cuts=8``.

    Raises:
        EstimatorError: unknown name or parameter, or a value of the wrong type.
    """
    name = check_certifier(text)
    cls = _load(CERTIFIERS[name].target)
    certifier: Certifier = _build("certifier", name, cls, _pairs(text.partition(":")[2]))
    return certifier


def _build(kind: str, name: str, cls: Any, pairs: dict[str, str]) -> Any:
    """Create an instance of the class from the parameters of a text form."""
    hints = get_type_hints(cls)
    settings = {field.name: (hints[field.name], field.default) for field in dataclasses.fields(cls)}
    values = {key: _convert(name, key, value, settings) for key, value in pairs.items()}
    try:
        return cls(**values)
    except (EstimatorError, TypeError) as error:
        raise EstimatorError(f"{kind} {name}: {error}") from None


def text_form(estimator: Estimator | Certifier) -> str:
    """The canonical text form: the name and the fields that differ from their defaults, in declared order.

    Estimators that wrap a library's attack list all given parameters of the library, sorted.
    """
    inner = getattr(estimator, "inner", None)
    if inner is not None and isinstance(estimator, _load(POLISHED)):
        name, parameters = _parts(inner)
        return name + _joined(parameters | {"refine": "polish"})
    name, parameters = _parts(estimator)
    return name + _joined(parameters)


def _parts(estimator: Estimator | Certifier) -> tuple[str, dict[str, Any]]:
    """The name, with the library's class if any, and the parameters of the text form."""
    if estimator.name in WRAPPERS:
        attack, parameters = getattr(estimator, "attack"), getattr(estimator, "parameters")  # noqa: B009
        return f"{estimator.name}:{attack}", dict(sorted(parameters))
    if not dataclasses.is_dataclass(estimator):
        raise EstimatorError(
            f"expected an estimator that is a dataclass of its hyperparameters, got {type(estimator).__name__}; "
            "make it one"
        )
    changed = {}
    for field in dataclasses.fields(estimator):
        value = getattr(estimator, field.name)
        if value != field.default:
            changed[field.name] = value
    return estimator.name, changed


def _joined(parameters: dict[str, Any]) -> str:
    shown = {k: str(v).lower() if isinstance(v, bool | None) else v for k, v in parameters.items()}
    return ":" + ",".join(f"{key}={value}" for key, value in shown.items()) if shown else ""


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        loaded: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EstimatorError(f"expected an estimator class at {target}, got {error}; check that package") from error
    if not dataclasses.is_dataclass(loaded):
        raise EstimatorError(f"expected a dataclass of hyperparameters at {target}, got {loaded!r}; check that package")
    return loaded


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key.strip() in pairs:
            raise EstimatorError(f"expected parameters as key=value,key=value, got {text!r}; write each once")
        pairs[key.strip()] = value.strip()
    return pairs


def _convert(name: str, key: str, text: str, settings: dict[str, tuple[type, Any]]) -> Any:
    if key not in settings:
        known_keys = ", ".join(f"{k}: {_kind(kind)} = {v}" for k, (kind, v) in settings.items()) or "no parameters"
        raise EstimatorError(f"expected a parameter of {name} ({known_keys}), got {key!r}; choose one of them")
    kind, default = settings[key]
    value = text if kind is str else _literal(text)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # an integer too large for a float stays an integer, which is refused below
        with contextlib.suppress(OverflowError):
            value = float(value)
    # the class itself checks types such as `int | None`
    if isinstance(kind, type) and type(value) is not kind:
        raise EstimatorError(
            f"expected {name}'s {key} to be of type {_kind(kind)} (default {default}), got {text!r}; "
            "give a value of that type"
        )
    return value


def _kind(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _literal(text: str) -> bool | int | float | str | None:
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
