"""The contract between margin estimators, the judge that runs them and the records they give.

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
    """What became of an image. Only ``found``, ``found_after_noise`` and ``tied`` carry a distance."""

    FOUND = "found"
    FOUND_AFTER_NOISE = "found_after_noise"
    TIED = "tied"
    NOT_FOUND = "not_found"
    FAILED = "failed"


class Estimator(Protocol):
    """Anything that proposes witnesses: points that may be classified differently from the image.

    Estimators never judge themselves: `attacks.measure` alone clips, re-classifies, retries,
    refines and computes distances. One that has a setting ``warm``, 0 by default, and says in a class attribute
    ``WARM`` what it should be, is started from the witnesses of the epoch before where it is not 0.

    One whose numbers have changed since it was first released says so in a class attribute ``revision``, an integer
    that is 1 by default: a run does not mix margins of two revisions.
    """

    @property
    def name(self) -> str:
        """The registry's name."""

    @property
    def norms(self) -> frozenset[Norm]:
        """Norms whose distance the estimator makes small."""

    @property
    def domains(self) -> frozenset[Domain]:
        """``box``: witnesses inside the pixel bounds; ``free``: anywhere."""

    @property
    def tightness(self) -> Mapping[Norm, float]:
        """Declared median of distance / exact margin on affine models (held to it by the tests)."""

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
        """Propose one witness an image.

        Args:
            model: frozen view; logits ``(B, K)`` of ``(B, C, H, W)``; carries ``bounds``, ``domain``, ``classes``.
            images: ``(B, C, H, W)`` float in ``[0, 1]``.
            labels: ``(B,)`` int64, the class to leave.
            norm: the norm to keep small.
            seeds: ``(B,)`` int64, the images' own seeds for random draws.
            start: ``(B, C, H, W)`` finite points, such as earlier witnesses, for estimators that can start from
                one; they need not be witnesses, and the image itself stands where there is none.

        Returns:
            ``(B, C, H, W)``, same dtype; a row may fail by holding anything.
        """


class Settings:
    """Base of our estimators: keyword-only dataclass fields are the hyperparameters and are checked.

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
    """How often the numbers of an estimator or certifier have changed, from 1; also of one that does not say."""
    return int(getattr(method, "revision", 1))


def setting(default: Any, least: float | None = None) -> Any:
    """A hyperparameter's dataclass field: its default and its smallest allowed value."""
    return dataclasses.field(default=default, metadata={"least": least})


def _noun(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a word"}.get(kind, str(kind))


@dataclass(frozen=True)
class Margins:
    """What `measure` found, one entry an image.

    Attributes:
        distance: ``(B,)`` float64, pixel units: the refined, re-classified witness's norm; 0 for
            ``tied``; inf for ``not_found`` and ``failed``.
        attack_distance: ``(B,)`` float64: the norm of the witness as the attack left it (clipped into the domain).
        witness: ``(B, C, H, W)`` refined witnesses; the image itself where there is none.
        status: one `Status` an image.
        target: ``(B,)`` int64, the witness's class; -1 without one.
        message: what a library raised for a ``failed`` row; what the estimator noted of a found one, as ``best``
            does its winner; else empty.
        prediction: ``(B,)`` int64, the class that the margin is taken from.
        confidence: ``(B,)`` float64, softmax of the prediction.
        logit_margin: ``(B,)`` float64, predicted minus runner-up logit.
        noise_retries: ``(B,)`` int64, noisy restarts that were needed.
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
    noise_retries: Tensor
    forwards: Tensor
    backwards: Tensor
