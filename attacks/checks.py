"""Refuse what cannot be measured, in one line that says what to do, before an attack makes less sense of it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from attacks.estimator import Domain, Estimator, EstimatorError, InputError, Norm
from attacks.isolation import Bounds, Classifier

PROBABILITIES = (
    "the model's outputs are probabilities, not logits: their gradients vanish where it is sure, and DeepFool and "
    "other gradient methods go too far or find nothing; leave its softmax out"
)


class ProbabilityWarning(UserWarning):
    """The model ends in a softmax."""


def are_probabilities(outputs: Tensor) -> bool:
    """Whether all rows ``(B, K)`` are at least 0 and sum to 1: logits of a model that ends in a softmax."""
    return bool((outputs >= 0).all() and ((outputs.double().sum(1) - 1).abs() < 1e-2).all())


def check_images(images: Tensor, pixel_bounds: Bounds) -> None:
    """Refuse images that no estimator could measure.

    Raises:
        InputError: not ``(B, C, H, W)`` floating, not finite, or outside ``pixel_bounds``.
    """
    low, high = pixel_bounds
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise InputError(
            f"expected images of shape (B, C, H, W) in floating point, got {tuple(images.shape)} {images.dtype}; "
            "reshape or convert them"
        )
    if not images.isfinite().all():
        raise InputError("expected finite images, got NaN or inf; clean the data")
    least, most = images.min().item(), images.max().item()
    # a bound such as (1 - 0.1307) / 0.3081 is not exact in the images' dtype
    slack = 4 * torch.finfo(images.dtype).eps * max(abs(low), abs(high))
    if least < low - slack or most > high + slack:
        raise InputError(
            f"expected images in [{low:g}, {high:g}], got [{least:.4g}, {most:.4g}]; "
            "undo a Normalize transform, put it inside the model, or pass the right bounds"
        )


def check_batches(batch_size: int, noise_retries: int) -> None:
    """Refuse counts that are too small.

    Raises:
        InputError: names them.
    """
    if batch_size < 1 or noise_retries < 0:
        raise InputError(
            f"expected batch_size of at least 1 and noise_retries of at least 0, got {batch_size} and {noise_retries}; "
            "raise what is too small"
        )


def check_ability(estimator: Estimator, norm: Norm, domain: Domain) -> None:
    """Refuse a norm or domain that the estimator lacks.

    Raises:
        EstimatorError: says what it has.
    """
    for asked, able, kind in ((norm, estimator.norms, "norm"), (domain, estimator.domains, "domain")):
        if asked not in able:
            raise EstimatorError(
                f"expected a {kind} that {estimator.name} has ({', '.join(sorted(able))}), got {asked}; "
                "choose one of them or another estimator"
            )


def clean_logits(view: Classifier, images: Tensor) -> Tensor:
    """The model's logits ``(B, K)`` float64 of the clean images; sets ``view.classes``.

    Raises:
        InputError: the model refuses the images, or its output is no finite row of logits an image.
    """
    try:
        logits = view.classify(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"expected a model that takes images of shape {tuple(images.shape)}, {images.dtype} on {images.device}, "
            f"got {type(error).__name__}: {first}; give it the images' shape, dtype and device"
        ) from error
    right = isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[0] == len(images) and logits.shape[1] >= 2
    if not right or logits.device != images.device:
        got = f"{tuple(logits.shape)} on {logits.device}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"expected a model output of shape ({len(images)}, classes) with at least 2 classes on {images.device}, "
            f"got {got}; return one row of logits an image"
        )
    logits = logits.double()
    bad = int((~logits.isfinite().all(1)).sum())
    if bad:
        raise InputError(
            f"expected finite logits, got NaN or inf for {bad} of {len(images)} images; "
            "check the weights (did training diverge?)"
        )
    if are_probabilities(logits):
        warnings.warn(PROBABILITIES, ProbabilityWarning, stacklevel=2)
    view.classes = logits.shape[1]
    return logits
