"""The built-in certifiers: ``crown``, ``ibp`` and ``exact``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.arguments import check_choice, plain_bounds, shown
from attacks.certifier import Certificates as Certificates
from attacks.certifier import Certifier as Certifier
from attacks.certify.lower import Effort, certified_radii
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.network.reading import rounding_of
from attacks.checks import check_images, check_module
from attacks.estimator import Settings, setting
from attacks.geometry import farthest_in_box
from attacks.isolation.outputs import as_logits
from attacks.types import BOTH_DOMAINS, BOTH_NORMS, DOMAINS, NORMS, Domain, InputError, Norm

# radii are tried up to this fraction beyond the witness's distance
BEYOND = 0.01
# entries of the functionals of one batch; larger batches are not faster
BATCH = 2**22


class Relaxing(Settings):
    """A certifier by linear relaxation; see `attacks.certify.crown` and `attacks.certify.lower`."""

    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS
    # 2: reads the operations that a model carries out, with an allowance for rounding in its own dtype
    revision: ClassVar[int] = 2

    @property
    def effort(self) -> Effort:
        """Settings of the search for radii."""
        raise NotImplementedError

    def certify(
        self,
        model: nn.Module,
        images: Tensor,
        norm: Norm,
        *,
        domain: Domain,
        upper: Tensor,
        bounds: tuple[float, float] = (0.0, 1.0),
        start: Tensor | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Certificates:
        """See `Certifier`."""
        return _certify(self.effort, model, images, norm, domain, upper, bounds, start, on_progress)


@dataclass(frozen=True, kw_only=True)
class Crown(Relaxing):
    """CROWN: linear relaxation of every nonlinearity (Zhang et al. 2018). The fields are those of `Effort`."""

    evaluations: int = setting(4, 1)
    first: float = setting(0.5, 0.0)
    rounds: int = setting(2, 0)
    cuts: int = setting(2, 0)
    alpha: int = setting(0, 0)

    name: ClassVar[str] = "crown"

    @property
    def effort(self) -> Effort:
        """See `Relaxing`."""
        return Effort("crown", self.evaluations, self.first, self.rounds, self.cuts, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class IBP(Relaxing):
    """CROWN-IBP: interval bounds inside, lines in the last backward pass only (Zhang et al. 2020). Fast and loose."""

    evaluations: int = setting(8, 1)
    first: float = setting(0.3, 0.0)

    name: ClassVar[str] = "ibp"

    @property
    def effort(self) -> Effort:
        """See `Relaxing`."""
        return Effort("ibp", self.evaluations, self.first, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Exact(Settings):
    """Branch and bound, starting from the bounds of `Crown`, with a budget per image; see `attacks.certify.exact`."""

    seconds: float = setting(1.0, 0.0)
    nodes: int = setting(100_000, 1)

    name: ClassVar[str] = "exact"
    revision: ClassVar[int] = 2
    norms: ClassVar[frozenset[Norm]] = BOTH_NORMS
    domains: ClassVar[frozenset[Domain]] = BOTH_DOMAINS

    def certify(
        self,
        model: nn.Module,
        images: Tensor,
        norm: Norm,
        *,
        domain: Domain,
        upper: Tensor,
        bounds: tuple[float, float] = (0.0, 1.0),
        start: Tensor | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Certificates:
        """See `Certifier`; the lower bound is the larger of CROWN's and the search's."""
        from attacks.certify.exact import exact_margins

        first = _certify(Crown(rounds=6, cuts=4).effort, model, images, norm, domain, upper, bounds, start, None)
        lower, solved = first.lower.clone(), first.solved.clone()
        for row in torch.nonzero(~solved).flatten().tolist():
            image = images[row : row + 1]
            lowered = _Lowered(model, int(first.label[row]), float(first.doubt[row]))
            exact = exact_margins(
                lowered, image, norm, domain=domain, bounds=bounds, gap=1e-5, nodes=self.nodes, seconds=self.seconds
            )
            # nothing is proved where the class leads by less than the allowance for rounding
            if exact.label[0] == first.label[row]:
                lower[row] = torch.maximum(lower[row], exact.lower[0])
                solved[row] = exact.solved[0]
        if on_progress is not None:
            on_progress(len(images))
        return Certificates(lower=lower, solved=solved, label=first.label, doubt=first.doubt)


class _Lowered(nn.Module):
    """The model with one class's logit lowered by ``doubt``, which makes that class's margins smaller."""

    def __init__(self, model: nn.Module, label: int, doubt: float) -> None:
        super().__init__()
        self.model, self.label, self.doubt = model, label, doubt

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = as_logits(self.model(pixels))
        lowered = torch.zeros_like(logits)
        lowered[:, self.label] = self.doubt
        return logits - lowered


class _FromUnit(nn.Module):
    """The model as a function of pixels in ``[0, 1]``."""

    def __init__(self, model: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.model, self.low, self.scale = model, low, high - low

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = as_logits(self.model(pixels * self.scale + self.low))
        return logits


def _certify(
    effort: Effort,
    model: nn.Module,
    images: Tensor,
    norm: Norm,
    domain: Domain,
    upper: Tensor,
    bounds: tuple[float, float],
    start: Tensor | None,
    on_progress: Callable[[int], None] | None,
) -> Certificates:
    check_module(model)
    check_images(images, bounds)
    check_choice("norm", norm, NORMS)
    check_choice("domain", domain, DOMAINS)
    for what, radii in {"upper bound": upper, **({} if start is None else {"start": start})}.items():
        if not isinstance(radii, Tensor) or radii.shape != images.shape[:1]:
            got = tuple(radii.shape) if isinstance(radii, Tensor) else shown(radii)
            raise InputError(f"expected one {what} per image, got {got}; give a tensor of shape ({len(images)},)")
    if upper.isnan().any() or (upper < 0).any():
        raise InputError(
            "expected upper bounds of at least 0, got NaN or less; give the distances of witnesses, or inf without a "
            "witness"
        )
    low, high = bounds = plain_bounds(bounds)
    device = images.device
    scaled = model if bounds == (0.0, 1.0) else _FromUnit(model, low, high)
    network = PiecewiseNetwork(scaled, tuple(images.shape[1:]), device)
    pixels = (images.detach().double() - low) / (high - low)
    # slightly beyond the witness: a sound bound stays below it, and an unsound one must show instead of being cut off
    limit = torch.minimum(upper.to(device).double() / (high - low) * (1 + BEYOND), farthest_in_box(pixels, norm))
    begin = None if start is None else start.to(device).double() / (high - low)
    lowers, labels, doubts = [], [], []
    for rows in torch.arange(len(images), device=device).split(_batch(network)):  # type: ignore[no-untyped-call]
        label = network.logits(pixels[rows]).argmax(1)
        first = limit[rows] * effort.first
        if begin is not None:
            first = torch.where(begin[rows] > 0, begin[rows], first)
        doubt = rounding_of(network, scaled, pixels[rows], limit[rows], images.dtype)
        lowers.append(certified_radii(network, pixels[rows], label, norm, domain, limit[rows], effort, first, doubt))
        doubts.append(doubt)
        labels.append(label)
        if on_progress is not None:
            on_progress(len(rows))
    lower = (torch.cat(lowers) * (high - low)).cpu()
    reached = upper.cpu().double()
    return Certificates(
        lower=lower, solved=lower >= reached * (1 - 1e-5), label=torch.cat(labels).cpu(), doubt=torch.cat(doubts).cpu()
    )


def _batch(network: PiecewiseNetwork) -> int:
    """Batch size that keeps the functionals within `BATCH` entries."""
    last = len(network.blocks) - 1
    entries = [math.prod(network.blocks[last].shape) * network.widest(last)]
    for index, block in enumerate(network.blocks[:last]):
        local = network.local(index)
        if local is not None:
            entries.append(2 * local.units.numel() * max(seen.shape[1] for seen in local.seen))
        elif network.tightened(index):
            entries.append(2 * math.prod(block.shape) * network.widest(index))
    return max(1, BATCH // max(entries))
