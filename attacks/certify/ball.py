"""Maxima of linear functions on norm balls around images, intersected with the box and with a half-space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.certify.network.intervals import Intervals
from attacks.geometry import plane_crossing, row_norm
from attacks.types import Domain, Norm

# relative rounding error of float64 sums, as a fraction of the sum of absolute values
ROUNDING = 1e-12
TINY = float(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Balls:
    """Points within ``radii`` of the images and inside the domain.

    Attributes:
        images: ``(B, C, H, W)`` float64. radii: ``(B,)`` float64, pixel units, finite.
        limits: the box; infinite in the free domain.
        cut: normals ``(B, n)`` and gaps ``(B,)`` of a half-space: only moves with ``normal . move >= gap`` count.
    """

    images: Tensor
    radii: Tensor
    norm: Norm
    limits: tuple[float, float]
    cut: tuple[Tensor, Tensor] | None = None

    @property
    def boxed(self) -> bool:
        """Whether the balls are intersected with the pixel bounds."""
        return math.isfinite(self.limits[1])

    def pixels(self) -> Intervals:
        """The smallest boxes that contain the balls."""
        reach = self.radii.view(-1, 1, 1, 1)
        low = torch.maximum(self.images - reach, self.images.clamp_max(self.limits[0]))
        return Intervals(low, torch.minimum(self.images + reach, self.images.clamp_min(self.limits[1])))

    def rooms(self) -> tuple[Tensor, Tensor]:
        """How far each pixel may move up and down: ``(B, n)`` each."""
        low, high = self.pixels().flat()
        points = self.images.flatten(1)
        return high - points, points - low

    def gain(self, rows: Tensor) -> Tensor:
        """Upper bounds ``(B, m)`` of ``rows . move`` for rows ``(B, m, n)``; see `gain`.

        With a cut, ``max(a . d) <= max((a + s g) . d) - s gap`` for any ``s >= 0`` (weak duality). The multiplier s is
        the optimal one, in L2 that of the problem without the box.
        """
        up, down = self.rooms()
        if self.cut is None:
            return gain(rows, up, down, self.radii, self.norm, self.boxed)
        normals, gaps = self.cut
        multipliers = (
            _turned(rows, normals, gaps, up, down)
            if self.norm == "linf"
            else _tilted(rows, normals, gaps, self.radii, normals.square().sum(1).sqrt())
        )
        tilted = rows + multipliers[..., None] * normals[:, None]
        sizes = gaps.abs() + normals.abs().sum(1) * self.radii
        doubt = ROUNDING * multipliers * sizes[:, None]
        cut = gain(tilted, up, down, self.radii, self.norm, self.boxed) - multipliers * gaps[:, None] + doubt
        if self.norm == "linf":
            return cut
        # the multipliers are optimal without the box: with it, the bound without the cut may be smaller
        return torch.minimum(cut, gain(rows, up, down, self.radii, self.norm, self.boxed))

    def crossing(self, rows: Tensor, gaps: Tensor) -> Tensor:
        """The smallest distance at which ``rows . move`` reaches ``gaps`` inside the domain, whatever the radius.

        Args:
            rows: ``(B, m, n)``. gaps: ``(B, m)``.

        Returns:
            ``(B, m)`` float64; 0 where the gap is at most 0, inf where no point of the box reaches it.
        """
        count, classes, pixels = rows.shape
        points = self.images.flatten(1)[:, None].expand(-1, classes, -1).reshape(-1, pixels)
        normals, missing = rows.reshape(-1, pixels), gaps.reshape(-1)
        direction, length, short = plane_crossing(points, normals, missing, self.norm, self.limits)
        ends = (points + length[:, None] * direction).clamp(*self.limits)
        # in L-infinity the length is the distance; a point that rounding put outside the box counts as clipped
        distance = length if self.norm == "linf" else row_norm(ends - points.clamp(*self.limits), "l2")
        distance = torch.where(short > 0, math.inf, distance)
        return torch.where(missing > 0, distance, 0.0).view(count, classes)


def gain(rows: Tensor, up: Tensor, down: Tensor, radii: Tensor, norm: Norm, boxed: bool) -> Tensor:
    """Upper bounds of ``rows . move`` over moves of norm at most ``radii``, with each pixel within its room.

    Exact in L-infinity and in the free domain. In L2 with the box it is a weak dual, minimised over t > 0: for any t,
    ``sum_i v_i d_i <= sum_i (v_i d_i - d_i^2 / 2t) + radius^2 / 2t``, largest at ``d_i = min(t v_i, room_i)``.

    Args:
        rows: ``(B, m, n)``.
        up, down: ``(B, n)`` how far each pixel may move in either direction, at most the radius.
        radii: ``(B,)``.

    Returns:
        ``(B, m)``.
    """
    if norm == "linf":
        above = rows.clamp_min(0.0)
        return (above @ up[..., None] + (above - rows) @ down[..., None])[..., 0]
    radius = radii[:, None]
    if not boxed:
        return radius * rows.square().sum(2).sqrt()
    room = torch.where(rows > 0, up[:, None], down[:, None])
    slope = torch.where(room > 0, rows.abs(), 0.0)
    weight = slope.square()
    total = weight.sum(2)
    # once with all pixels free, then without those that the box stops
    t = torch.where(total > 0, radius / total.sqrt().clamp_min(TINY), 0.0)
    stopped = t[..., None] * slope >= room
    left = torch.where(stopped, 0.0, weight).sum(2)
    rest = radius.square() - torch.where(stopped, room.square(), 0.0).sum(2)
    t = torch.maximum(t, (rest.clamp_min(0.0) / left.clamp_min(TINY)).sqrt().clamp_max(1e12))
    move = torch.minimum(t[..., None] * slope, room)
    spare = (radius.square() - move.square().sum(2)).clamp_min(0.0) / (2 * t.clamp_min(TINY))
    dual = (slope * move).sum(2) + spare
    return torch.minimum(dual, radius * total.sqrt())


def _tilted(rows: Tensor, normals: Tensor, gaps: Tensor, radii: Tensor, size: Tensor) -> Tensor:
    """L2 multipliers ``(B, m)`` of the cut: the maximum over a cap lies on its rim unless the ball's maximum is in it.

    Args:
        size: ``(B,)`` L2 norms of the complete normals.
    """
    size = size.clamp_min(TINY)
    away = gaps / size
    along = (rows @ normals[..., None])[..., 0] / size[:, None]
    across = (rows.square().sum(2) - along.square()).clamp_min(0.0).sqrt()
    rim = (radii.square() - away.square()).clamp_min(TINY).sqrt()
    wanted = across * (away / rim)[:, None] - along
    wanted = torch.where((away.abs() < radii)[:, None], wanted, 0.0)
    return wanted.clamp_min(0.0) / size[:, None]


def _turned(rows: Tensor, normals: Tensor, gaps: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """L-infinity multipliers ``(B, m)`` of the cut.

    Of the move that is best without the cut, pixels are reversed in order of their cost until the cut is met.
    """
    g = normals[:, None]
    favoured = torch.where(rows > 0, up[:, None], torch.where(rows < 0, -down[:, None], 0.0))
    favoured = torch.where(rows == 0, torch.where(g > 0, up[:, None], -down[:, None]), favoured)
    missing = gaps[:, None] - (favoured * g).sum(2)
    against = rows * g < 0
    price = torch.where(against, rows.abs() / g.abs().clamp_min(TINY), math.inf)
    price, order = price.sort(2)
    worth = torch.where(against, g.abs() * (up + down)[:, None], 0.0).gather(2, order).cumsum(2)
    turned = (worth < missing[..., None]).sum(2, keepdim=True).clamp_max(rows.shape[2] - 1)
    last = price.gather(2, turned)[..., 0]
    return torch.where((missing > 0) & last.isfinite(), last, 0.0)


def gain_of_short_rows(around: Balls, rows: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """`Balls.gain` of sparse rows ``(B, G, m, p)``, which are 0 except at ``places`` ``(G, p)`` that are ``real``.

    With a cut, the gain of its normal at the other pixels is one number per image and group. In L2, the box counts
    only through pixels that cannot move at all.

    Returns:
        ``(B, G, m)``.
    """
    shape = rows.shape[:3]
    rooms = around.rooms()
    up, down = (room[:, places].flatten(0, 1) for room in rooms)
    radii = around.radii.repeat_interleave(len(places))
    short = rows.flatten(0, 1)
    plain = gain(short, up, down, radii, around.norm, around.boxed)
    if around.cut is None:
        return plain.view(shape)
    whole, gaps = around.cut
    room = torch.where(whole > 0, rooms[0], rooms[1])
    per_pixel = whole.abs() * room if around.norm == "linf" else torch.where(room > 0, whole, 0.0).square()
    elsewhere = per_pixel.sum(1)[:, None] - (per_pixel[:, places] * real).sum(2)
    elsewhere = (elsewhere + ROUNDING * per_pixel.sum(1)[:, None]).clamp_min(0.0).flatten()
    normals = (whole[:, places] * real).flatten(0, 1)
    gap = gaps.repeat_interleave(len(places))
    sizes = gaps.abs() + whole.abs().sum(1) * around.radii
    if around.norm == "linf":
        multipliers = _turned(short, normals, gap - elsewhere, up, down)
        tilted = short + multipliers[..., None] * normals[:, None]
        cut = gain(tilted, up, down, radii, "linf", around.boxed) + multipliers * (elsewhere - gap)[:, None]
    else:
        size = whole.square().sum(1).sqrt().repeat_interleave(len(places))
        multipliers = _tilted(short, normals, gap, radii, size)
        tilted = short + multipliers[..., None] * normals[:, None]
        free = torch.where(tilted > 0, up[:, None], down[:, None]) > 0
        squares = torch.where(free, tilted.square(), 0.0).sum(2) + multipliers.square() * elsewhere[:, None]
        cut = radii[:, None] * squares.sqrt() - multipliers * gap[:, None]
    doubt = ROUNDING * multipliers * sizes.repeat_interleave(len(places))[:, None]
    return torch.minimum(plain, cut + doubt).view(shape)


def balls(images: Tensor, radii: Tensor, norm: Norm, domain: Domain) -> Balls:
    """Balls around images in ``[0, 1]``."""
    return Balls(images, radii, norm, (0.0, 1.0) if domain == "box" else (-math.inf, math.inf))
