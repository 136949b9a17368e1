"""Refuse what cannot be measured, in one line that says what to do, before an attack makes less sense of it."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.estimator import Domain, Estimator, EstimatorError, InputError, Norm
from attacks.isolation import Bounds, Classifier
from attacks.outputs import check_rows

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
# of the images, how many a model is looked at with before it is measured
FEW = 4
# by how many epsilons of their size logits may differ in two passes, and by what part of it at most
EPSILONS, MOST = 100, 0.1
# of TF32, in which a GPU's convolutions may compute: batches of another size go through other kernels
TF32 = 2**-10


class ModelWarning(UserWarning):
    """What a model is like that spoils its margins."""


class ProbabilityWarning(ModelWarning):
    """The model ends in a softmax."""


class BatchWarning(ModelWarning):
    """An image's logits depend on the other images of its batch."""


class GradientWarning(ModelWarning):
    """The logits have no gradient with respect to the images."""


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


def check_draws(expect_over: int) -> None:
    """Refuse a number of draws that is none.

    Raises:
        InputError: says what it is.
    """
    if type(expect_over) is not int or expect_over < 1:
        raise InputError(f"expected expect_over as an integer of at least 1, got {expect_over!r}; give 1 for one pass")


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
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"expected a model that takes images of shape {tuple(images.shape)}, {images.dtype} on {images.device}, "
            f"got {type(error).__name__}: {first}; give it the images' shape, dtype and device"
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


def check_model(view: Classifier, images: Tensor) -> list[ModelWarning]:
    """Refuse a model that is no fixed function of the image, by a few passes; return what else spoils its margins.

    Sets ``view.classes``, but for a model that `clean_logits` refuses: that is left to whoever passes all images.

    Args:
        images: in the model's own bounds; the first `FEW` are looked at.

    Raises:
        InputError: the model's logits of the same images differ, or it takes no single image.
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
            "measure what is expected of it with expect_over=N (--expect-over N), or leave out what draws at random"
            if view.draws == 1
            else "let all that it draws come from the global generators, which are seeded before every pass"
        )
        raise InputError(
            f"expected the same logits of the same images, got others in a second pass (by up to {differ:.3g}, of "
            f"{size:.3g}); {advice}"
        )
    told: list[ModelWarning] = []
    if are_probabilities(logits if view.draws == 1 else view.drawn(few)):
        told.append(ProbabilityWarning(PROBABILITIES))
    in_batches = epsilon if few.device.type == "cpu" else max(epsilon, TF32)
    if _depends_on_batch(view, few, logits, _slack(in_batches) * size):
        told.append(BatchWarning(BATCHES))
    if not any(_has_gradient(view, image) for image in torch.split(few, 1)):
        told.append(GradientWarning(NO_GRADIENT))
    view.settle()
    return told


def _slack(epsilon: float) -> float:
    return min(EPSILONS * epsilon, MOST)


def _depends_on_batch(view: Classifier, images: Tensor, logits: Tensor, slack: Tensor) -> bool:
    try:
        alone = torch.cat([view.classify(image) for image in torch.split(images, 1)])
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"expected a model that takes an image alone, got {type(error).__name__}: {first}; put its batch norm into "
            "evaluation mode, or measure what is expected of it with expect_over=N (--expect-over N)"
        ) from error
    return bool((alone.double() - logits).abs().amax() > slack)


def _has_gradient(view: Classifier, image: Tensor) -> bool:
    """Whether the logits' gradient at the image ``(1, ...)`` is not 0; also where none can be taken."""
    leaf = image.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            logits = view.logits(leaf.clone())
            if not logits.requires_grad:
                return False
            # all logits with different weights, as each row may add up to the same
            weights = torch.arange(1, 1 + logits.shape[1], device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
    except (RuntimeError, ValueError):  # estimators will say of every image what it is
        return True
    return gradient is not None and bool(gradient.any())
