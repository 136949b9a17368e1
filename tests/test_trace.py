"""The trace: the nearest verified point after a number of passes, by hand calculation and against `measure`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Settings
from attacks.isolation import Classifier
from attacks.measure import measure
from attacks.registry import create
from attacks.trace import Trace
from attacks.types import DOMAINS, NORMS, Domain, Norm
from tests.oracles import affine


class Threshold(nn.Module):
    """One pixel in [0, 1]; the class changes at ``edge``. With ``in_place`` the input is overwritten."""

    def __init__(self, edge: float = 0.5, in_place: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.edge, self.in_place = edge, in_place

    def forward(self, images: Tensor) -> Tensor:
        if self.in_place:
            images.mul_(2.0).div_(2.0)
        height = self.weight * (images.flatten(1)[:, 0] - self.edge)
        logits = torch.stack([-height, height], 1)
        if self.in_place:
            images.zero_()
        return logits


@dataclass(frozen=True, kw_only=True)
class Visits(Settings):
    """Passes fixed points, one forward each, with all pixels equal; returns the last."""

    name: ClassVar[str] = "visits"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = True

    points: str = "0.9 0.7 0.4 0.8"
    hide: bool = False
    backward: bool = False

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        for text in self.points.split():
            point = torch.full_like(images, float(text), requires_grad=self.backward)
            logits = model(point[: len(point) // 2] if self.hide else point)
            if self.backward:
                torch.autograd.grad(logits.sum(), point)
        return point.detach()


def traced(
    estimator: Visits,
    images: list[float],
    *,
    batch_size: int = 128,
    domain: Domain = "box",
    model: nn.Module | None = None,
) -> tuple[Trace, Tensor]:
    trace, points = Trace(), torch.tensor(images).view(-1, 1, 1, 1)
    margins = measure(
        model or Threshold(),
        points,
        estimator,
        "linf",
        trace=trace,
        batch_size=batch_size,
        domain=domain,
        noise_retries=0,
    )
    return trace, margins.distance


def entries(trace: Trace, row: int) -> list[tuple[float, float]]:
    own = trace.rows == row
    return [(p, round(d, 3)) for p, d in zip(trace.passes[own].tolist(), trace.distance[own].tolist(), strict=True)]


def test_passes_and_distances_match_hand_calculation() -> None:
    # the clean pass is the first; 0.4 has the predicted class
    trace, distance = traced(Visits(), [0.2])
    assert entries(trace, 0)[:2] == [(2.0, 0.7), (3.0, 0.5)]
    # bisection of [0.2, 0.8] after the check of 0.8, the sixth pass: 0.5 is not beyond, 0.65 is, and so on
    assert entries(trace, 0)[2] == (8.0, 0.45)
    least = trace.distance.min().item()
    assert least <= distance.item() <= least * (1 + 1e-4)
    assert (trace.passes[1:] > trace.passes[:-1]).all()
    assert (trace.distance[1:] < trace.distance[:-1]).all()


def test_backward_passes_count_when_they_run() -> None:
    trace, _ = traced(Visits(points="0.9 0.7", backward=True), [0.2])
    assert entries(trace, 0)[:2] == [(2.0, 0.7), (4.0, 0.5)]


def test_points_of_the_same_class_outside_the_box_or_undefined_do_not_count() -> None:
    assert entries(traced(Visits(points="0.1 0.3 1.5"), [0.2])[0], 0)[0] == (5.0, 0.8)  # clipped to 1 by `measure`
    assert entries(traced(Visits(points="0.1 0.3 1.5"), [0.2], domain="free")[0], 0)[0] == (4.0, 1.3)
    assert not len(traced(Visits(points="0.1 0.3"), [0.2])[0].rows)
    assert not len(traced(Visits(points="nan inf"), [0.2], domain="free")[0].rows)


def test_chunks_are_traced_separately() -> None:
    images = [0.2, 0.3, 0.6, 0.95, 0.1]  # of either class
    whole, parts = traced(Visits(), images)[0], traced(Visits(), images, batch_size=2)[0]
    for row in range(5):
        assert entries(whole, row) == entries(parts, row) != []
    assert len(parts.hidden) == 5
    assert not parts.hidden.any()
    # control: a clean image of the next chunk is not a witness in this chunk (it would be first, at 0.4)
    assert entries(parts, 0)[0] == (2.0, 0.7)


def test_hidden_rows_are_reported_and_never_guessed() -> None:
    trace, distance = traced(Visits(hide=True), [0.2, 0.3, 0.2, 0.3])
    assert trace.hidden.tolist() == [2.0] * 4  # half of the rows of four forwards
    # the check of 0.8 is the first pass with known rows, after the clean pass and the hidden ones
    assert entries(trace, 0)[0] == (4.0, 0.6)
    assert distance.isfinite().all()


def test_a_row_may_occur_in_a_batch_several_times() -> None:
    trace = Trace()
    trace.start_chunk(torch.full((2, 1, 1, 1), 0.2), torch.zeros(2, dtype=torch.int64), "linf", (0.0, 1.0))
    points, passes = torch.tensor([0.9, 0.6, 0.7]).view(-1, 1, 1, 1), torch.tensor([5.0, 7.0], dtype=torch.float64)
    trace.see(points, torch.tensor([[0.0, 1.0]] * 3), torch.tensor([1, 1, 0]), passes)
    assert entries(trace, 0) == [(5.0, 0.5)]
    assert entries(trace, 1) == [(7.0, 0.4)]


def test_a_trace_records_the_input_of_a_network_that_works_in_place() -> None:
    plain, in_place = (traced(Visits(), [0.2, 0.6], model=Threshold(in_place=flag))[0] for flag in (False, True))
    assert entries(plain, 0) == entries(in_place, 0)
    assert torch.equal(plain.distance, in_place.distance)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["deepfool", "fmn", "pgd:steps=5", "fab:steps=10"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_trace_changes_no_margin_and_ends_at_its_distance(text: str, norm: Norm) -> None:
    oracle, trace = affine(4, count=12), Trace()
    plain = measure(oracle.model, oracle.images, create(text), norm, batch_size=5)
    watched = measure(oracle.model, oracle.images, create(text), norm, batch_size=5, trace=trace)
    assert torch.equal(plain.distance, watched.distance)
    assert torch.equal(plain.forwards, watched.forwards)
    least = torch.full((12,), math.inf, dtype=torch.float64).scatter_reduce(0, trace.rows, trace.distance, "amin")
    assert (least <= watched.distance).all()
    assert (least >= watched.distance * (1 - 1.1e-4)).all()
    assert (least >= oracle.exact[norm] * (1 - 1e-5)).all()
    assert trace.passes.max() <= (watched.forwards + watched.backwards).max()


def test_distances_are_in_the_units_of_the_images() -> None:
    images, low, high = torch.tensor([[[[-0.5]]]]), -1.0, 1.0
    trace = Trace()
    margins = measure(Threshold(edge=0.25), images, Visits(points="0.9"), "linf", bounds=(low, high), trace=trace)
    assert entries(trace, 0)[0] == (2.0, 1.3)  # 0.9 of the range is 0.8
    assert margins.distance.item() == pytest.approx(0.75, rel=1e-3)
