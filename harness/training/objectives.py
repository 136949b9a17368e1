"""Training objectives: losses, adversarial training (PGD, TRADES) and augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from harness.config.run_config import AUGMENTATIONS, TRAININGS
from harness.models.build import eval_mode

Loss = Callable[[Tensor, Tensor], Tensor]

# largest shift of an augmented image, as a fraction of its side: 4 pixels of 32
SHIFT = 1 / 8
# standard deviation of the start of TRADES' attack; at the image itself the gradient is 0
TRADES_START = 1e-3


def _hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-class hinge loss of Crammer & Singer, 2001: ``max(0, 1 + max_{j != y} z_j - z_y)``."""
    column = labels[:, None]
    true = logits.gather(1, column).squeeze(1)
    others = logits.scatter(1, column, -torch.inf).amax(1)
    return (1 + others - true).clamp_min(0)


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over classes of the squared difference to one-hot labels (Hui & Belkin, 2021, arXiv 2006.07322)."""
    return (logits - functional.one_hot(labels, logits.shape[1])).square().mean(1)


_LOSSES: Mapping[str, Loss] = {
    "cross-entropy": partial(functional.cross_entropy, reduction="none"),
    # 0.1 as in Szegedy et al., 2016, https://arxiv.org/abs/1512.00567, section 7
    "label-smoothing": partial(functional.cross_entropy, reduction="none", label_smoothing=0.1),
    "hinge": _hinge,
    "squared-error": _squared_error,
}

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "adam": Adam,
    "sgd": partial(SGD, momentum=0.9),
    "adamw": AdamW,
}


def loss_function(name: str) -> Loss:
    """The named loss: maps ``(B, K)`` logits and ``(B,)`` int64 labels to ``(B,)``, one value per image.

    Raises:
        ValueError: unknown name.
    """
    _require_one_of("loss", name, _LOSSES)
    return _LOSSES[name]


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training; with the initial network, the images and the number of epochs they determine it.

    The ``pgd_*`` fields apply to ``pgd`` and ``trades`` training only, ``trades_beta`` to ``trades``, ``noise_sigma``
    to ``gaussian``. ``binary``: the model returns one logit per image (see `attacks.isolation.outputs.as_logits`).

    Raises:
        ValueError: an unknown name, a size below 1 or a negative number.
    """

    training: str = "standard"
    loss: str = "cross-entropy"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 128
    pgd_epsilon: float = 0.3
    pgd_steps: int = 10
    pgd_step_size: float = 0.075
    pgd_norm: str = "linf"
    trades_beta: float = 6.0
    noise_sigma: float = 0.25
    augment: str = "none"
    binary: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require_one_of("training", self.training, TRAININGS)
        _require_one_of("loss", self.loss, _LOSSES)
        _require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        _require_one_of("pgd_norm", self.pgd_norm, tuple(_BALLS))
        _require_one_of("augment", self.augment, AUGMENTATIONS)
        for name, value in vars(self).items():
            least = 1 if name in ("batch_size", "pgd_steps") else 0
            if not isinstance(value, str) and not value >= least:
                raise ValueError(f"expected {name} of at least {least}, got {value}; choose a larger one")


def augmented(images: Tensor, how: str, draws: torch.Generator) -> Tensor:
    """Shift images by up to an eighth of their side, padded with zeros; ``flip`` also mirrors half of them.

    Args:
        images: ``(B, C, H, W)``.
        how: one of `harness.config.run_config.AUGMENTATIONS`.
        draws: CPU generator of shifts and mirrorings.

    Returns:
        ``(B, C, H, W)``.
    """
    if how == "none":
        return images
    count, _, height, width = images.shape
    pads = max(1, round(SHIFT * height)), max(1, round(SHIFT * width))
    padded = functional.pad(images, (pads[1], pads[1], pads[0], pads[0]))
    tops, lefts = (torch.randint(2 * pad + 1, (count,), generator=draws) for pad in pads)
    rows = (tops[:, None] + torch.arange(height)).to(images.device)
    columns = lefts[:, None] + torch.arange(width)
    if how == "flip":
        mirrored = torch.rand(count, generator=draws) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    columns = columns.to(images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class _Box:
    """The L-infinity ball of PGD: signed steps (Madry et al., 2018, https://arxiv.org/abs/1706.06083, section 2.1)."""

    @staticmethod
    def start(images: Tensor, epsilon: float, draws: torch.Generator) -> Tensor:
        offsets = (2 * torch.rand(images.shape, generator=draws) - 1) * epsilon
        return offsets.to(images.device)

    @staticmethod
    def step(gradient: Tensor) -> Tensor:
        return gradient.sign()

    @staticmethod
    def project(points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        return points.clamp((images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1))


class _Ball:
    """The L2 ball: normalised steps; projection onto the ball, then clipping to [0, 1], which stays in the ball."""

    @staticmethod
    def start(images: Tensor, epsilon: float, draws: torch.Generator) -> Tensor:
        # uniform in the ball
        direction = torch.randn(images.shape, generator=draws)
        radius = torch.rand(len(images), generator=draws) ** (1 / max(1, images[0].numel()))
        return (epsilon * _per_image(radius / direction.flatten(1).norm(dim=1)) * direction).to(images.device)

    @staticmethod
    def step(gradient: Tensor) -> Tensor:
        return gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp_min(1e-12))

    @staticmethod
    def project(points: Tensor, images: Tensor, epsilon: float) -> Tensor:
        perturbation = points - images
        shrink = (epsilon / perturbation.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
        return (images + _per_image(shrink) * perturbation).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


_BALLS: Mapping[str, type[_Box] | type[_Ball]] = {"linf": _Box, "l2": _Ball}


def pgd(model: nn.Module, images: Tensor, labels: Tensor, options: TrainingOptions, draws: torch.Generator) -> Tensor:
    """Maximise the cross-entropy within a ball by projected gradient steps, from a uniform random start.

    Madry et al., 2018, https://arxiv.org/abs/1706.06083, section 2.1.

    Args:
        model: in any mode; its training flags, buffers and ``param.grad`` are not changed.
        images: ``(B, C, H, W)`` float32 in ``[0, 1]``.
        labels: ``(B,)`` int64, the true labels.
        options: ``pgd_norm``, ``pgd_epsilon``, ``pgd_steps`` and ``pgd_step_size`` are used.
        draws: CPU generator of the starting points.

    Returns:
        ``(B, C, H, W)`` float32 in ``[0, 1]``, within ``pgd_epsilon`` of ``images``.
    """
    start = images + _BALLS[options.pgd_norm].start(images, options.pgd_epsilon, draws)

    def loss(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")

    return _ascend(model, images, start, loss, options)


def trades_loss(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, options: TrainingOptions, draws: torch.Generator
) -> Tensor:
    """TRADES: the loss of the images plus ``beta`` times the divergence between clean and attacked output.

    Zhang et al., 2019, https://arxiv.org/abs/1901.08573, eq. 5. The divergence is ``KL(f(x) || f(x'))``, where PGD
    finds ``x'`` by maximising it.

    Args:
        model: in training mode.
        images: ``(B, C, H, W)`` float32 in ``[0, 1]``.
        labels: ``(B,)`` int64.
        loss: per image (see `loss_function`).
        options: the ``pgd_*`` fields and ``trades_beta`` are used.
        draws: CPU generator of the starting points.

    Returns:
        The scalar to minimise.
    """
    with eval_mode(model), torch.no_grad():
        clean = model(images).softmax(1)

    def divergence(logits: Tensor) -> Tensor:
        return functional.kl_div(logits.log_softmax(1), clean, reduction="sum")

    start = images + TRADES_START * torch.randn(images.shape, generator=draws).to(images.device)
    attacked = _ascend(model, images, start, divergence, options).detach()
    logits = model(images)
    robust = functional.kl_div(model(attacked).log_softmax(1), logits.softmax(1), reduction="batchmean")
    return loss(logits, labels).mean() + options.trades_beta * robust


def _ascend(
    model: nn.Module, images: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], options: TrainingOptions
) -> Tensor:
    """Projected gradient ascent on ``loss`` from ``start``."""
    ball = _BALLS[options.pgd_norm]
    points = ball.project(start, images, options.pgd_epsilon)
    # eval mode: in training mode, forward passes would move batch norm's running statistics towards the attack's
    # iterates, and dropout would attack a different network at each step
    with eval_mode(model), torch.enable_grad():
        for _ in range(options.pgd_steps):
            points.requires_grad_(True)
            # not backward(), which would write the parameters' gradients
            (gradient,) = torch.autograd.grad(loss(model(points)), points)
            moved = points.detach() + options.pgd_step_size * ball.step(gradient)
            points = ball.project(moved, images, options.pgd_epsilon)
    return points


def _require_one_of(kind: str, name: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"expected {kind} of {', '.join(known)}, got {name!r}; choose one of them")
