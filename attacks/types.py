"""Norms, domains, pixel bounds and errors. No torch: the command line imports this for ``--help``."""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["l2", "linf"]
Domain = Literal["box", "free"]
# of pixels: the least and the largest value
Bounds = tuple[float, float]
NORMS: tuple[Norm, ...] = get_args(Norm)
DOMAINS: tuple[Domain, ...] = get_args(Domain)
BOTH_NORMS: frozenset[Norm] = frozenset(NORMS)
L2_ONLY: frozenset[Norm] = frozenset({"l2"})
BOTH_DOMAINS: frozenset[Domain] = frozenset(DOMAINS)
BOX_ONLY: frozenset[Domain] = frozenset({"box"})


class InputError(ValueError):
    """Images, labels or a model that cannot be measured; the message says what to do."""


class EstimatorError(ValueError):
    """An estimator that does not exist, cannot do what is asked, or breaks the contract."""


class UnsoundError(RuntimeError):
    """A point of another class nearer than a proved lower bound: what proved it is wrong, and no result is given."""
