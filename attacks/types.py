"""Norms, domains, pixel bounds and errors.

No torch: the command line imports this for ``--help``.
"""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["l2", "linf"]
Domain = Literal["box", "free"]
# the smallest and the largest pixel value
Bounds = tuple[float, float]
NORMS: tuple[Norm, ...] = get_args(Norm)
DOMAINS: tuple[Domain, ...] = get_args(Domain)
BOTH_NORMS: frozenset[Norm] = frozenset(NORMS)
L2_ONLY: frozenset[Norm] = frozenset({"l2"})
BOTH_DOMAINS: frozenset[Domain] = frozenset(DOMAINS)
BOX_ONLY: frozenset[Domain] = frozenset({"box"})
# noisy restarts of an image on which an estimator failed, unless the caller says otherwise
NOISE_RETRIES = 6


def one_line(error: BaseException, *, kind: bool = True, most: int | None = None) -> str:
    """An exception's message on one line, after the name of its class if ``kind``.

    Args:
        most: cut the message to this many characters.
    """
    message = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}: {message}" if kind else message


class InputError(ValueError):
    """Images, labels, arguments or a model that cannot be measured; the message says what to do."""


class EstimatorError(ValueError):
    """An estimator that does not exist, cannot do what is asked, or violates the contract."""


class UnsoundError(RuntimeError):
    """A point of another class lies nearer than a proved lower bound: the proof is wrong, and no result is returned."""
