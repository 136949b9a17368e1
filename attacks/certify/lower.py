"""Certified radii: how large a ball, by linear bounds, holds no point of another class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.certify.ball import Balls, balls
from attacks.certify.crown import Relaxation, relax
from attacks.certify.network.intervals import Intervals
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.network.reading import SUMS
from attacks.types import Domain, Norm, UnsoundError

# how often a fifth of the radius is tried where nothing held
SMALLER = 6
# how much farther a cut must have got for another one
WORTH = 1.003
# by which factor a radius must still grow to be tried
LEAST_GROWTH = 1.02
# of every radius: for the model's own rounding, which evaluates points in another order
SHRINK = 1e-6


@dataclass(frozen=True)
class Effort:
    """How a radius is searched for.

    Attributes:
        inner: see `relax`. evaluations: relaxations an image at most. first: the first radius, as part of ``upper``.
        rounds: relaxations at a larger radius afterwards, each with up to ``cuts`` more for every class that is open.
        growth: by which factor the radius is larger in the first of them, and half as much where it did not hold.
        alpha: gradient steps on the slopes of every last pass.
    """

    inner: str = "crown"
    evaluations: int = 4
    first: float = 0.5
    rounds: int = 2
    cuts: int = 2
    growth: float = 1.3
    alpha: int = 0


def certified_radii(
    network: PiecewiseNetwork,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    domain: Domain,
    upper: Tensor,
    effort: Effort,
    start: Tensor | None = None,
    doubt: Tensor | None = None,
) -> Tensor:
    """Radii within which no point of the domain has another class than ``labels``.

    Lines that hold on a ball hold on every smaller one, so that a relaxation on radius r certifies the smaller of r
    and the distance at which its lines meet the boundary.

    Args:
        images: ``(B, C, H, W)`` float64 in ``[0, 1]``. labels: ``(B,)`` int64.
        upper: ``(B,)`` float64, finite: no larger radius is tried.
        start: ``(B,)`` the first radius to try.
        doubt: ``(B,)`` the lead over every other class that must remain, for rounding; 0 if not given.

    Returns:
        ``(B,)`` float64.
    """
    leads = lead_rows(labels, network.blocks[-1].constant.numel())
    doubt = torch.zeros_like(upper) if doubt is None else doubt
    clean = (leads @ network.logits(images).double()[..., None])[..., 0].amax(1) + doubt
    low, high = _Side(torch.zeros_like(upper), clean), _Side(upper, torch.full_like(upper, torch.nan))
    radii = upper * effort.first if start is None else torch.minimum(start, upper)
    certified = torch.zeros_like(upper)
    for _ in range(effort.evaluations):
        step = reached(network, balls(images, radii, norm, domain), leads, doubt, effort)
        certified = torch.maximum(certified, torch.minimum(step.reach, radii))
        holds = step.reach >= radii
        low, high = low.where(~holds, radii, step.most), high.where(holds, radii, step.most)
        # larger balls have worse lines: none reaches farther
        high.radii = torch.where(holds, torch.minimum(high.radii, step.reach), high.radii)
        low.radii = torch.maximum(low.radii, certified)
        radii = _between(low, high)
    for _ in range(SMALLER):
        none = torch.nonzero((certified == 0) & (clean < 0)).flatten()
        if not len(none):
            break
        radii = high.radii[none] = high.radii[none] / 5
        step = reached(network, balls(images[none], radii, norm, domain), leads[none], doubt[none], effort)
        certified[none] = torch.minimum(step.reach, radii)
    growth = torch.full_like(upper, effort.growth)
    for _ in range(effort.rounds):
        on = torch.nonzero((certified < upper * (1 - SHRINK)) & (growth > LEAST_GROWTH)).flatten()
        if not len(on):
            break
        radii = torch.minimum(certified[on] * growth[on], upper[on])
        around = balls(images[on], radii, norm, domain)
        step = reached(network, around, leads[on], doubt[on], effort, effort.cuts)
        certified[on] = torch.maximum(certified[on], torch.minimum(step.reach, radii))
        growth[on] = torch.where(step.reach < radii, 1 + (growth[on] - 1) / 2, growth[on])
    return certified * (1 - SHRINK)


@dataclass
class _Side:
    """A radius of each image and by how much another class may lead on its ball."""

    radii: Tensor
    most: Tensor

    def where(self, keep: Tensor, radii: Tensor, most: Tensor) -> _Side:
        return _Side(torch.where(keep, self.radii, radii), torch.where(keep, self.most, most))


def _between(low: _Side, high: _Side) -> Tensor:
    """Where a line through both leads is 0, or the middle; never quite at either end."""
    share = low.most / (low.most - high.most)
    share = torch.where(share.isfinite(), share, 0.5).clamp(0.1, 0.9)
    return low.radii + share * (high.radii - low.radii)


@dataclass(frozen=True)
class Step:
    """One relaxation.

    Attributes:
        reach: ``(B,)`` the distance at which lines that hold on the ball meet the boundary; 0 where they do at once.
        most: ``(B,)`` by how much another class may lead on the ball.
    """

    reach: Tensor
    most: Tensor


def reached(
    network: PiecewiseNetwork, around: Balls, leads: Tensor, doubt: Tensor, effort: Effort, cuts: int = 0
) -> Step:
    """Relax the network on balls.

    Args:
        leads: ``(B, K - 1, K)``. doubt: ``(B,)`` see `certified_radii`.
        cuts: how often a class that may be on the ball is looked for again beyond its line.
    """
    last = len(network.blocks) - 1
    relaxation = relax(network, around, effort.inner)
    check_bounds(relaxation)
    rows, values = relaxation.above(last, leads, relaxation.slopes(last, leads, effort.alpha))
    values = values + doubt[:, None]
    most = (values + around.gain(rows)).amax(1)
    reach = around.crossing(rows, -values)
    image, other = torch.nonzero(reach < around.radii[:, None], as_tuple=True)
    rows, values = rows[image, other], values[image, other]
    bounds = [Intervals(one.low[image], one.high[image]) for one in relaxation.bounds]
    for _ in range(cuts):
        if not len(image):
            break
        # all points of that class on the ball lie beyond the line
        part = Balls(around.images[image], around.radii[image], around.norm, around.limits, (rows, -values))
        lead = leads[image, other][:, None]
        relaxation = relax(network, part, effort.inner, bounds)
        found, at = relaxation.above(last, lead, relaxation.slopes(last, lead, effort.alpha))
        at = at + doubt[image, None]
        farther = torch.where(relaxation.empty, math.inf, part.crossing(found, -at)[:, 0])
        before = reach[image, other]
        reach[image, other] = torch.maximum(before, farther)
        on = (farther < around.radii[image]) & (farther > before * WORTH)
        image, other, rows, values = image[on], other[on], found[on, 0], at[on, 0]
        bounds = [Intervals(one.low[on], one.high[on]) for one in relaxation.bounds]
    return Step(reach.amin(1), most)


def lead_rows(labels: Tensor, classes: int) -> Tensor:
    """Functionals ``(B, K - 1, K)`` of the logits: by how much each other class leads over the label."""
    eye = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = torch.stack([eye[torch.arange(classes, device=labels.device) != label] for label in labels.tolist()])
    return others - eye[labels][:, None]


def check_bounds(relaxation: Relaxation) -> None:
    """Compare all bounds with what the network computes at the images and at a random point on the edge of each ball.

    Raises:
        UnsoundError: a value is outside of its bounds.
    """
    around, network = relaxation.around, relaxation.network
    draw = torch.Generator().manual_seed(3)
    move = torch.randn(around.images.shape, generator=draw, dtype=torch.float64).to(around.images)
    move = move.sign() if around.norm == "linf" else move / move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    # the images themselves may lie a rounding outside of the limits
    low, high = around.images.clamp_max(around.limits[0]), around.images.clamp_min(around.limits[1])
    edge = around.images + around.radii.view(-1, 1, 1, 1) * move
    points = torch.cat([around.images, torch.minimum(torch.maximum(edge, low), high)])
    for values, bounds, place in zip(network.run(points)[0], relaxation.bounds, network.places, strict=False):
        least, most = (side.repeat(2, 1) for side in bounds.flat())
        slack = SUMS * (values.abs().amax(1, keepdim=True) + 1)
        if not ((values >= least - slack) & (values <= most + slack)).all():
            raise UnsoundError(
                f"expected values within their bounds before {place}, got one outside at a point within the radius; no "
                "bound of this network can be trusted: report it with the model"
            )
