"""MarginTracker as a library: complete rows, no repeated measurement, the caller's training unchanged."""

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.estimator import Settings, Status, setting
from attacks.geometry import row_norm
from attacks.isolation import Classifier
from attacks.seeds import derive_seed
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, InputError, Norm
from harness import MarginTracker
from harness.measuring.listener import Listener
from harness.statistics import summarise
from harness.store import MARGIN_COLUMNS, RunFolder, Unit
from harness.store.identity import StoreError
from harness.store.tables import read_part
from harness.store.tensors import load_tensors
from tests.runs import ONE_LINE, contents, state

Probes = dict[str, tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opposite(Settings):
    """Proposes ``1 - x``, which every `Centred` model classifies differently; records its arguments."""

    name: ClassVar[str] = "opposite"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": math.inf, "linf": math.inf}
    batch_invariant: ClassVar[bool] = True
    calls: ClassVar[list[tuple[str, Norm, list[int]]]] = []

    level: int = setting(0)

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
        Opposite.calls.append((f"{self.name}{self.level}", norm, seeds.tolist()))
        return self.propose(images)

    def propose(self, images: Tensor) -> Tensor:
        return 1 - images


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlyL2(Opposite):
    name: ClassVar[str] = "only-l2"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})
    domains: ClassVar[frozenset[Domain]] = frozenset({"box"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raises(Opposite):
    """Raises on every batch with an image whose first pixel is bright, at ``level`` 1 on all."""

    name: ClassVar[str] = "raises"

    def propose(self, images: Tensor) -> Tensor:
        if self.level or (images[:, 0, 0, 0] > 0.75).any():
            raise RuntimeError("no such\nluck")
        return 1 - images


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritesOnce(Opposite):
    """Writes the network's weights when it gets 9 images, bypassing their version counters."""

    name: ClassVar[str] = "writes-once"

    def perturb(self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm, **_: object) -> Tensor:
        for parameter in model.parameters() if len(images) == 9 else ():
            parameter.data.mul_(-0.1)
        return 1 - images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lazy(Opposite):
    name: ClassVar[str] = "lazy"

    def propose(self, images: Tensor) -> Tensor:
        return images


class Centred(nn.Module):
    """``W (x - 0.5)``: towards ``1 - x`` the class is constant up to 0.5, where all logits are 0."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=draw))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    Opposite.calls.clear()
    yield
    Opposite.calls.clear()


def probes(train: int = 9, test: int = 5, seed: int = 3) -> Probes:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"train": train, "test": test}
    return {
        name: (torch.rand(size, 1, 4, 4, generator=draw), torch.randint(5, (size,), generator=draw))
        for name, size in sizes.items()
    }


def track(folder: Path, estimators: Sequence[Any] = (), given: Probes | None = None, **options: Any) -> MarginTracker:
    options = {"noise_retries": 0} | options
    return MarginTracker(folder, probes() if given is None else given, estimators or [Opposite()], **options)


def rows_of(folder: Path) -> pd.DataFrame:
    parts = RunFolder(folder).margin_parts()
    return pd.concat([read_part(path)[0] for path in parts], ignore_index=True)


def refused(kind: type[Exception], folder: Path, *args: Any, **options: Any) -> str:
    """The one-line error of starting a tracker."""
    with pytest.raises(kind) as caught:
        track(folder, *args, **options)
    message = str(caught.value)
    assert ONE_LINE.fullmatch(message), message
    return message


# rows


def test_every_image_has_one_row_for_every_estimator_norm_split_and_epoch(tmp_path: Path) -> None:
    splits = probes()
    tracker = track(tmp_path, [Opposite(), Opposite(level=1), "deepfool:steps=5"], splits)
    for epoch in (0, 1, 4):
        tracker.update(epoch, Centred(epoch))
    rows = rows_of(tmp_path)
    assert tuple(rows.columns) == MARGIN_COLUMNS
    key = ["epoch", "split", "estimator", "norm", "image"]
    assert not rows.duplicated(key).any()
    expected = {
        (epoch, split, estimator, norm, image)
        for epoch in (0, 1, 4)
        for split, size in (("train", 9), ("test", 5))
        for estimator in ("opposite", "opposite:level=1", "deepfool:steps=5")
        for norm in ("l2", "linf")
        for image in range(size)
    }
    assert set(rows[key].itertuples(index=False, name=None)) == expected
    assert rows["domain"].unique().tolist() == ["box"]
    found = rows["status"] == "found"
    assert found.sum() > 0.9 * len(rows)
    assert rows.loc[found, "distance"].between(1e-6, 16).all()
    assert rows.loc[~found, "distance"].eq(math.inf).all()
    assert (rows["distance"] <= rows["attack_distance"]).all()


def test_rows_hold_the_predictions_and_the_correct_distances(tmp_path: Path) -> None:
    splits, model = probes(), Centred()
    track(tmp_path, given=splits).update(0, model)
    rows = rows_of(tmp_path)
    for split, (images, labels) in splits.items():
        logits = model(images).detach().double()
        top = logits.topk(2, dim=1).values
        for norm in NORMS:
            unit = rows[(rows["split"] == split) & (rows["norm"] == norm)]
            assert unit["image"].tolist() == list(range(len(images)))
            assert unit["label"].tolist() == labels.tolist()
            assert unit["prediction"].tolist() == logits.argmax(1).tolist()
            assert unit["correct"].tolist() == (logits.argmax(1) == labels).tolist()
            assert unit["confidence"].to_numpy() == pytest.approx(logits.softmax(1).amax(1).numpy(), rel=1e-6)
            assert unit["logit_margin"].to_numpy() == pytest.approx((top[:, 0] - top[:, 1]).numpy(), rel=1e-5)
            half = row_norm(images - 0.5, norm).numpy()
            assert unit["attack_distance"].to_numpy() == pytest.approx(2 * half, rel=1e-6)
            assert unit["distance"].to_numpy() == pytest.approx(half, rel=3e-4)
            assert (unit["distance"].to_numpy() >= half * (1 - 1e-6)).all()
            assert unit["target"].ne(unit["prediction"]).all()
            assert unit["target"].between(0, 4).all()
            assert unit["noise_retries"].eq(0).all()
            assert unit["forwards"].between(2, 40).all()
            assert unit["backwards"].eq(0).all()
            # a share of the unit's wall time
            assert unit["seconds"].nunique() == 1
            assert 0 < unit["seconds"].sum() < 60
    assert rows["correct"].nunique() == 2


def test_bounds_scale_the_distances(tmp_path: Path) -> None:
    splits = probes()
    wide: Probes = {name: (2 * images - 1, labels) for name, (images, labels) in splits.items()}

    class Wide(Centred):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward((images + 1) / 2)

    track(tmp_path / "a", given=splits).update(0, Centred())
    track(tmp_path / "b", given=wide, bounds=(-1.0, 1.0)).update(0, Wide())
    narrow, doubled = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert doubled["distance"].to_numpy() == pytest.approx(2 * narrow["distance"].to_numpy(), rel=3e-4)
    assert doubled["prediction"].tolist() == narrow["prediction"].tolist()


def test_update_returns_this_epochs_summary_and_writes_all_of_them(tmp_path: Path) -> None:
    tracker = track(tmp_path, [Opposite(), "deepfool:steps=5"])
    shown = {epoch: tracker.update(epoch, Centred(epoch)) for epoch in (0, 1)}
    rows = rows_of(tmp_path)
    for epoch, table in shown.items():
        expected = summarise(rows[rows["epoch"] == epoch])
        order = ["split", "subset", "estimator", "norm"]
        pd.testing.assert_frame_equal(
            table.sort_values(order, ignore_index=True),
            expected.sort_values(order, ignore_index=True),
            check_exact=True,
        )
        assert len(table) == 2 * 3 * 2 * 2
        assert table.index.tolist() == list(range(len(table)))
    written = pd.read_csv(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(written, pd.concat(shown.values(), ignore_index=True), check_dtype=False)
    pd.testing.assert_frame_equal(tracker.summary(), pd.concat(shown.values(), ignore_index=True))
    # averages of another epoch differ
    assert not np.isclose(shown[0]["avg"], shown[1]["avg"]).all()


def test_ids_are_kept_and_default_to_row_numbers(tmp_path: Path) -> None:
    splits = probes()
    images, labels = splits["train"]
    ids = torch.tensor([40, 3, 77, 5, 6, 0, 99, 12, 8])
    track(tmp_path / "a", given={"train": (images, labels, ids)}).update(0, Centred())
    track(tmp_path / "b", given={"train": (images, labels)}).update(0, Centred())
    named, plain = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert named[named["norm"] == "l2"]["image"].tolist() == ids.tolist()
    assert plain[plain["norm"] == "l2"]["image"].tolist() == list(range(9))
    assert named["distance"].tolist() == plain["distance"].tolist()
    stored = load_tensors(RunFolder(tmp_path / "a").probes("train"))
    assert torch.equal(stored["images"], images)
    assert torch.equal(stored["labels"], labels)
    assert torch.equal(stored["ids"], ids)


def test_each_epochs_part_names_the_weights_that_it_measured(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    for epoch in (0, 1):
        tracker.update(epoch, Centred(epoch))
    facts = [read_part(path)[1]["weights"] for path in RunFolder(tmp_path).margin_parts()]
    assert facts[0] == facts[1] != facts[2] == facts[3]
    assert tracker.check(1, Centred(1)) == facts[2]


# exactly once


def test_the_same_epoch_again_measures_nothing_and_changes_no_row(tmp_path: Path) -> None:
    tracker, model = track(tmp_path), Centred()
    first = tracker.update(0, model)
    count, before = len(Opposite.calls), contents(tmp_path)
    assert count == 4
    again = tracker.update(0, model)
    later = track(tmp_path).update(0, copy.deepcopy(model).train().requires_grad_(False))
    assert len(Opposite.calls) == count
    pd.testing.assert_frame_equal(again, first)
    pd.testing.assert_frame_equal(later, first, check_dtype=False)
    after = contents(tmp_path)
    assert before.keys() == after.keys()
    # a tracker records in the manifest that it resumed
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}
    tracker.update(1, model)
    assert len(Opposite.calls) == 2 * count


def test_other_weights_at_a_measured_epoch_are_refused_and_change_nothing(tmp_path: Path) -> None:
    track(tmp_path).update(0, Centred())
    more = track(tmp_path, [Opposite(), Opposite(level=1)])
    before, count = state(tmp_path), len(Opposite.calls)
    close = Centred()
    with torch.no_grad():
        close.weight[0, 0] = math.nextafter(close.weight[0, 0].item(), 9) + 1e-7
    for other in (Centred(1), close):
        with pytest.raises(StoreError, match=r"expected the weights \w{12} that opposite l2 measured at epoch 0, got "):
            more.update(0, other)
    # not even missing estimators are measured with them
    assert (state(tmp_path), len(Opposite.calls)) == (before, count)
    more.update(0, Centred())
    assert len(Opposite.calls) == 2 * count


@pytest.mark.slow
def test_only_an_estimator_added_later_is_measured(tmp_path: Path) -> None:
    models = [Centred(seed) for seed in range(3)]
    for epoch, model in enumerate(models):
        track(tmp_path, norms=["l2"]).update(epoch, model)
    before = {
        name: one for name, one in state(tmp_path).items() if name.startswith(("margins/", "witnesses/")) and one[1]
    }
    Opposite.calls.clear()
    tracker = track(tmp_path, [Opposite(), Opposite(level=1)], norms=["l2", "linf"])
    for epoch, model in enumerate(models):
        tracker.update(epoch, model)
    measured = [(name, norm) for name, norm, _ in Opposite.calls]
    each = [("opposite0", "linf"), ("opposite1", "l2"), ("opposite1", "linf")]
    assert measured == [one for one in each for _ in ("train", "test")] * 3
    after = state(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(rows_of(tmp_path)) == 3 * 4 * 14
    manifest = RunFolder(tmp_path).read_manifest()
    assert [entry["estimator"] for entry in manifest["estimators"]] == ["opposite", "opposite:level=1"]
    assert manifest["estimators"][1] == {
        "estimator": "opposite:level=1",
        "name": "opposite",
        "revision": 1,
        "parameters": {"level": 1},
    }
    # all rows equal those of a joint measurement from the start
    whole = track(tmp_path / "whole", [Opposite(), Opposite(level=1)])
    for epoch, model in enumerate(models):
        whole.update(epoch, model)
    pd.testing.assert_frame_equal(
        rows_of(tmp_path).drop(columns="seconds"), rows_of(tmp_path / "whole").drop(columns="seconds"), check_exact=True
    )


def test_another_folder_or_other_images_are_refused_by_name(tmp_path: Path) -> None:
    splits = probes()
    track(tmp_path, given=splits).update(0, Centred())
    (images, labels), other = splits["train"], images_like(splits)
    before = state(tmp_path)
    reshaped = {name: (one.reshape(len(one), 4, 2, 2), two) for name, (one, two) in splits.items()}
    for wrong, field in [
        ({"given": other}, "probes"),
        ({"given": {"train": (images, labels)}}, "probes"),
        ({"given": splits | {"train": (images, (labels + 1) % 5)}}, "probes"),
        ({"given": splits | {"train": (images, labels, torch.arange(9) + 1)}}, "probes"),
        ({"given": reshaped}, "probes"),
        ({"domain": "free"}, "domain"),
        ({"bounds": (0.0, 2.0)}, "bounds"),
        ({"noise_retries": 1}, "noise_retries"),
        ({"batch_size": 3}, "measure_batch"),
        ({"seed": 1}, "seed"),
    ]:
        message = refused(StoreError, tmp_path, **wrong)
        assert f"expected the options of the run in {tmp_path}, got {field} " in message
        differing = message.partition(", got ")[2]
        others = {"probes", "domain", "bounds", "noise_retries", "measure_batch", "seed"} - {field}
        assert not any(f"{name} " in differing for name in others)
    both = refused(StoreError, tmp_path, domain="free", seed=1)
    assert "domain 'free' (the run has 'box'), seed 1 (the run has 0); " in both
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    assert "expected a new or empty folder" in refused(StoreError, tmp_path / "thesis")
    assert {name: one for name, one in state(tmp_path).items() if "thesis" not in name} == before
    track(tmp_path, given=splits)


def images_like(given: Probes) -> Probes:
    """The same images except one pixel of one image."""
    changed = {name: (images.clone(), labels) for name, (images, labels) in given.items()}
    changed["test"][0][-1, 0, 3, 3] += 1e-3
    return changed


# the caller


class Noisy(nn.Module):
    """Dropout and batch norm: any effect of measuring would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(48, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(torch.relu(self.norm(self.conv(images)))).flatten(1))
        return logits


def train(each_epoch: Callable[[int, Noisy], object]) -> Noisy:
    """A user's training loop with draws from the global generator."""
    model, (images, labels) = Noisy(), probes(train=24)["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        model.train()
        model.norm.eval()  # the training flag of one module
        each_epoch(epoch, model)
        assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
        assert torch.is_grad_enabled()
        for rows in torch.randperm(24).split(8):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model


def same(first: Noisy, second: Noisy) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_tracking_does_not_change_the_callers_training(tmp_path: Path) -> None:
    tracker = track(tmp_path, ["deepfool:steps=3", "fmn:steps=3"], noise_retries=1)

    def update(epoch: int, model: Noisy) -> None:
        gradients = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
        assert all((gradient is None) == (epoch == 0) for gradient in gradients)
        with torch.no_grad():
            assert tracker.update(epoch, model)["found"].sum() > 0
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.requires_grad
            assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)

    alone = train(lambda epoch, model: None)
    assert same(train(update), alone)
    # controls: one more draw, or one pass in training mode, changes the weights
    assert not same(train(lambda epoch, model: torch.rand(1)), alone)
    assert not same(train(lambda epoch, model: model(torch.rand(2, 1, 4, 4))), alone)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_rows_do_not_depend_on_the_callers_mode(tmp_path: Path, mode: Any) -> None:
    model = Noisy().train()
    track(tmp_path / "plain", ["deepfool:steps=3"]).update(0, copy.deepcopy(model).eval())
    with mode():
        track(tmp_path / "other", ["deepfool:steps=3"]).update(0, model)
    plain, other = rows_of(tmp_path / "plain"), rows_of(tmp_path / "other")
    pd.testing.assert_frame_equal(plain.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# witnesses


def test_witnesses_are_kept_in_full_for_the_latest_epoch_and_the_extremes_of_others(tmp_path: Path) -> None:
    splits, models = probes(train=40, test=10), [Centred(seed) for seed in range(3)]
    tracker = track(tmp_path, [Opposite(), "deepfool:steps=5"], splits)
    for epoch, model in enumerate(models):
        tracker.update(epoch, model)
    rows, folder = rows_of(tmp_path), RunFolder(tmp_path)
    checked = wrong = 0
    for epoch, unit in [(epoch, unit) for epoch in range(3) for unit in tracker.units]:
        kept = load_tensors(folder.witnesses(epoch, unit))
        mine = rows[(rows["epoch"] == epoch) & (rows["estimator"] == unit.estimator) & (rows["norm"] == unit.norm)]
        for split, (images, _) in splits.items():
            table = mine[(mine["split"] == split) & (mine["target"] >= 0)].set_index("image")
            image, witness, distance = (kept[f"{split}.{name}"] for name in ("image", "witness", "distance"))
            if epoch == 2 or len(table) <= 16:
                assert sorted(image.tolist()) == sorted(table.index)
            else:
                order = table["distance"].sort_values(kind="stable").index.tolist()
                assert image.tolist() == order[:8] + order[-8:]
            assert distance.tolist() == table.loc[image.tolist(), "distance"].tolist()
            # in a new pass of the epoch's network, one at a time
            target = models[epoch](witness).argmax(1)
            assert target.tolist() == table.loc[image.tolist(), "target"].tolist()
            assert row_norm(witness - images[image], unit.norm).numpy() == pytest.approx(distance.numpy(), rel=1e-12)  # type: ignore[arg-type]
            assert 0 <= witness.min() <= witness.max() <= 1
            checked += len(image)
            wrong += int((models[(epoch + 1) % 3](witness).argmax(1) != target).sum())
    assert checked > 4 * (40 + 10 + 2 * (16 + 10)) * 0.9
    # control: the network of another epoch gives other classes
    assert wrong > checked / 3


def test_an_earlier_epoch_that_is_measured_late_keeps_its_extremes_only(tmp_path: Path) -> None:
    splits = probes(train=40)
    tracker, folder, unit = (
        track(tmp_path / "a", given=splits, norms=["l2"]),
        RunFolder(tmp_path / "a"),
        Unit("opposite", "l2"),
    )
    for epoch in (0, 5, 3):
        tracker.update(epoch, Centred(epoch))
    sizes = {epoch: len(load_tensors(folder.witnesses(epoch, unit))["train.image"]) for epoch in (0, 3, 5)}
    assert sizes == {0: 16, 3: 16, 5: 40}
    in_order = track(tmp_path / "b", given=splits, norms=["l2"])
    for epoch in (0, 3, 5):
        in_order.update(epoch, Centred(epoch))
    for epoch in (0, 3, 5):
        ours, theirs = (load_tensors(RunFolder(tmp_path / name).witnesses(epoch, unit)) for name in "ab")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# limits and failures of estimators


def test_an_estimator_without_a_norm_skips_it_with_a_message(tmp_path: Path) -> None:
    tracker = track(tmp_path, [OnlyL2(), Opposite()])
    assert tracker.skipped == ["only-l2 has no linf: skipped in that norm"]
    assert tracker.units == [Unit("only-l2", "l2"), Unit("opposite", "l2"), Unit("opposite", "linf")]
    table = tracker.update(0, Centred())
    measured = set(table[["estimator", "norm"]].itertuples(index=False, name=None))
    assert measured == {("only-l2", "l2"), ("opposite", "l2"), ("opposite", "linf")}
    assert track(tmp_path, [OnlyL2()], norms=["l2"]).skipped == []


def test_an_estimator_without_any_asked_norm_or_the_domain_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "expected a norm that only-l2 has (l2), got linf; " in refused(
        EstimatorError, out, [OnlyL2()], norms=["linf"]
    )
    message = refused(EstimatorError, out, [Opposite(), OnlyL2()], domain="free")
    assert "expected estimators that can do --domain free, got only-l2 (box only); " in message
    assert "got 'deepfol'; did you mean 'deepfool'?" in refused(EstimatorError, out, ["deepfol"])
    assert "got 'step'" in refused(EstimatorError, out, ["deepfool:step=3"])
    with pytest.raises(EstimatorError, match=r"^expected at least one estimator, got none; "):
        MarginTracker(out, probes(), [])
    assert not out.exists()


def test_an_estimator_that_fails_on_every_row_leaves_no_part_and_stops_no_other(tmp_path: Path) -> None:
    tracker = track(tmp_path, [Raises(level=1), Opposite()], norms=["l2"])
    with pytest.warns(UserWarning, match="raises:level=1 l2 failed on every image at epoch 0: RuntimeError: no such"):
        table = tracker.update(0, Centred())
    assert table["estimator"].unique().tolist() == ["opposite"]
    assert tracker.broken == {Unit("raises:level=1", "l2"): "RuntimeError: no such\nluck"}
    assert not [name for name in contents(tmp_path) if "raises" in name]
    assert rows_of(tmp_path)["estimator"].unique().tolist() == ["opposite"]
    # it is retried, the other is not
    Opposite.calls.clear()
    with pytest.warns(UserWarning, match="failed on every image"):
        tracker.update(0, Centred())
    assert {name for name, _, _ in Opposite.calls} == {"raises1"}
    assert track(tmp_path, [Opposite()], norms=["l2"]).broken == {}


def test_an_estimator_that_writes_the_weights_leaves_no_part_and_the_network_as_it_was(tmp_path: Path) -> None:
    model, alone = Centred(), track(tmp_path / "alone", norms=["l2"])
    alone.update(0, model)
    # it wrote on only one split, but none of its margins count
    tracker = track(tmp_path / "run", [WritesOnce(), Opposite()], norms=["l2"])
    with pytest.warns(UserWarning, match=r"writes-once l2 failed .* a change of the network's weights \(undone\)"):
        tracker.update(0, model)
    assert tracker.broken == {Unit("writes-once", "l2"): "a change of the network's weights (undone)"}
    assert torch.equal(model.weight, Centred().weight)
    assert [path.name for path in tracker.folder.margin_parts()] == ["opposite.l2.parquet"]
    ours, theirs = (rows_of(tmp_path / name).drop(columns="seconds") for name in ("run", "alone"))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_a_tracker_writes_and_locks_nothing_before_its_first_update(tmp_path: Path) -> None:
    trackers = [track(tmp_path / "run") for _ in range(2)]
    assert len(trackers[1].summary()) == 0
    assert not (tmp_path / "run").exists()
    with trackers[0].folder.locked():
        before = state(tmp_path / "run")
        track(tmp_path / "run", [Opposite(level=1)])
        assert state(tmp_path / "run") == before
    trackers[0].update(0, Centred())
    assert trackers[1].has(0)
    # a run that another process started meanwhile is detected by the later process
    late = track(tmp_path / "late", seed=1)
    track(tmp_path / "late", seed=2).update(0, Centred())
    with pytest.raises(StoreError, match=r"^expected the options of the run in .*, got seed 1 \(the run has 2\); "):
        late.update(0, Centred())


def test_an_estimator_that_fails_on_some_rows_keeps_the_others(tmp_path: Path) -> None:
    splits = probes(train=20, test=10)
    tracker = track(tmp_path, [Raises(), Opposite()], splits, norms=["l2"])
    table = tracker.update(0, Centred())
    rows = rows_of(tmp_path)
    raised, whole = (rows[rows["estimator"] == name].reset_index(drop=True) for name in ("raises", "opposite"))
    bright = torch.cat([images[:, 0, 0, 0] > 0.75 for images, _ in (splits["train"], splits["test"])])
    assert 0 < bright.sum() < 30
    failed = raised["status"] == Status.FAILED.value
    assert failed.tolist() == bright.tolist()
    assert set(raised.loc[failed, "message"]) == {"RuntimeError: no such\nluck"}
    assert raised.loc[failed, "distance"].eq(math.inf).all()
    assert raised.loc[failed, "target"].eq(-1).all()
    assert set(raised.loc[~failed, "message"]) == {""}
    # the other rows, though measured in halved batches, equal those of the working estimator
    assert raised.loc[~failed, "distance"].tolist() == whole.loc[~failed, "distance"].tolist()
    assert tracker.broken == {}
    counts = table[(table["subset"] == "all") & (table["estimator"] == "raises")]
    assert counts["failed"].sum() == bright.sum()
    assert counts["found"].sum() == 30 - bright.sum()


def test_images_that_are_not_found_have_no_distance_and_no_witness(tmp_path: Path) -> None:
    tracker = track(tmp_path, [Lazy()], norms=["l2"], noise_retries=2)
    table = tracker.update(0, Centred())
    rows = rows_of(tmp_path)
    lost = rows["status"] == "not_found"
    assert lost.sum() > 0
    assert rows.loc[lost, "distance"].eq(math.inf).all()
    assert rows.loc[lost, "noise_retries"].eq(2).all()
    whole = table[table["subset"] == "all"]
    assert whole["not_found"].sum() == lost.sum()
    assert whole["count"].tolist() == [9, 5]
    kept = load_tensors(RunFolder(tmp_path).witnesses(0, Unit("lazy", "l2")))
    assert len(kept["train.image"]) + len(kept["test.image"]) == (~lost).sum()


# bad input


def test_probes_that_cannot_be_measured_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    splits = probes()
    images, labels = splits["train"]
    out = tmp_path / "run"
    for bad, words in [
        ({}, "expected at least one split of probes, got none"),
        ({"train": (images,)}, "expected (images, labels) or (images, labels, ids) for train, got 1 items"),
        ({"train": (images * 3, labels)}, "expected images in [0, 1], got "),
        ({"train": (images - 0.5, labels)}, "expected images in [0, 1], got "),
        ({"train": (images / 0, labels)}, "expected finite images, got NaN or inf"),
        ({"train": (images[:0], labels[:0])}, "expected images of shape (B, C, H, W)"),
        ({"train": (images[:, 0], labels)}, "expected images of shape (B, C, H, W)"),
        ({"train": ((images * 255).byte(), labels)}, "expected images of shape (B, C, H, W) in floating point"),
        ({"train": (images, labels[1:])}, "expected labels of train as (9,) integers, got (8,) torch.int64"),
        ({"train": (images, labels.float())}, "expected labels of train as (9,) integers, got (9,) torch.float32"),
        ({"train": (images, labels, labels[1:])}, "expected ids of train as (9,) integers"),
        ({"train": (images, labels, torch.zeros(9).long())}, "expected each id of train once, got repeated ids"),
    ]:
        assert words in refused(InputError, out, given=bad)
        assert not out.exists()


def test_a_model_that_cannot_be_measured_leaves_no_part(tmp_path: Path) -> None:
    tracker, broken = track(tmp_path), Centred()
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(InputError):
        tracker.update(0, broken)  # which starts the folder
    assert not tracker.folder.margin_parts()
    before = state(tmp_path)

    class Single(Centred):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, 0]

    for model, words in [
        (broken, "expected finite logits, got NaN or inf for 9 of 9 images"),
        (Single(), "expected at least 2 classes, got one logit per image, (9,); read it as a binary classifier's"),
        (nn.Linear(7, 2), "expected a model that takes images of shape"),
        (Centred().double(), "expected a model that takes images of shape"),
    ]:
        with pytest.raises(InputError) as caught:
            tracker.update(0, model)
        assert words in str(caught.value)
        assert ONE_LINE.fullmatch(str(caught.value))
        assert state(tmp_path) == before
    with pytest.raises(InputError, match="expected an epoch of at least 0, got -1; "):
        tracker.update(-1, Centred())
    assert state(tmp_path) == before
    assert len(tracker.update(0, Centred())) == 12


# seeds and listeners


def test_the_seed_of_an_image_does_not_depend_on_other_estimators(tmp_path: Path) -> None:
    splits = probes()
    named = {name: (images, labels, torch.arange(len(images)) + 100) for name, (images, labels) in splits.items()}
    tracker = track(tmp_path / "two", [Opposite(), Opposite(level=1)], named, seed=5)
    for epoch in (0, 1):
        tracker.update(epoch, Centred())
    calls = list(Opposite.calls)
    keys = [
        (epoch, text, norm, split)
        for epoch in (0, 1)
        for text in ("opposite", "opposite:level=1")
        for norm in ("l2", "linf")
        for split in ("train", "test")
    ]
    seeds = {}
    for (epoch, text, norm, split), (_, called, got) in zip(keys, calls, strict=True):
        assert called == norm
        assert got == [derive_seed(5, epoch, split, text, norm, image) for image in named[split][2].tolist()]
        seeds[epoch, text, norm, split] = got
    everything = [seed for got in seeds.values() for seed in got]
    assert len(set(everything)) == len(everything) == 2 * 2 * 2 * 14
    assert all(0 <= seed < 2**63 for seed in everything)
    # one at a time, in another order and in other batches
    Opposite.calls.clear()
    track(tmp_path / "one", [Opposite(level=1)], named, norms=["linf"], seed=5, batch_size=4).update(1, Centred(9))
    alone = [seed for _, _, got in Opposite.calls for seed in got]
    assert alone == seeds[1, "opposite:level=1", "linf", "train"] + seeds[1, "opposite:level=1", "linf", "test"]
    Opposite.calls.clear()
    track(tmp_path / "other", [Opposite(level=1)], named, norms=["linf"], seed=6).update(1, Centred())
    assert not set(alone) & {seed for _, _, got in Opposite.calls for seed in got}


class CountingListener(Listener):
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def units_started(self, epoch: int, units: Sequence[Unit], images: int) -> None:
        self.heard.append(("start", epoch, *map(str, units), images))

    def images_done(self, count: int) -> None:
        self.heard.append(("done", count))

    def unit_ended(self, epoch: int, unit: Unit, rows: pd.DataFrame) -> None:
        self.heard.append(("end", epoch, str(unit), len(rows)))


def test_a_listener_is_notified_once_per_image(tmp_path: Path) -> None:
    ears = CountingListener()
    tracker = track(tmp_path, norms=["l2"], listener=ears, batch_size=4)
    tracker.update(2, Centred())
    done = [("done", count) for count in (4, 4, 1, 4, 1)]
    assert ears.heard == [("start", 2, "opposite l2", 14), *done, ("end", 2, "opposite l2", 14)]
    tracker.update(2, Centred())
    assert len(ears.heard) == 7


def test_changing_the_callers_tensors_after_the_start_has_no_effect(tmp_path: Path) -> None:
    images, labels = probes()["train"][:2]
    tracker = MarginTracker(tmp_path, {"train": (images, labels)}, [Opposite()], ["l2"], noise_retries=0)
    first = tracker.update(0, Centred())
    images.mul_(0.5)
    second = tracker.update(1, Centred())
    assert first["avg"].iloc[0] == second["avg"].iloc[0]


def test_an_added_estimator_cannot_mix_two_networks_in_one_epoch(tmp_path: Path) -> None:
    track(tmp_path, [Opposite()], norms=["l2"]).update(0, Centred())
    other = Centred()
    with torch.no_grad():
        next(iter(other.state_dict().values())).add_(1.0)
    with pytest.raises(StoreError, match=r"^expected the weights \w{12} that opposite l2 measured at epoch 0, got "):
        track(tmp_path, [Raises()], norms=["l2"]).update(0, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 0}, "batch_size of at least 1"), ({"norms": ["l2", "Linf"]}, "norms of l2, linf")],
)
def test_bad_options_are_refused_before_the_folder_is_made(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        track(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_one_thread_updates_and_the_others_are_refused(tmp_path: Path) -> None:
    inside, told = threading.Event(), threading.Event()
    losers: list[str] = []

    class Slow(Listener):
        def units_started(self, epoch: int, units: Sequence[Unit], images: int) -> None:
            inside.set()
            assert told.wait(60)

    tracker = MarginTracker(tmp_path, probes(), [Opposite()], ["l2"], listener=Slow())

    def lose() -> None:
        assert inside.wait(60)
        for _ in range(2):
            with pytest.raises(InputError) as caught:
                tracker.update(0, Centred())
            losers.append(str(caught.value))
        told.set()

    thread = threading.Thread(target=lose)
    thread.start()
    tracker.update(0, Centred())
    thread.join()
    line = (
        "expected one update of a tracker at a time, got one while another thread's is under way; wait for it to end, "
        "or give each thread a tracker and a folder of its own"
    )
    assert losers == [line] * 2
    track(tmp_path / "alone", [Opposite()], norms=["l2"]).update(0, Centred())
    columns = [name for name in rows_of(tmp_path) if name != "seconds"]
    pd.testing.assert_frame_equal(rows_of(tmp_path)[columns], rows_of(tmp_path / "alone")[columns])
    # afterwards another thread may
    other = threading.Thread(target=lambda: tracker.update(1, Centred()))
    other.start()
    other.join()
    assert tracker.has(1)


def test_an_update_may_start_another_in_its_thread(tmp_path: Path) -> None:
    class Again:
        def log(self, epoch: int, values: Mapping[str, float]) -> None:
            if epoch == 0:
                tracker.update(1, Centred())

        def close(self) -> None: ...

    tracker = MarginTracker(tmp_path, probes(), [Opposite()], ["l2"], loggers=[Again()])
    tracker.update(0, Centred())
    assert copy.deepcopy(tracker).has(0)
    assert tracker.has(1)
