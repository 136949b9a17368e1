"""Checks of images, models and estimators before measuring, with one-line errors and warnings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from attacks.arguments import plain_bounds, shown
from attacks.estimator import Estimator
from attacks.isolation import Classifier
from attacks.isolation.outputs import check_rows
from attacks.isolation.unwrapping import check_whole
from attacks.types import Bounds, Domain, EstimatorError, InputError, Norm

PROBABILITIES = (
    "the model's outputs are probabilities, not logits: their gradients vanish where it is sure, and DeepFool and "
    "other gradient methods go too far or find nothing; leave its softmax out"
)
BATCHES = (
    "the model's logits of an image depend on the other images of its batch, and so do its margins; leave out what "
    "mixes images, such as batch norm in training mode"
)
NO_GRADIENT = (
    "the model's logits have no gradient with respect to the images that were looked at: estimators that follow it go "
    "too far or find nothing; leave out what has none, such as rounding"
)
# number of images with which a model is checked before measuring
FEW = 4
# largest relative difference of logits in two passes, in units of the dtype's epsilon and in all
EPSILONS, MOST = 100, 0.1
# epsilon of TF32, in which a GPU's convolutions may compute: batches of other sizes use other kernels
TF32 = 2**-10


class ModelWarning(UserWarning):
    """A property of the model that makes its margins unreliable."""


class ProbabilityWarning(ModelWarning):
    """The model ends in a softmax."""


class BatchWarning(ModelWarning):
    """An image's logits depend on the other images of its batch."""


class GradientWarning(ModelWarning):
    """The logits have no gradient with respect to the images."""


def are_probabilities(outputs: Tensor) -> bool:
    """Whether all rows ``(B, K)`` are non-negative and sum to 1, as those of a model that ends in a softmax."""
    return bool((outputs >= 0).all() and ((outputs.double().sum(1) - 1).abs() < 1e-2).all())


def check_images(images: Tensor, pixel_bounds: Bounds) -> None:
    """Refuse images that cannot be measured.

    Raises:
        InputError: not a floating-point tensor ``(B, C, H, W)``, not finite, or outside ``pixel_bounds``.
    """
    low, high = plain_bounds(pixel_bounds)
    if not isinstance(images, Tensor) or images.layout != torch.strided or images.is_meta:
        kind = f"{images.layout} on {images.device}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"expected images as a dense tensor with values, got {kind}; convert them")
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


def check_ability(estimator: Estimator, norm: Norm, domain: Domain) -> None:
    """Refuse a norm or domain that the estimator does not support.

    Raises:
        EstimatorError: lists the supported ones.
    """
    for asked, able, kind in ((norm, estimator.norms, "norm"), (domain, estimator.domains, "domain")):
        if asked not in tuple(able):
            raise EstimatorError(
                f"expected a {kind} that {estimator.name} has ({', '.join(sorted(able))}), got {asked}; "
                "choose one of them or another estimator"
            )


def look_channels_last(images: Tensor) -> bool:
    """Whether images look like ``(B, H, W, C)``: the last axis has three channels, or one after a square image."""
    rows, columns, channels = images.shape[1:]
    return rows > 3 and (channels == 3 or (channels == 1 and rows == columns))


def clean_logits(view: Classifier, images: Tensor) -> Tensor:
    """The model's logits ``(B, K)`` float64 of the clean images; sets ``view.classes``.

    Raises:
        InputError: the model raises an error for the images, or does not return one finite row of logits per image.
    """
    try:
        logits = view.classify(images)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        advice = "; they look like (B, H, W, C): permute(0, 3, 1, 2)" if look_channels_last(images) else ""
        raise InputError(
            f"expected a model that takes images of shape {tuple(images.shape)}, {images.dtype} on {images.device}, "
            f"got {type(error).__name__}: {first}; give it the images' shape, dtype and device{advice}"
        ) from error
    check_rows(logits, len(images), images.device, view.binary)
    logits = logits.double()
    bad = int((~logits.isfinite().all(1)).sum())
    if bad:
        raise InputError(
            f"expected finite logits, got NaN or inf for {bad} of {len(images)} images; "
            "check the weights (did training diverge?)"
        )
    view.classes = logits.shape[1]
    return logits


def check_module(model: object) -> None:
    """Refuse values that are not a network with all of its weights.

    Raises:
        InputError: names the type, or the weight.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"expected a model that is a torch.nn.Module, got {got}; make one, or wrap it in one")
    check_whole(model)


def check_points(what: str, points: object, images: Tensor) -> None:
    """Refuse points that are not one per image.

    Raises:
        InputError: not a tensor of the images' shape.
    """
    got = tuple(points.shape) if isinstance(points, Tensor) else shown(points)
    if got != tuple(images.shape):
        raise InputError(
            f"expected {what} of shape {tuple(images.shape)}, got {got}; give a tensor, one point per image"
        )


def check_pool(pool: object, images: Tensor, bounds: Bounds) -> None:
    """Refuse a pool of images that are not like those to measure; it may be empty, or on another device.

    Raises:
        InputError: no tensor, another shape or dtype than the images', or values out of bounds.
    """
    wanted = f"images {tuple(images.shape[1:])} of {images.dtype}"
    if not isinstance(pool, Tensor) or pool.ndim != images.ndim:
        got = f"shape {tuple(pool.shape)}" if isinstance(pool, Tensor) else shown(pool)
        raise InputError(f"expected a pool as a tensor of {wanted}, got {got}; give images like those to measure")
    if pool.shape[1:] != images.shape[1:] or pool.dtype is not images.dtype:
        got = f"images {tuple(pool.shape[1:])} of {pool.dtype}"
        raise InputError(f"expected a pool of {wanted}, got {got}; give images like those to measure")
    if len(pool):
        check_images(pool, bounds)


def plain_seeds(seeds: Any, count: int) -> Tensor:
    """Seeds as a tensor ``(count,)`` int64.

    Raises:
        InputError: another number of seeds, or values that are not 64-bit integers.
    """
    try:
        numbers = [operator.index(seed) for seed in (seeds.tolist() if isinstance(seeds, Tensor) else seeds)]
        plain = torch.tensor(numbers, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(
            f"expected seeds as 64-bit integers, got {shown(seeds)}; give one whole number per image"
        ) from None
    if len(plain) != count:
        raise InputError(f"expected {count} seeds, got shape ({len(plain)},); give one per image")
    return plain


def check_model(view: Classifier, images: Tensor) -> list[ModelWarning]:
    """Refuse a model that is not a fixed function of the image; return warnings about other properties.

    Makes a few passes. Sets ``view.classes``, except for a model that `clean_logits` refuses: the error is left to the
    pass of all images.

    Args:
        images: in the model's own bounds; the first `FEW` are used.

    Raises:
        InputError: the model's logits of the same images differ, or it does not accept a single image.
    """
    few = images[:FEW]
    view.start_chunk(len(few))
    try:
        logits, again = clean_logits(view, few), clean_logits(view, few)
    except InputError:
        return []
    size = logits.abs().amax()
    epsilon = torch.finfo(view.precision).eps
    differ = (again - logits).abs().amax()
    if differ > _slack(epsilon) * size:
        advice = (
            "measure its average over N draws with expect_over=N (--expect-over N), or leave out what draws at random"
            if view.draws == 1
            else "draw only from the global generators, which are seeded before every pass"
        )
        raise InputError(
            f"expected the same logits of the same images, got others in a second pass (by up to {differ:.3g}, of "
            f"{size:.3g}); {advice}"
        )
    warnings: list[ModelWarning] = []
    if are_probabilities(logits if view.draws == 1 else view.drawn(few)):
        warnings.append(ProbabilityWarning(PROBABILITIES))
    in_batches = epsilon if few.device.type == "cpu" else max(epsilon, TF32)
    if _depends_on_batch(view, few, logits, _slack(in_batches) * size):
        warnings.append(BatchWarning(BATCHES))
    if not any(_has_gradient(view, image) for image in torch.split(few, 1)):
        warnings.append(GradientWarning(NO_GRADIENT))
    view.settle()
    return warnings


def _slack(epsilon: float) -> float:
    return min(EPSILONS * epsilon, MOST)


def _depends_on_batch(view: Classifier, images: Tensor, logits: Tensor, slack: Tensor) -> bool:
    try:
        alone = torch.cat([view.classify(image) for image in torch.split(images, 1)])
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"expected a model that takes a single image, got {type(error).__name__}: {first}; put its batch norm into "
            "evaluation mode, or measure its average over N draws with expect_over=N (--expect-over N)"
        ) from error
    return bool((alone.double() - logits).abs().amax() > slack)


def _has_gradient(view: Classifier, image: Tensor) -> bool:
    """Whether the logits' gradient at the image ``(1, ...)`` is not 0; true if computing it raises an error."""
    leaf = image.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            logits = view.logits(leaf.clone())
            if not logits.requires_grad:
                return False
            # different weights, as the logits of every row may have the same sum
            weights = torch.arange(1, 1 + logits.shape[1], device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
    except (RuntimeError, ValueError):  # estimators report the error per image
        return True
    return gradient is not None and bool(gradient.any())
