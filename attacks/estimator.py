"""The contract of margin estimators: the `Estimator` protocol, its settings, and the `Margins` that `measure` returns.

No torch at run time: the command line imports this for ``--help``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_type_hints

# the names below are part of this module's public interface
from attacks.types import DOMAINS as DOMAINS
from attacks.types import NORMS as NORMS
from attacks.types import Domain as Domain
from attacks.types import EstimatorError as EstimatorError
from attacks.types import InputError as InputError
from attacks.types import Norm as Norm
from attacks.types import UnsoundError as UnsoundError

if TYPE_CHECKING:
    from torch import Tensor

    from attacks.isolation import Classifier


class Status(StrEnum):
    """The outcome per image. Only ``found``, ``found_after_noise`` and ``tied`` have a finite distance."""

    FOUND = "found"
    FOUND_AFTER_NOISE = "found_after_noise"
    TIED = "tied"
    NOT_FOUND = "not_found"
    FAILED = "failed"


class Estimator(Protocol):
    """Proposes witnesses: points that may be classified differently from the image.

    Estimators do not verify their results: only `attacks.judging` clips, re-classifies, retries, refines and computes
    distances. An estimator with a setting ``warm``, 0 by default, and a class attribute ``WARM``, its recommended
    value, is started from the witnesses of the epoch before if ``warm`` is not 0.

    An estimator whose numbers have changed since its first release states this in a class attribute ``revision``, an
    integer that is 1 by default: a run does not mix margins of two revisions.

    An estimator with a class attribute ``uses_pool`` that is true takes one more keyword, ``pool``, an
    `attacks.pool.Pool` or None: images of known classes to set out from.
    """

    @property
    def name(self) -> str:
        """The name in the registry."""

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms that the estimator can minimise."""

    @property
    def domains(self) -> frozenset[Domain]:
        """``box``: witnesses inside the pixel bounds; ``free``: anywhere."""

    @property
    def tightness(self) -> Mapping[Norm, float]:
        """Declared median of distance / exact margin on affine models, which the tests check."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is independent of the other rows of its batch, beyond rounding."""

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
        """Propose one witness per image.

        Args:
            model: frozen view, ``(B, C, H, W)`` -> logits ``(B, K)``, with ``bounds``, ``domain`` and ``classes``.
            images: ``(B, C, H, W)`` float in ``[0, 1]``.
            labels: ``(B,)`` int64, the class to leave.
            norm: the norm to minimise.
            seeds: ``(B,)`` int64, one seed per image for random draws.
            start: ``(B, C, H, W)`` finite points, such as earlier witnesses, for estimators that can start from
                one. They need not be witnesses; the image itself means that there is no start.

        Returns:
            ``(B, C, H, W)``, same dtype; a failed row may hold any values.
        """


class Settings:
    """Base of the built-in estimators: keyword-only dataclass fields are the hyperparameters and are checked.

    A field's ``metadata["least"]`` is its smallest allowed value. ``revision`` is raised with every change of the
    numbers that the same parameters give.
    """

    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, least = getattr(self, field.name), field.metadata.get("least")
            kind = hints[field.name]
            right = isinstance(value, (int, float) if kind is float else kind) and (
                kind is bool or not isinstance(value, bool)
            )
            if not right or (least is not None and not value >= least):
                limit = "" if least is None else f" of at least {least}"
                raise EstimatorError(
                    f"expected {field.name} to be {_noun(kind)}{limit}, got {value!r}; the default is {field.default!r}"
                )


def revision_of(method: object) -> int:
    """The revision of an estimator or certifier; 1 if it does not state one."""
    return int(getattr(method, "revision", 1))


def setting(default: Any, least: float | None = None) -> Any:
    """A dataclass field for a hyperparameter, with its default and its smallest allowed value."""
    return dataclasses.field(default=default, metadata={"least": least})


def _noun(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a word"}.get(kind, str(kind))


@dataclass(frozen=True)
class Margins:
    """The result of `measure`, one entry per image.

    Attributes:
        distance: ``(B,)`` float64, pixel units: norm of the perturbation to the refined, re-classified witness; 0 for
            ``tied``; inf for ``not_found`` and ``failed``.
        attack_distance: ``(B,)`` float64: the distance of the witness as the attack left it (clipped into the domain).
        witness: ``(B, C, H, W)`` refined witnesses; the image itself without a witness.
        status: one `Status` per image.
        target: ``(B,)`` int64, the witness's class; -1 without a witness.
        message: the error that a library raised for a ``failed`` row; the estimator's note on a found row, such as the
            winning member of ``best``; else empty.
        prediction: ``(B,)`` int64, the predicted class, to whose boundary the margin is the distance.
        confidence: ``(B,)`` float64, softmax of the prediction.
        logit_margin: ``(B,)`` float64, predicted minus runner-up logit.
        basins: ``(B,)`` float64, how far independent searches of the estimator disagree, at least 1: for ``cascade``
            the distance after its walks over that at the end, for ``best`` the distance of the second nearest member
            over that of the nearest. NaN without a witness and for estimators that search once.
        noise_retries: ``(B,)`` int64, number of restarts from noisy images.
        forwards, backwards: ``(B,)`` float64, passes spent on the image.
    """

    distance: Tensor
    attack_distance: Tensor
    witness: Tensor
    status: tuple[Status, ...]
    target: Tensor
    message: tuple[str, ...]
    prediction: Tensor
    confidence: Tensor
    logit_margin: Tensor
    basins: Tensor
    noise_retries: Tensor
    forwards: Tensor
    backwards: Tensor
