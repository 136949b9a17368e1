"""Any attack of Foolbox by its class name: ``foolbox:NAME,parameter=value``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attacks.adapters.foolbox import foolbox, library, run
from attacks.adapters.foolbox import quiet as quiet_foolbox
from attacks.adapters.ladder import check_values, climb_ladder
from attacks.estimator import Settings
from attacks.isolation import Classifier
from attacks.types import BOTH_NORMS, BOX_ONLY, NORMS, Domain, EstimatorError, Norm

# attacks that need more than the text form can give
UNUSABLE = {
    "BinarizationRefinementAttack": "it only improves given witnesses",
    "DatasetAttack": "it must be fed a data set first",
    "GenAttack": "it is targeted only",
}


@dataclass(frozen=True, kw_only=True)
class FoolboxAttack(Settings):
    """Any attack of ``foolbox.attacks`` by class name, with its own parameters.

    Minimisation attacks run once. Fixed-epsilon attacks run on a ladder of ``LADDER`` radii, each twice the one before;
    rows leave at their first success. With an ``epsilon`` parameter, only that radius runs. The distance is then as
    tight as the bisection of `measure` makes it.
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
        """The attack's own norm; all norms if it has a parameter ``distance``."""
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
            raise EstimatorError(
                f"expected foolbox:{self.attack}'s epsilon to be a number, got {epsilon!r}; give a number"
            )
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
        return BOTH_NORMS
    distance = getattr(cls, "distance", None)
    return frozenset(norm for norm in NORMS if distance is getattr(foolbox.distances, norm))


def _kind(cls: Any) -> str:
    kind = "fixed epsilon" if issubclass(cls, library.base.FixedEpsilonAttack) else "minimisation"
    return f"{kind}, distance {getattr(cls, 'distance', 'its own')}"
