"""Models with known exact margins: the ground truth for every estimator."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.affine import affine_margins
from attacks.geometry import dual_norm
from attacks.types import NORMS, Domain, Norm

Shape = tuple[int, int, int]
DIGITS: Shape = (1, 8, 8)
OBLONG: Shape = (3, 5, 4)


class Affine(nn.Module):
    """``z = scale * (W (x - 0.5) + b)``: centred, so that rounding is small relative to the margins.

    ``weight`` ``(K, D)`` and ``bias`` ``(K,)`` are those of ``W x + b``, for `affine_margins`.
    """

    def __init__(self, weight: Tensor, offset: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight = nn.Parameter(scale * weight)
        self.linear.bias = nn.Parameter(scale * offset)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear((images - 0.5).flatten(1))
        return logits

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach().double()

    @property
    def bias(self) -> Tensor:
        return self.linear.bias.detach().double() - 0.5 * self.weight.sum(1)


class FlatAround(nn.Module):
    """Two classes ``(depth, relu(w . x - edge))``: the gradient is exactly 0 where ``w . x < edge``."""

    def __init__(self, normal: Tensor, edge: float, depth: float) -> None:
        super().__init__()
        self.normal = nn.Parameter(normal)
        self.edge, self.depth = edge, depth

    def forward(self, images: Tensor) -> Tensor:
        rise = torch.relu(images.flatten(1) @ self.normal - self.edge)
        return torch.stack([torch.full_like(rise, self.depth) + 0 * rise, rise], dim=1)


class TiltedBall(nn.Module):
    """Two classes that meet on a sphere, the first outside: ``((|x - c|^2 - r^2) exp(tilt . (x - c)), 0)``.

    Off the sphere the gradient is tilted towards ``tilt``, so that gradient steps do not reach the nearest point.
    """

    def __init__(self, centre: Tensor, radius: float, tilt: Tensor) -> None:
        super().__init__()
        self.centre, self.tilt = nn.Parameter(centre), nn.Parameter(tilt)
        self.radius = radius

    def forward(self, images: Tensor) -> Tensor:
        way = images.flatten(1) - self.centre
        lead = (way.square().sum(1) - self.radius**2) * (way @ self.tilt).exp()
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@dataclass(frozen=True, eq=False)
class Oracle:
    """A model, images and their exact margins ``(B,)`` float64 in each norm."""

    name: str
    model: nn.Module
    images: Tensor
    exact: Mapping[Norm, Tensor]
    domain: Domain = "box"

    def to(self, dtype: torch.dtype) -> Oracle:
        """The same model and images in another precision (the values must fit: float32 to float64)."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype), images=self.images.to(dtype))

    def head(self, count: int) -> Oracle:
        """The first ``count`` images."""
        exact = {norm: values[:count] for norm, values in self.exact.items()}
        return replace(self, images=self.images[:count], exact=exact)


def generator(*parts: int) -> torch.Generator:
    """A random generator of this oracle only."""
    seed = 0
    for part in parts:
        seed = 1000 * seed + part
    return torch.Generator().manual_seed(seed)


def affine_model(classes: int, shape: Shape = DIGITS, *, scale: float = 1.0, spread: float = 0.5) -> Affine:
    """Normally distributed rows. With more than two classes the longest row is four times the shortest.

    The nearest boundary is then often not that of the runner-up class, which most attacks follow."""
    draw, pixels = generator(classes, math.prod(shape)), math.prod(shape)
    least, most = (0.5, 2.0) if classes > 3 else (0.8, 1.25)
    lengths = torch.linspace(least, most, classes)[torch.randperm(classes, generator=draw)]
    weight = torch.randn(classes, pixels, generator=draw) * lengths[:, None]
    return Affine(weight, spread * torch.randn(classes, generator=draw), scale)


def grey_images(count: int, shape: Shape = DIGITS, seed: int = 1) -> Tensor:
    """Pixels around 0.5, far from the bounds of the box."""
    draw = generator(count, math.prod(shape), seed)
    return (0.5 + 0.05 * torch.randn(count, *shape, generator=draw)).clamp(0.25, 0.75)


def inked_images(count: int, shape: Shape = DIGITS, seed: int = 2) -> Tensor:
    """Like handwriting: half of the pixels are 0, a fifth are 1 and the rest between, so that the box binds."""
    draw = generator(count, math.prod(shape), seed)
    return (3.0 * torch.rand(count, *shape, generator=draw) - 1.4).clamp(0.0, 1.0)


def exact_margins(model: Affine, images: Tensor, domain: Domain) -> dict[Norm, Tensor]:
    """Exact margins of an affine model in every norm."""
    return {norm: affine_margins(model.weight, model.bias, images, norm, domain=domain) for norm in NORMS}


def affine(
    classes: int, shape: Shape = DIGITS, *, count: int = 64, scale: float = 1.0, domain: Domain = "box"
) -> Oracle:
    """Affine, images far from the bounds: margins in the box and in the free domain are equal."""
    model, images = affine_model(classes, shape, scale=scale), grey_images(count, shape)
    exact = exact_margins(model, images, "free")
    for norm, boxed in exact_margins(model, images, "box").items():
        torch.testing.assert_close(boxed, exact[norm], rtol=1e-9, atol=0)
    return Oracle(f"affine{classes}-{'x'.join(map(str, shape))}-{scale:g}-{domain}", model, images, exact, domain)


def boxed(classes: int, shape: Shape = DIGITS, *, count: int = 64, domain: Domain = "box") -> Oracle:
    """Affine with many pixels at 0 and 1; in the free domain the nearest points lie outside the box."""
    model, images = affine_model(classes, shape, spread=4.0), inked_images(count, shape)
    return Oracle(f"boxed{classes}-{domain}", model, images, exact_margins(model, images, domain), domain)


def confident(classes: int = 10, shape: Shape = DIGITS, *, lead: float = 6.0, count: int = 64) -> Oracle:
    """Affine, one class far ahead of all others, as in a trained network."""
    model, images = affine_model(classes, shape), grey_images(count, shape)
    with torch.no_grad():
        model.linear.bias[classes // 2] += lead
    return Oracle(f"confident{classes}", model, images, exact_margins(model, images, "box"))


def near(classes: int = 10, shape: Shape = DIGITS, *, remaining: float = 1e-3, count: int = 64) -> Oracle:
    """Affine, every image moved along its normal until a thousandth of its margin remains."""
    model, images = affine_model(classes, shape), grey_images(count, shape)
    points = images.double().flatten(1)
    logits = points @ model.weight.T + model.bias
    predicted = logits.argmax(1)
    normals = model.weight[None] - model.weight[predicted][:, None]
    distances = (logits.amax(1, keepdim=True) - logits) / normals.norm(dim=2)
    nearest = distances.scatter(1, predicted[:, None], math.inf).argmin(1)
    rows = torch.arange(count)
    normal = normals[rows, nearest]
    step = distances[rows, nearest, None] * normal / normal.norm(dim=1, keepdim=True)
    moved = (points + (1 - remaining) * step).view_as(images).float()
    return Oracle("near", model, moved, exact_margins(model, moved, "free"))


def flat(*, count: int = 64, shape: Shape = DIGITS) -> Oracle:
    """Every image lies 0.05 to 0.4 (L2) deep in a region where the logits are constant."""
    draw, pixels = generator(7, math.prod(shape)), math.prod(shape)
    normal = torch.randn(pixels, generator=draw)
    images = grey_images(count, shape)
    rise, length = images.flatten(1).double() @ normal.double(), float(normal.double().norm())
    edge = float(rise.max()) + 0.05 * length
    edge = float(torch.tensor(edge, dtype=torch.float32))
    depth = 0.1 * length
    depth = float(torch.tensor(depth, dtype=torch.float32))
    gap = edge + depth - rise
    return Oracle(
        "flat",
        FlatAround(normal, edge, depth),
        images,
        {norm: gap / dual_norm(normal[None], norm) for norm in NORMS},
    )


def ball(*, inside: bool, count: int = 64, shape: Shape = DIGITS, radius: float = 0.75, tilt: float = 3.0) -> Oracle:
    """Images 0.05 to 0.45 (L2) inside or outside of a sphere; its normals, not the gradients, point to its centre."""
    draw, pixels = generator(11, math.prod(shape)), math.prod(shape)
    way = nn.functional.normalize(torch.randn(count, pixels, generator=draw), dim=1)
    lean = tilt * nn.functional.normalize(torch.randn(pixels, generator=draw), dim=0)
    depth = torch.linspace(0.05, 0.45, count)
    centre = torch.full((pixels,), 0.5)
    images = (centre + (radius - depth if inside else radius + depth)[:, None] * way).view(count, *shape)
    distance = (images.double().flatten(1) - 0.5).norm(dim=1)
    return Oracle(
        f"ball-{'inside' if inside else 'outside'}",
        TiltedBall(centre, radius, lean),
        images,
        {"l2": (distance - radius).abs()},
    )


def constant(classes: int = 3, *, count: int = 8, shape: Shape = DIGITS) -> Oracle:
    """No boundary anywhere."""
    model = Affine(torch.zeros(classes, math.prod(shape)), torch.linspace(1.0, 0.0, classes))
    nowhere = torch.full((count,), math.inf, dtype=torch.float64)
    return Oracle("constant", model, grey_images(count, shape), dict.fromkeys(NORMS, nowhere))


def tied(*, count: int = 8, shape: Shape = DIGITS) -> Oracle:
    """The two largest logits are the same function in the even images' half of the space: every even image lies
    on the boundary, every odd one off it."""
    pixels = math.prod(shape)
    weight = torch.zeros(3, pixels)
    weight[0, 0], weight[1, 1] = 1.0, 1.0  # z = (first pixel, second pixel, low)
    images = grey_images(count, shape)
    first = images.flatten(1)[:, 0].clone()
    images.view(count, -1)[:, 1] = first
    images.view(count, -1)[1::2, 1] -= 0.125
    model = Affine(weight, torch.tensor([0.0, 0.0, -1.0]))
    gap = images.flatten(1)[:, 0].double() - images.flatten(1)[:, 1].double()
    return Oracle("tied", model, images, {"l2": gap / math.sqrt(2.0), "linf": gap / 2.0})
