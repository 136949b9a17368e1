"""Properties of every margin over random networks, shapes, precisions and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.certify.certifiers import Crown
from attacks.estimator import Status
from attacks.geometry import row_norm
from attacks.measure import measure
from attacks.registry import create
from attacks.types import NORMS, Domain, Norm

ESTIMATORS = ("deepfool:steps=10", "fmn:steps=15", "linear", "cascade:budget=60", "pgd:rounds=2,steps=5", "sdf")
# random networks may have zero gradients, which gives warnings
pytestmark = pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A network and its images."""

    model: nn.Module
    images: Tensor
    norm: Norm
    domain: Domain
    text: str
    batch_size: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small dense and convolutional networks of up to three layers."""
    channels, height, width = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    classes, count = draw(st.integers(2, 12)), draw(st.integers(1, 7))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    features = channels
    if draw(st.booleans()) and min(height, width) >= 3:
        features = draw(st.integers(1, 4))
        layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(features))
    layers.append(nn.Flatten())
    size = features * height * width
    for _ in range(draw(st.integers(0, 2))):
        hidden = draw(st.integers(1, 12))
        layers += [nn.Linear(size, hidden), draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.1)]))]
        size = hidden
    layers.append(nn.Linear(size, classes))
    text = draw(st.sampled_from(ESTIMATORS))
    norm = "l2" if text == "sdf" else draw(st.sampled_from(NORMS))
    domain = draw(st.sampled_from(["box", "free"])) if "free" in create(text).domains else "box"
    images = torch.rand(count, channels, height, width, dtype=dtype)
    # pixels at the bounds, where the box matters
    images = torch.where(torch.rand_like(images) < draw(st.sampled_from([0.0, 0.3])), images.round(), images)
    model = nn.Sequential(*layers).to(dtype).train(draw(st.booleans()))
    return Case(model, images, norm, domain, text, draw(st.integers(1, 8)))


@pytest.mark.slow
@some
@given(case=cases())
def test_margins_are_claims_that_hold(case: Case) -> None:
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    found = measure(
        case.model,
        case.images,
        create(case.text),
        case.norm,
        domain=case.domain,
        noise_retries=2,
        batch_size=case.batch_size,
    )
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    flags = case.model.training
    logits = case.model.eval()(case.images)
    at_witness = case.model(found.witness)
    case.model.train(flags)
    assert torch.equal(found.prediction, logits.argmax(1))
    for row, status in enumerate(found.status):
        distance = float(found.distance[row])
        if status is Status.TIED:
            assert distance == 0
            continue
        if status in (Status.NOT_FOUND, Status.FAILED):
            assert distance == math.inf
            continue
        # a witness of another class, of the distance that is told, inside the bounds
        assert 0 < distance <= float(found.attack_distance[row]) * (1 + 1e-6)
        lead = at_witness[row].max() - at_witness[row, found.prediction[row]]
        assert lead >= -1e-5 * at_witness[row].abs().max()
        told = row_norm((found.witness - case.images)[row : row + 1], case.norm)
        torch.testing.assert_close(found.distance[row : row + 1], told.double(), rtol=1e-5, atol=1e-7)
        if case.domain == "box":
            assert found.witness[row].min() >= 0
            assert found.witness[row].max() <= 1


@pytest.mark.slow
@settings(some, max_examples=25)
@given(case=cases())
def test_batches_change_no_margin(case: Case) -> None:
    """Of estimators whose images do not know of each other; pgd draws for a batch together."""
    if not getattr(create(case.text), "batch_invariant", True):
        return
    model = case.model.double()
    ways = [
        measure(
            model,
            case.images.double(),
            create(case.text),
            case.norm,
            domain=case.domain,
            noise_retries=0,
            batch_size=size,
        )
        for size in (case.batch_size, len(case.images))
    ]
    both = torch.isfinite(ways[0].distance) & torch.isfinite(ways[1].distance)
    torch.testing.assert_close(ways[0].distance[both], ways[1].distance[both], rtol=1e-3, atol=1e-9)
    assert [s is Status.TIED for s in ways[0].status] == [s is Status.TIED for s in ways[1].status]
    assert torch.equal(torch.isfinite(ways[0].distance), torch.isfinite(ways[1].distance))


@settings(some, max_examples=25)
@given(case=cases())
def test_a_certified_bound_is_below_every_witness(case: Case) -> None:
    found = measure(case.model, case.images, create(case.text), case.norm, domain=case.domain, noise_retries=2)
    bounds = Crown(rounds=1, cuts=1).certify(
        case.model, case.images, case.norm, domain=case.domain, upper=found.distance
    )
    assert torch.isfinite(bounds.lower).all()
    assert (bounds.lower >= 0).all()
    assert (bounds.lower <= found.distance * (1 + 1e-4) + 1e-6).all()
