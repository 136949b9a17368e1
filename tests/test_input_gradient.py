"""Input gradients by folding: equal to the convolution's; forward passes and the caller's model are unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attacks.estimators.fmn import FMN
from attacks.input_gradient import FoldedConv2d, quicken
from attacks.isolation import frozen_view
from attacks.measure import measure


class Special(nn.Conv2d):
    """A custom layer."""


SHAPES = [
    nn.Conv2d(1, 4, 3),
    nn.Conv2d(1, 16, 4, stride=2, padding=1),
    nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    nn.Conv2d(2, 6, 5, stride=3, padding=2, bias=False),
]


@pytest.mark.parametrize("plain", SHAPES, ids=str)
def test_folded_gradients_match_the_convolution(plain: nn.Conv2d) -> None:
    plain = plain.double().requires_grad_(False)
    folded = nn.Sequential(copy.deepcopy(plain))
    quicken(folded)
    assert type(folded[0]) is FoldedConv2d
    images = torch.rand(3, plain.in_channels, 11, 12, dtype=torch.float64)
    one, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected, got = plain(one), folded(other)
    assert torch.equal(expected, got)
    weights = torch.rand_like(expected)
    (expected,) = torch.autograd.grad((expected * weights).sum(), one)
    (got,) = torch.autograd.grad((got * weights).sum(), other)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    # control: the gradient is not constant
    assert got.std() > 1e-3


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 4, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        Special(1, 4, 3),
    ],
    ids=["many channels", "groups", "named padding", "reflected", "another class"],
)
def test_unsupported_layers_are_left_unchanged(module: nn.Module) -> None:
    model = nn.Sequential(module).requires_grad_(False)
    before = type(model[0])
    quicken(model)
    assert type(model[0]) is before


def test_trainable_layers_are_left_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    quicken(model)
    assert type(model[0]) is nn.Conv2d


def test_views_are_folded_and_the_callers_model_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with frozen_view(model, (0.0, 1.0), "box", torch.device("cpu")) as view:
        assert type(view.network.get_submodule("0")) is FoldedConv2d
    assert type(model[0]) is nn.Conv2d
    margins = measure(model, torch.rand(4, 1, 8, 8), FMN(steps=5), "l2")
    assert margins.forwards.min() > 0
    assert type(model[0]) is nn.Conv2d
    assert all(parameter.requires_grad for parameter in model.parameters())
