"""A ladder of radii for attacks with a fixed radius, and checks of a library's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attacks.geometry import farthest_in_box
from attacks.isolation import Classifier
from attacks.search.linearised import left_class
from attacks.types import EstimatorError, Norm

LADDER = 10


def check_values(attack: str, values: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    """Refuse values whose type differs from that of the library's default, if there is a default.

    Raises:
        EstimatorError: names the parameter, its type and default.
    """
    for key, value in values.items():
        default = accepted[key].default if key in accepted else None
        if default is None or default is inspect.Parameter.empty or value is None:
            continue
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(value) not in kinds:
            raise EstimatorError(
                f"expected {attack}'s {key} to be of type {type(default).__name__} (default {default}), "
                f"got {value!r}; give a value of that type"
            )


def climb_ladder(
    attempt: Callable[[Tensor, float], Tensor], model: Classifier, images: Tensor, labels: Tensor, norm: Norm
) -> Tensor:
    """Run a fixed-radius attack with radii that double up to the size of the box; rows leave at their first success.

    Args:
        attempt: (rows ``(A,)``, radius) -> candidates ``(A, ...)``. The radius is one number, as the libraries require.

    Returns:
        ``(B, ...)``: the candidate of each row's first success, or the image itself.
    """
    result, pending = images.clone(), torch.arange(len(images), device=images.device)
    largest = float(farthest_in_box(images, norm).max())
    for rung in range(LADDER):
        with model.rows(pending):
            candidates = attempt(pending, largest * 2.0 ** (rung + 1 - LADDER))
            with torch.no_grad():
                moved = left_class(model(candidates), labels[pending])
        result[pending[moved]] = candidates[moved]
        pending = pending[~moved]
        if not len(pending):
            break
    return result
