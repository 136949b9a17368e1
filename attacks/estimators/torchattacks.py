"""Any attack of torchattacks by its class name: ``torchattacks:NAME,parameter=value``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchattacks
from torch import Tensor

from attacks.adapters.ladder import check_values, climb_ladder
from attacks.adapters.torchattacks import LIBRARY_NORM, Anchored
from attacks.adapters.torchattacks import quiet as quiet_torchattacks
from attacks.estimator import Settings
from attacks.isolation import Classifier
from attacks.types import BOX_ONLY, Domain, EstimatorError, Norm


@dataclass(frozen=True, kw_only=True)
class TorchAttack(Settings):
    """Any attack of ``torchattacks`` by class name, with its own parameters.

    An attack that has an ``eps``, which is not among the parameters, runs on a ladder of radii, each twice the one
    before; rows leave at their first success. The distance is then as tight as the bisection of `measure` makes it.
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
        # `perturb` sets the model and the norm
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
                # some attacks mix float32 into their computations
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
    """Norms of a torchattacks class, read from its docstring."""
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
