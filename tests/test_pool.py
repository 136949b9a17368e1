"""Pools: images of known classes, which walks set out from, and which change nothing else."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Margins, Status
from attacks.estimators.cascade import RESTARTS
from attacks.isolation import frozen_view
from attacks.measure import MeasureOptions, classified, measure, measure_with
from attacks.pool import Pool, uses_pool
from attacks.registry import create
from attacks.search.descent import Nearest
from attacks.search.restarts import Search
from attacks.types import NORMS, InputError, Norm
from harness import MarginTracker, StoreError, Workers, measure_margins, read_run
from harness.data.builtin import load

POOL = 60


@cache
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on digits, 24 test images and a pool of training images."""
    data = load("digits")
    images, labels = data.train.pixels(torch.arange(1200)), data.train.labels[:1200]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for batch in torch.split(torch.randperm(1200), 50) * 8:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval().requires_grad_(False), data.test.pixels(torch.arange(24)), images[:POOL]


def passes(margins: Margins) -> Tensor:
    return margins.forwards + margins.backwards


def pool_of_digits() -> Pool:
    network, _, points = digits()
    return classified(network, points, MeasureOptions())


class Steps(nn.Module):
    """Two classes by the mean pixel, with a gradient of 0 everywhere."""

    def __init__(self, least: float = 0.5) -> None:
        super().__init__()
        self.least = least

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.flatten(1).mean(1) > self.least).to(images)
        return torch.stack([3 - 6 * bright, -1 + 5 * bright], 1) + 0 * images.flatten(1).sum(1, keepdim=True)


def test_the_nearest_others_have_other_classes_and_are_nearest() -> None:
    network, images, points = digits()
    pool, labels = pool_of_digits(), network(images).argmax(1)
    assert torch.equal(pool.classes, network(points).argmax(1))
    distance = torch.cdist(images.double().flatten(1), points.double().flatten(1))
    distance[pool.classes == labels[:, None]] = torch.inf
    for rank in (0, 1, 7):
        found, there = pool.nearest_others(images, labels, rank)
        assert there.all()
        assert (network(found).argmax(1) != labels).all()
        expected = distance.sort(1).values[:, rank]
        torch.testing.assert_close((found - images).double().flatten(1).norm(dim=1), expected)


def test_an_image_never_is_its_own_other_and_one_class_has_no_others() -> None:
    """Not even where the pool has given it another class, as draws can."""
    _, _, points = digits()
    pool = pool_of_digits()
    for classes in (pool.classes, (pool.classes + 1) % 10):
        found, there = Pool(points, classes).nearest_others(points, pool.classes, 0)
        assert there.all()
        assert ((found - points).flatten(1).abs().amax(1) > 0).all()
    alone = Pool(points, torch.full_like(pool.classes, 3))
    found, there = alone.nearest_others(points[:4], torch.tensor([3, 3, 3, 3]), 0)
    assert torch.equal(found, points[:4])
    assert there.tolist() == [False] * 4
    assert Pool(points[:0], pool.classes[:0]).nearest_others(points[:2], pool.classes[:2], 0)[1].tolist() == [False] * 2


def test_restarts_begin_at_random_where_the_pool_has_no_more_others() -> None:
    network, images, points = digits()
    labels = network(images).argmax(1)
    known = classified(network, images, MeasureOptions())
    one = Pool(points[:1], (labels[:1] + 1) % 10)
    with frozen_view(network, (0.0, 1.0), "box", images.device) as view:
        nearest = Nearest(1 - images, (1 - 2 * images).abs().flatten(1).amax(1).double())
        search = Search(view, images, labels, "linf", torch.arange(24), nearest, one)
        starts = [search._starts(RESTARTS["linf"], torch.arange(1), number) for number in (0, 2, 4)]
    assert len(known.points) == 24
    assert all((start - images[:1]).abs().amax() > 0.1 for start in starts)
    assert not torch.equal(starts[1], starts[2])


def test_rows_of_the_nearest_others_do_not_depend_on_the_batch() -> None:
    network, images, _ = digits()
    pool, labels = pool_of_digits(), network(images).argmax(1)
    together, _ = pool.nearest_others(images, labels, 2)
    for row in range(len(images)):
        alone, _ = pool.nearest_others(images[row : row + 1], labels[row : row + 1], 2)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_a_pool_finds_witnesses_where_gradients_vanish(norm: Norm) -> None:
    """From images brighter than their negatives, which are no witnesses."""
    model, images = Steps(0.9), 0.4 + 0.4 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    bright = torch.ones_like(images)
    without = measure(model, images, create("cascade"), norm, noise_retries=0)
    assert set(without.status) == {Status.NOT_FOUND}
    found = measure(model, images, create("cascade"), norm, noise_retries=0, pool=bright)
    assert set(found.status) == {Status.FOUND}
    exact = (0.9 - images.flatten(1).mean(1)).double() * (4.0 if norm == "l2" else 1.0)
    assert (found.distance >= exact * (1 - 1e-6)).all()
    assert (found.distance <= 2.5 * exact).all()
    alike = measure(model, images, create("cascade"), norm, noise_retries=0, pool=images.flip(0))
    assert set(alike.status) == {Status.NOT_FOUND}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore::attacks.checks.GradientWarning")
def test_without_a_pool_the_negative_is_a_witness_where_gradients_vanish(norm: Norm) -> None:
    images = 0.4 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for pool in (None, images.flip(0)):
        found = measure(Steps(), images, create("cascade"), norm, noise_retries=0, pool=pool)
        assert set(found.status) == {Status.FOUND}
        exact = (0.5 - images.flatten(1).mean(1)).double() * (4.0 if norm == "l2" else 1.0)
        assert (found.distance >= exact * (1 - 1e-6)).all()
        assert (found.distance <= 2 * exact).all()


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_a_pool_changes_no_other_estimator_and_its_forwards_are_not_counted(norm: Norm) -> None:
    network, images, points = digits()
    assert [uses_pool(create(text)) for text in ("cascade", "best", "fmn", "best:of=fmn+apgd")] == [1, 1, 0, 0]
    plain = measure(network, images, create("fmn"), norm)
    given = measure(network, images, create("fmn"), norm, pool=points)
    assert torch.equal(plain.distance, given.distance)
    assert torch.equal(plain.forwards, given.forwards)
    pools = points, points.repeat(9, 1, 1, 1)
    few, many = (measure(network, images, create("cascade"), norm, pool=pool) for pool in pools)
    if norm == "l2":  # in L-infinity restarts begin towards the pool's next images, which are the same ones again
        assert torch.equal(few.forwards + few.backwards, many.forwards + many.backwards)
    assert (many.forwards + many.backwards).max() <= 600


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_rows_with_a_pool_do_not_depend_on_the_batch(norm: Norm) -> None:
    """In float64, so that the network's own rounding in other batches decides nothing."""
    network, images, points = digits()
    network, images, seeds = network.double(), images.double(), torch.arange(24)
    try:
        shared = classified(network, points.double(), MeasureOptions())
        together = measure(network, images, create("cascade"), norm, seeds=seeds, pool=points.double())
        back = measure(network, images.flip(0), create("cascade"), norm, seeds=seeds.flip(0), pool=points.double())
        parts = measure(network, images, create("cascade"), norm, seeds=seeds, pool=points.double(), batch_size=5)
    finally:
        network.float()
    assert len(shared.points) == POOL
    torch.testing.assert_close(back.distance.flip(0), together.distance, rtol=2e-4, atol=0)
    torch.testing.assert_close(parts.distance, together.distance, rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (torch.zeros(3, 1, 7, 8), "expected a pool of images"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.float64), "expected a pool of images"),
        (torch.full((3, 1, 8, 8), 2.0), r"expected images in \[0, 1\]"),
        (torch.zeros(8, 8), "expected a pool as a tensor"),
        ([[0.0]], "expected a pool as a tensor"),
    ],
    ids=["shape", "dtype", "bounds", "dimensions", "list"],
)
def test_a_pool_unlike_the_images_is_refused(pool: Any, message: str) -> None:
    network, images, _ = digits()
    for function in (
        lambda: measure(network, images, create("cascade"), "l2", pool=pool),
        lambda: measure_margins(network, images, "cascade", "l2", pool=pool),
    ):
        with pytest.raises(InputError, match=message):
            function()


def test_an_empty_pool_is_none() -> None:
    network, images, points = digits()
    none = measure_margins(network, images, "cascade", "l2")
    empty = measure_margins(network, images, "cascade", "l2", pool=points[:0])
    assert (none["distance"] == empty["distance"]).all()


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_half_precision_has_pools_and_rows_do_not_depend_on_the_batch(norm: Norm) -> None:
    network, images, points = digits()
    half, few, others = deepcopy(network).bfloat16(), images[:6].bfloat16(), points.bfloat16()
    found = measure(half, few, create("cascade"), norm, noise_retries=0, pool=others, batch_size=5)
    assert set(found.status) == {Status.FOUND}
    assert passes(found).min() >= 260
    single = measure(network, images[:6], create("cascade"), norm)
    assert 0.95 <= (found.distance / single.distance).median() <= 1.05


def test_splits_of_another_size_have_no_pool(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    large, small = torch.rand(9, 1, 6, 6), torch.rand(2, 1, 4, 4)
    probes = {"train": (large, torch.zeros(9)), "test": (small, torch.zeros(2))}
    tracker = MarginTracker(tmp_path / "run", {k: (x, y.long()) for k, (x, y) in probes.items()}, ["cascade"])
    tracker.update(0, network)
    rows = read_run(tmp_path / "run").margins
    assert (rows["status"] != "failed").all()
    with pytest.raises(InputError, match="expected a pool of images"):
        measure_with(
            network, small, create("cascade"), "l2", MeasureOptions(), pool=classified(network, large, MeasureOptions())
        )


def test_another_split_first_is_another_pool(tmp_path: Path) -> None:
    network, images, points = digits()
    train, test = (points, network(points).argmax(1)), (images, network(images).argmax(1))
    MarginTracker(tmp_path / "run", {"train": train, "test": test}, ["cascade"]).update(0, network)
    with pytest.raises(StoreError, match="expected the images of train as the pool of the run, got those of test"):
        MarginTracker(tmp_path / "run", {"test": test, "train": train}, ["cascade"])
    MarginTracker(tmp_path / "other", {"train": train, "test": test}, ["linear"]).update(0, network)
    assert "pool" not in read_run(tmp_path / "other").manifest


def test_the_tracker_takes_its_first_split_as_the_pool(tmp_path: Path) -> None:
    network, images, points = digits()
    labels = network(points).argmax(1)
    probes = {"train": (points, labels), "test": (images, network(images).argmax(1))}
    tracker = MarginTracker(tmp_path / "run", probes, ["cascade"])
    tracker.update(0, network)
    tracked = tracker.folder.margin_parts(0)
    assert len(tracked) == 2
    run = read_run(tmp_path / "run")
    rows = run.margins[run.margins["split"] == "test"].reset_index(drop=True)
    alone = measure_margins(network, images, ["cascade"], pool=points)
    without = measure_margins(network, images, ["cascade"])
    assert (rows["distance"] == alone["distance"]).all()
    assert (rows["distance"] != without["distance"]).any()
    assert run.manifest["pool"] == {"split": "train", "images": POOL, "sha256": run.manifest["probes"]["train"]}


@pytest.mark.slow
def test_workers_share_the_pool(tmp_path: Path) -> None:
    network, images, points = digits()
    probes = {"train": (points, network(points).argmax(1)), "test": (images, network(images).argmax(1))}
    tables = []
    for name, engine in (("here", None), ("workers", Workers(2, threads=1))):
        tracker = MarginTracker(tmp_path / name, probes, ["cascade"], engine=engine)
        tracker.update(0, network)
        tracker.close()
        tables.append(read_run(tmp_path / name).margins.drop(columns="seconds"))
    assert tables[0].equals(tables[1])
