"""Certified radii by linear relaxation: the largest balls found that contain no point of another class."""

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

# number of retries at a fifth of the radius where no radius was certified
SMALLER = 6
# factor by which a cut must enlarge the certified distance for another cut to follow
WORTH = 1.003
# smallest growth factor of the radius that is tried
LEAST_GROWTH = 1.02
# relative reduction of every radius: the model sums in another order, and rounds differently
SHRINK = 1e-6


@dataclass(frozen=True)
class Effort:
    """Settings of the search for a certified radius.

    Attributes:
        inner: how inner bounds are computed, ``crown`` or ``ibp``; see `relax`.
        evaluations: the most relaxations per image.
        first: the first radius, as a fraction of ``upper``.
        rounds: relaxations at larger radii afterwards.
        cuts: the most further relaxations per undecided class in each of these rounds.
        growth: factor of the radius in the first round; its excess over 1 is halved where the radius did not hold.
        alpha: gradient steps on the slopes of every last backward pass.
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
    """Radii within which every point of the domain has the class in ``labels``.

    Lines that hold on a ball hold on every smaller ball. A relaxation at radius r therefore certifies the smaller of r
    and the distance at which its lines reach the boundary.

    Args:
        images: ``(B, C, H, W)`` float64 in ``[0, 1]``. labels: ``(B,)`` int64.
        upper: ``(B,)`` float64, finite: no larger radius is tried.
        start: ``(B,)`` the first radius to try; default ``effort.first`` times ``upper``.
        doubt: ``(B,)`` lead over every other class that must remain, as an allowance for rounding; default 0.

    Returns:
        ``(B,)`` float64; 0 where nothing was certified.
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
        # lines of larger balls are looser: none reaches farther
        high.radii = torch.where(holds, torch.minimum(high.radii, step.reach), high.radii)
        low.radii = torch.maximum(low.radii, certified)
        radii = _between(low, high)
    for _ in range(SMALLER):
        rows = torch.nonzero((certified == 0) & (clean < 0)).flatten()
        if not len(rows):
            break
        radii = high.radii[rows] = high.radii[rows] / 5
        step = reached(network, balls(images[rows], radii, norm, domain), leads[rows], doubt[rows], effort)
        certified[rows] = torch.minimum(step.reach, radii)
    growth = torch.full_like(upper, effort.growth)
    for _ in range(effort.rounds):
        rows = torch.nonzero((certified < upper * (1 - SHRINK)) & (growth > LEAST_GROWTH)).flatten()
        if not len(rows):
            break
        radii = torch.minimum(certified[rows] * growth[rows], upper[rows])
        around = balls(images[rows], radii, norm, domain)
        step = reached(network, around, leads[rows], doubt[rows], effort, effort.cuts)
        certified[rows] = torch.maximum(certified[rows], torch.minimum(step.reach, radii))
        growth[rows] = torch.where(step.reach < radii, 1 + (growth[rows] - 1) / 2, growth[rows])
    return certified * (1 - SHRINK)


@dataclass
class _Side:
    """One end of the bisection: a radius per image, and the upper bound of another class's lead on that ball."""

    radii: Tensor
    most: Tensor

    def where(self, keep: Tensor, radii: Tensor, most: Tensor) -> _Side:
        return _Side(torch.where(keep, self.radii, radii), torch.where(keep, self.most, most))


def _between(low: _Side, high: _Side) -> Tensor:
    """The root of the line through both leads, or the middle; at least a tenth away from either end."""
    share = low.most / (low.most - high.most)
    share = torch.where(share.isfinite(), share, 0.5).clamp(0.1, 0.9)
    return low.radii + share * (high.radii - low.radii)


@dataclass(frozen=True)
class Step:
    """The result of one relaxation.

    Attributes:
        reach: ``(B,)`` distance at which the lines, which hold on the ball, reach the boundary; 0 where another class
            may lead at the image itself.
        most: ``(B,)`` upper bound of another class's lead on the ball.
    """

    reach: Tensor
    most: Tensor


def reached(
    network: PiecewiseNetwork, around: Balls, leads: Tensor, doubt: Tensor, effort: Effort, cuts: int = 0
) -> Step:
    """Relax the network on balls.

    Args:
        leads: ``(B, K - 1, K)``, see `lead_rows`. doubt: ``(B,)``, see `certified_radii`.
        cuts: how often the relaxation is repeated for a class that may occur on the ball, on the part of the ball
            beyond that class's line.
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
    bounds = [Intervals(known.low[image], known.high[image]) for known in relaxation.bounds]
    for _ in range(cuts):
        if not len(image):
            break
        # all points of that class on the ball lie beyond the line
        part = Balls(around.images[image], around.radii[image], around.norm, around.limits, (rows, -values))
        lead = leads[image, other][:, None]
        relaxation = relax(network, part, effort.inner, bounds)
        cut_rows, cut_values = relaxation.above(last, lead, relaxation.slopes(last, lead, effort.alpha))
        cut_values = cut_values + doubt[image, None]
        farther = torch.where(relaxation.empty, math.inf, part.crossing(cut_rows, -cut_values)[:, 0])
        before = reach[image, other]
        reach[image, other] = torch.maximum(before, farther)
        again = (farther < around.radii[image]) & (farther > before * WORTH)
        image, other, rows, values = image[again], other[again], cut_rows[again, 0], cut_values[again, 0]
        bounds = [Intervals(known.low[again], known.high[again]) for known in relaxation.bounds]
    return Step(reach.amin(1), most)


def lead_rows(labels: Tensor, classes: int) -> Tensor:
    """Functionals ``(B, K - 1, K)`` of the logits: the lead of each other class over the label."""
    eye = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = torch.stack([eye[torch.arange(classes, device=labels.device) != label] for label in labels.tolist()])
    return others - eye[labels][:, None]


def check_bounds(relaxation: Relaxation) -> None:
    """Check all bounds against the network's values at the images and at a random point on the edge of each ball.

    Raises:
        UnsoundError: a value is outside its bounds.
    """
    around, network = relaxation.around, relaxation.network
    draw = torch.Generator().manual_seed(3)
    move = torch.randn(around.images.shape, generator=draw, dtype=torch.float64).to(around.images)
    move = move.sign() if around.norm == "linf" else move / move.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    # rounding may put the images themselves slightly outside the limits
    low, high = around.images.clamp_max(around.limits[0]), around.images.clamp_min(around.limits[1])
    edge = around.images + around.radii.view(-1, 1, 1, 1) * move
    points = torch.cat([around.images, torch.minimum(torch.maximum(edge, low), high)])
    for values, bounds, place in zip(network.run(points)[0], relaxation.bounds, network.places, strict=False):
        least, most = (side.repeat(2, 1) for side in bounds.flat())
        slack = SUMS * (values.abs().amax(1, keepdim=True) + 1)
        if not ((values >= least - slack) & (values <= most + slack)).all():
            raise UnsoundError(
                f"expected values within their bounds before {place}, got one outside at a point within the radius; no "
                "bound of this network can be trusted: report this with the model"
            )
