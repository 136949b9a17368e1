"""Attacks with a fixed radius, run on a ladder of radii, and checks of their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attacks.geometry import farthest_in_box
from attacks.isolation import Classifier
from attacks.types import EstimatorError, Norm

LADDER = 10


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
