"""Invariances of margins: scale and offset of the logits, order of the images, unit of the pixels."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.measure import measure
from attacks.registry import create
from attacks.seeds import derive_seed
from attacks.types import NORMS, InputError, Norm
from tests import oracles
from tests.oracles import Affine, Oracle

COUNT = 12
# tolerance of two distances, each bisected to 1e-4
TOLERANCE = 3e-4
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)
each = [pytest.param(name, norm, id=f"{name}-{norm}") for name in ("deepfool", "fmn:steps=30") for norm in NORMS]


class Changed(nn.Module):
    """``factor * model((images - low) / (high - low)) + offset``."""

    def __init__(
        self, model: nn.Module, factor: Tensor | float = 1.0, offset: float = 0.0, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.factor, self.offset, self.low, self.high = model, factor, offset, low, high

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.model((images - self.low) / (self.high - self.low)) + self.offset
        return logits


@cache
def truth() -> Oracle:
    """In float64, where laws hold up to 1e-16; and nonlinear, where attacks take more than one step."""
    affine = oracles.affine(10).to(torch.float64).head(COUNT)
    assert isinstance(affine.model, Affine)
    draw = oracles.generator(5)
    hidden = nn.Linear(64, 32).double()
    hidden.weight = nn.Parameter(torch.randn(32, 64, generator=draw, dtype=torch.float64) / 8)
    hidden.bias = nn.Parameter(torch.randn(32, generator=draw, dtype=torch.float64) / 8)
    out = nn.Linear(32, 10).double()
    out.weight = nn.Parameter(torch.randn(10, 32, generator=draw, dtype=torch.float64))
    out.bias = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    return Oracle("relu", nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out), affine.images, {})


@cache
def unchanged(name: str, norm: Norm) -> Tensor:
    distance = measure(truth().model, truth().images, create(name), norm).distance
    assert distance.isfinite().all()
    assert len(distance.unique()) == COUNT
    return distance


def assert_same(distance: Tensor, name: str, norm: Norm) -> None:
    torch.testing.assert_close(distance, unchanged(name, norm), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(("name", "norm"), each)
@few
@given(exponent=st.floats(-3, 3))
def test_scale_of_the_logits(name: str, norm: Norm, exponent: float) -> None:
    model = Changed(truth().model, factor=10.0**exponent)
    assert_same(measure(model, truth().images, create(name), norm).distance, name, norm)


@pytest.mark.parametrize(("name", "norm"), each)
@few
@given(offset=st.floats(-100, 100))
def test_offset_of_all_logits(name: str, norm: Norm, offset: float) -> None:
    model = Changed(truth().model, offset=offset)
    assert_same(measure(model, truth().images, create(name), norm).distance, name, norm)


@pytest.mark.parametrize(("name", "norm"), each)
def test_control_scale_of_one_logit(name: str, norm: Norm) -> None:
    """A change that moves the boundary is detected."""
    factor = torch.ones(10, dtype=torch.float64)
    factor[truth().model(truth().images).argmax(1).mode().values] = 1.1
    with pytest.raises(AssertionError):
        assert_same(
            measure(Changed(truth().model, factor=factor), truth().images, create(name), norm).distance, name, norm
        )


@pytest.mark.parametrize(("name", "norm"), each)
@few
@given(order=st.permutations(range(COUNT)), batch_size=st.sampled_from([3, 5, COUNT]))
def test_order_and_batches(name: str, norm: Norm, order: list[int], batch_size: int) -> None:
    """With their seeds, images may come in any order and split."""
    seeds = torch.tensor([derive_seed("image", i) for i in order])
    images = truth().images[order]
    margins = measure(truth().model, images, create(name), norm, seeds=seeds, batch_size=batch_size)
    distance = torch.empty_like(margins.distance)
    distance[torch.tensor(order)] = margins.distance
    assert_same(distance, name, norm)
    with pytest.raises(AssertionError):
        assert_same(margins.distance.roll(1), name, norm)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 255.0), (-2.5, 0.5)], ids=str)
@pytest.mark.parametrize(("name", "norm"), each)
def test_unit_of_the_pixels(name: str, norm: Norm, bounds: tuple[float, float]) -> None:
    low, high = bounds
    model, images = Changed(truth().model, low=low, high=high), (truth().images * (high - low) + low).clamp(low, high)
    margins = measure(model, images, create(name), norm, bounds=bounds)
    assert_same(margins.distance / (high - low), name, norm)
    assert (margins.witness >= low).all()
    assert (margins.witness <= high).all()
    # in the wrong unit, images are refused or distances are others
    if low < 0 or high > 1:
        with pytest.raises(InputError, match="expected images in"):
            measure(model, images, create(name), norm)
    with pytest.raises(AssertionError):
        assert_same(margins.distance, name, norm)


@pytest.mark.parametrize(("name", "norm"), each)
@few
@given(low=st.floats(-10, 10), width=st.floats(0.1, 300))
def test_unit_of_the_pixels_where_the_box_binds(name: str, norm: Norm, low: float, width: float) -> None:
    """Also for noise retries and clipping, and against exact margins."""
    boxed = oracles.boxed(3, count=6).to(torch.float64)
    model, images = Changed(boxed.model, low=low, high=low + width), boxed.images * width + low
    distance = measure(model, images.clamp(low, low + width), create(name), norm, bounds=(low, low + width)).distance
    ratio = distance / width / boxed.exact[norm]
    assert ratio.min() > 1 - 1e-9
    assert ratio.median() < 1.001
