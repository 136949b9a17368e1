"""Any attack of Foolbox or torchattacks by its class name, judged like the named estimators."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchattacks
from torch import Tensor

from attacks.adapters.foolbox import quiet as quiet_foolbox
from attacks.adapters.foolbox import run
from attacks.adapters.torchattacks import LIBRARY_NORM, Anchored
from attacks.adapters.torchattacks import quiet as quiet_torchattacks
from attacks.adapters.upstream import foolbox, library
from attacks.estimator import NORMS, Domain, EstimatorError, Norm, Settings
from attacks.geometry import farthest_in_box
from attacks.isolation import Classifier

BOTH: frozenset[Norm] = frozenset(NORMS)
BOX_ONLY: frozenset[Domain] = frozenset({"box"})
LADDER = 10
# attacks that need what the text form cannot give
UNUSABLE = {
    "BinarizationRefinementAttack": "it only improves given witnesses",
    "DatasetAttack": "it must be fed a data set first",
    "GenAttack": "it is targeted only",
}


def check_values(attack: str, given: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse values whose type is not that of the library's default, where it has one to tell.

    Raises:
        EstimatorError: names the parameter, its type and default.
    """
    for key, value in given.items():
        default = accepted[key].default if key in accepted else None
        if default is None or default is inspect.Parameter.empty or value is None:
            continue
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(value) not in kinds:
            raise EstimatorError(
                f"expected {attack}'s {key} to be of type {type(default).__name__} (default {default}), "
                f"got {value!r}; write it so"
            )


def climb_ladder(
    attempt: Callable[[Tensor, float], Tensor], model: Classifier, images: Tensor, labels: Tensor, norm: Norm
) -> Tensor:
    """Run a fixed-epsilon attack with radii that double up to the box's size; rows leave at their first success.

    ``attempt(rows, radius)`` gives candidates for these rows; the radius is one number since the
    libraries take no other.
    """
    result, pending = images.clone(), torch.arange(len(images), device=images.device)
    largest = float(farthest_in_box(images, norm).max())
    for rung in range(LADDER):
        with model.rows(pending):
            candidates = attempt(pending, largest * 2.0 ** (rung + 1 - LADDER))
            with torch.no_grad():
                logits = model(candidates)
                moved = (logits.argmax(1) != labels[pending]) & logits.isfinite().all(1)
        result[pending[moved]] = candidates[moved]
        pending = pending[~moved]
        if not len(pending):
            break
    return result


@dataclass(frozen=True, kw_only=True)
class FoolboxAttack(Settings):
    """Any attack of ``foolbox.attacks`` by class name, with its own parameters.

    Minimisation attacks run once. Fixed-epsilon attacks run on a ladder of ``LADDER`` radii, each
    twice the last, rows leaving at their first success; an ``epsilon`` parameter runs that one alone.
    Their distance is then as good as the bisection of `measure` makes it.
    """

    name: ClassVar[str] = "foolbox"
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = False
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY

    attack: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self._build(None)

    @property
    def norms(self) -> frozenset[Norm]:
        """The attack's own norm; all where it takes a ``distance``."""
        return _norms_of(getattr(library, self.attack))

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`."""
        attack, epsilon = self._build(norm)
        with model.recording(images, labels, norm) as record:
            if not isinstance(attack, library.base.FixedEpsilonAttack):
                return record.improve(run(attack, model, images, labels))
            if epsilon is not None:
                return record.improve(run(attack, model, images, labels, epsilon=epsilon))

            def attempt(rows: Tensor, radius: float) -> Tensor:
                return run(attack, model, images[rows], labels[rows], epsilon=radius)

            return record.improve(climb_ladder(attempt, model, images, labels, norm))

    def _build(self, norm: Norm | None) -> tuple[Any, float | None]:
        """The library's attack and the epsilon among the parameters."""
        cls = getattr(library, self.attack, None)
        if not (inspect.isclass(cls) and issubclass(cls, library.base.Attack)) or inspect.isabstract(cls):
            raise EstimatorError(
                f"expected an attack class of foolbox.attacks, got {self.attack!r}; "
                f"choose one of {', '.join(foolbox_attacks())}"
            )
        if not _norms_of(cls):
            raise EstimatorError(
                f"expected an attack that minimises or bounds l2 or linf, got foolbox:{self.attack} "
                f"({_kind(cls)}); choose another"
            )
        if self.attack in UNUSABLE:
            raise EstimatorError(
                f"expected an attack that needs images and labels only, got foolbox:{self.attack} "
                f"({UNUSABLE[self.attack]}); choose another"
            )
        options = dict(self.parameters)
        epsilon = options.pop("epsilon", None) if issubclass(cls, library.base.FixedEpsilonAttack) else None
        if epsilon is not None and (isinstance(epsilon, bool) or not isinstance(epsilon, int | float)):
            raise EstimatorError(f"expected foolbox:{self.attack}'s epsilon to be a number, got {epsilon!r}; write one")
        check_values(f"foolbox:{self.attack}", options, inspect.signature(cls).parameters)
        if norm is not None and "distance" in inspect.signature(cls).parameters:
            options["distance"] = getattr(foolbox.distances, norm)
        try:
            with quiet_foolbox():
                return cls(**options), epsilon
        except TypeError as error:
            has = ", ".join(str(p) for p in inspect.signature(cls).parameters.values())
            raise EstimatorError(
                f"expected parameters of foolbox:{self.attack} ({has}), got {error}; write them as key=value"
            ) from None
        except ImportError as error:
            raise EstimatorError(f"expected the packages of foolbox:{self.attack}, got {error}; install them") from None


def foolbox_attacks() -> list[str]:
    """Class names of ``foolbox.attacks`` that `FoolboxAttack` can run."""
    classes = inspect.getmembers(library, inspect.isclass)
    return [
        name
        for name, cls in classes
        if issubclass(cls, library.base.Attack)
        and not inspect.isabstract(cls)
        and _norms_of(cls)
        and name not in UNUSABLE
    ]


def _norms_of(cls: Any) -> frozenset[Norm]:
    if "distance" in inspect.signature(cls).parameters:
        return BOTH
    distance = getattr(cls, "distance", None)
    return frozenset(norm for norm in NORMS if distance is getattr(foolbox.distances, norm))


def _kind(cls: Any) -> str:
    kind = "fixed epsilon" if issubclass(cls, library.base.FixedEpsilonAttack) else "minimisation"
    return f"{kind}, distance {getattr(cls, 'distance', 'its own')}"


@dataclass(frozen=True, kw_only=True)
class TorchAttack(Settings):
    """Any attack of ``torchattacks`` by class name, with its own parameters.

    An attack with an ``eps`` that is not among the parameters runs on a ladder of radii, each twice
    the last, rows leaving at their first success. Its distance is then as good as the bisection of
    `measure` makes it.
    """

    name: ClassVar[str] = "torchattacks"
    domains: ClassVar[frozenset[Domain]] = BOX_ONLY
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = False

    attack: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        cls = _attack_class(self.attack)
        if not norms_of(cls):
            raise EstimatorError(
                f"expected an attack that minimises or bounds l2 or linf, got torchattacks:{self.attack} "
                f"({_stated_norms(cls) or 'no norm stated'}); choose another"
            )
        # the model is measure's to give, and so is the norm
        accepted = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in ("model", "norm")}
        for key, _ in self.parameters:
            if key not in accepted:
                has = ", ".join(str(p) for p in accepted.values())
                raise EstimatorError(
                    f"expected parameters of torchattacks:{self.attack} ({has}), got {key!r}; choose one of them"
                )

        check_values(f"torchattacks:{self.attack}", dict(self.parameters), accepted)

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms that the attack's documentation states."""
        return norms_of(_attack_class(self.attack))

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`."""
        accepted = inspect.signature(_attack_class(self.attack)).parameters
        asked = dict(self.parameters)
        if "norm" in accepted:
            asked["norm"] = LIBRARY_NORM[norm]
        if "n_classes" in accepted:
            asked.setdefault("n_classes", model.classes)

        def attempt(rows: Tensor, radius: float | None) -> Tensor:
            options = asked if radius is None else asked | {"eps": radius}
            if radius is not None and "alpha" in accepted and "alpha" not in asked:
                steps = asked.get("steps", accepted["steps"].default if "steps" in accepted else 1)
                options = options | {"alpha": 2.5 * radius / steps}
            anchored = Anchored(model, images.device, images.dtype)
            with quiet_torchattacks():
                attack = _attack_class(self.attack)(anchored, **options)
                # some attacks mix float32 into whatever they are given
                result: Tensor = attack(images[rows].float(), labels[rows])
            return result.detach().to(images.dtype)

        with model.recording(images, labels, norm) as record:
            if "eps" in accepted and "eps" not in asked:
                return record.improve(climb_ladder(attempt, model, images, labels, norm))
            return record.improve(attempt(torch.arange(len(images), device=images.device), None))


def torchattacks_attacks() -> list[str]:
    """Class names of ``torchattacks`` that `TorchAttack` can run."""
    classes = inspect.getmembers(torchattacks, inspect.isclass)
    return [n for n, c in classes if issubclass(c, torchattacks.attack.Attack) and norms_of(c)]


def norms_of(cls: Any) -> frozenset[Norm]:
    """Norms of a torchattacks class, which only its documentation states."""
    names: dict[str, Norm] = {"L2": "l2", "Linf": "linf"}
    return frozenset(names[word] for word in re.findall(r"L2|Linf", _stated_norms(cls)))


def _stated_norms(cls: Any) -> str:
    match = re.search(r"Distance Measure\s*:\s*(.+)", cls.__doc__ or "")
    return match.group(1) if match else ""


def _attack_class(name: str) -> Any:
    cls = getattr(torchattacks, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torchattacks.attack.Attack)):
        raise EstimatorError(
            f"expected an attack class of torchattacks, got {name!r}; choose one of {', '.join(torchattacks_attacks())}"
        )
    return cls
