"""Arguments of wrong type or value give one-line errors; convertible arguments are converted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils import data

from attacks.arguments import plain_bounds
from attacks.certify.certifiers import Crown
from attacks.certify.exact import exact_margins
from attacks.estimators.linear import Linear
from attacks.measure import measure
from attacks.registry import create
from attacks.types import EstimatorError, InputError
from harness import MarginTracker, measure_margins
from harness.data.probes import LayoutWarning, Probe, as_probe
from harness.runs import read_run, read_runs
from harness.store.identity import StoreError
from harness.tasks import InProcess

ONE_LINE = re.compile(r"expected [^\n]+, got [^\n]+; [^\n]+")
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.rand(6, 1, 2, 2, generator=DRAW)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BOUNDS = (0.0, 1.0)
BOUNDS_WORDS = "expected bounds as two finite numbers, the smaller one first, got "


class Items(data.Dataset[Any]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, row: int) -> Any:
        return IMAGES[row], int(LABELS[row])


class Named(Items):
    def __getitem__(self, row: int) -> Any:
        return {"image": IMAGES[row], "label": int(LABELS[row])}


class Alone(Items):
    def __getitem__(self, row: int) -> Any:
        return IMAGES[row]


class Stream(data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Items()[row] for row in torch.randperm(len(IMAGES)).tolist())


class RandomBatches(data.Sampler[list[int]]):
    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        return iter(part.tolist() for part in torch.randperm(len(IMAGES)).view(3, 2))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


# --- splits ---

ALIKE: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (IMAGES, LABELS),
    "dict": lambda: {"labels": LABELS, "images": IMAGES},
    "big-endian": lambda: (IMAGES.numpy().astype(">f4"), LABELS.numpy().astype(">i8")),
    "lists of tensors": lambda: (list(IMAGES), list(LABELS)),
    "pandas": lambda: (IMAGES, pd.Series(LABELS.numpy(), index=range(5, 11))),
    "uint64": lambda: (IMAGES.numpy(), LABELS.numpy().astype(np.uint64)),
    "Dataset": Items,
    "Dataset of dicts": Named,
    "DataLoader": lambda: data.DataLoader(Items(), 4),
    "batch_sampler in order": lambda: data.DataLoader(
        Items(), batch_sampler=data.BatchSampler(data.SequentialSampler(Items()), 4, drop_last=False)
    ),
    "drop_last without a rest": lambda: data.DataLoader(Items(), 3, drop_last=True),
}


@pytest.mark.parametrize("given", ALIKE.values(), ids=ALIKE)
def test_a_split_is_read_from(given: Callable[[], Any]) -> None:
    probe = as_probe("test", given(), BOUNDS)
    assert torch.equal(probe.images, IMAGES)
    assert torch.equal(probe.labels, LABELS)
    assert probe.labels.dtype == probe.ids.dtype == torch.int64
    assert probe.ids.tolist() == list(range(6))


def test_negative_strides_keep_the_order_of_images() -> None:
    probe = as_probe("test", (IMAGES.numpy()[::-1], LABELS.numpy()[::-1], range(6)), BOUNDS)
    assert torch.equal(probe.images, IMAGES.flip(0))
    assert probe.labels.tolist() == [2, 1, 0, 2, 1, 0]


def test_ids_of_a_subset_are_its_indices() -> None:
    probe = as_probe("test", data.Subset(Items(), [4, 1]), BOUNDS)
    assert probe.ids.tolist() == [4, 1]
    assert torch.equal(probe.images, IMAGES[[4, 1]])


@pytest.mark.parametrize("given", [Items(), data.DataLoader(Items(), 2)])
def test_reading_a_data_set_leaves_the_global_generator(given: Any) -> None:
    before = torch.get_rng_state()
    as_probe("test", given, BOUNDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_a_loader_leaves_its_own_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    as_probe("test", data.DataLoader(Items(), 2, generator=generator), BOUNDS)
    assert torch.equal(generator.get_state(), before)


SPLITS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "expected (images, labels) or (images, labels, ids) for test, got NoneType; give them so"),
    "text": (lambda: "data", "(images, labels, ids) for test, got str"),
    "tensor": (lambda: IMAGES, "(images, labels, ids) for test, got Tensor"),
    "set": (lambda: {1, 2}, "(images, labels, ids) for test, got set"),
    "one item": (lambda: (IMAGES,), "(images, labels, ids) for test, got 1 items; give two or three"),
    "dict of others": (lambda: {"x": IMAGES}, "expected images and labels by these names in test, got ['x']; rename"),
    "no labels": (lambda: (IMAGES, None), "expected labels of test as a tensor or an array of numbers, got NoneType"),
    "text labels": (lambda: (IMAGES, pd.Series(list("abcabc"))), "array of numbers, got Series of "),
    "ragged images": (lambda: ([[1.0], [1.0, 2.0]], [0, 1]), "expected images of test as a tensor or an array of num"),
    "complex labels": (
        lambda: (IMAGES, LABELS + 0j),
        "expected labels of test as (6,) integers, got (6,) torch.complex",
    ),
    "ids beyond 64 bits": (
        lambda: (IMAGES, LABELS, np.arange(6, dtype=np.uint64) + np.uint64(2**63)),
        "expected ids of test as a tensor or an array of numbers, got ndarray of uint64",
    ),
    "meta images": (lambda: (IMAGES.to("meta"), LABELS), "expected images of test as a tensor or an array of numbers"),
    "IterableDataset": (
        Stream,
        "expected a Dataset with numbered items for test, got the IterableDataset Stream, which",
    ),
    "loader of one": (lambda: data.DataLoader(Stream(), 2), "expected a Dataset with numbered items for test, got the"),
    "shuffle": (lambda: data.DataLoader(Items(), 2, shuffle=True), "in order for test, got one with RandomSampler; "),
    "own batch_sampler": (
        lambda: data.DataLoader(Items(), batch_sampler=RandomBatches()),
        "in order for test, got one with RandomBatches; ",
    ),
    "random batch_sampler": (
        lambda: data.DataLoader(
            Items(), batch_sampler=data.BatchSampler(data.RandomSampler(Items()), 2, drop_last=False)
        ),
        "in order for test, got one with RandomSampler; ",
    ),
    "drop_last": (
        lambda: data.DataLoader(Items(), 4, drop_last=True),
        "expected all 6 images of test, got 4 from its DataLoader; give drop_last=False",
    ),
    "images alone": (Alone, "expected items (image, label) of test, got Tensor alone; give both"),
}


@pytest.mark.parametrize(("given", "words"), SPLITS.values(), ids=SPLITS)
def test_an_invalid_split_gives_a_one_line_error(given: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        as_probe("test", given(), BOUNDS)
    assert words in str(caught.value)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


# --- the tracker ---

TRACKER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"out": 5}, InputError, "expected out as a path, got 5; give a text or a pathlib.Path"),
    (
        {"probes": None},
        InputError,
        "expected probes as a dict of splits, got NoneType; give {'test': (images, labels)}",
    ),
    ({"probes": (IMAGES, LABELS)}, InputError, "expected probes as a dict of splits, got tuple; "),
    ({"probes": {}}, InputError, "expected at least one split of probes, got none; "),
    ({"probes": {0: (IMAGES, LABELS)}}, InputError, "expected names of splits as texts, got 0; "),
    ({"probes": {"": (IMAGES, LABELS)}}, InputError, "expected names of splits as texts, got ''; "),
    ({"estimators": None}, EstimatorError, "expected estimators as texts or objects, got None; "),
    ({"estimators": [5]}, EstimatorError, "expected estimators as texts or objects, got 5; "),
    (
        {"estimators": [Linear]},
        EstimatorError,
        "expected estimators as texts or objects, got <class 'attacks.estimators.linear.",
    ),
    ({"estimators": ()}, EstimatorError, "expected at least one estimator, got none; "),
    ({"norms": [2]}, InputError, "expected norms of l2, linf, got 2; choose one or both"),
    ({"norms": None}, InputError, "expected norms of l2, linf, got None; choose one or both"),
    ({"norms": []}, InputError, "expected norms of l2, linf, got none; choose one or both"),
    ({"norms": [["l2"]]}, InputError, "expected norms of l2, linf, got ['l2']; choose one or both"),
    ({"domain": "sphere"}, InputError, "expected a domain of box, free, got 'sphere'; choose one of them"),
    ({"domain": ["box"]}, InputError, "expected a domain of box, free, got ['box']; choose one of them"),
    ({"certifiers": [5]}, EstimatorError, "expected certifiers as texts or objects, got 5; "),
    ({"certifiers": [Crown]}, EstimatorError, "expected certifiers as texts or objects, got <class "),
    ({"certifiers": "nothing"}, EstimatorError, "expected a certifier of crown, ibp, exact, got 'nothing'; "),
    ({"certify_every": 0}, InputError, "expected certify_every of at least 1, got 0; give a whole number"),
    ({"certify_every": 1.5}, InputError, "expected certify_every of at least 1, got 1.5; give a whole number"),
    ({"certify_probe": 0}, InputError, "expected certify_probe of at least 1, got 0; give a whole number"),
    ({"cold_every": None}, InputError, "expected cold_every of at least 1, got None; give a whole number"),
    ({"batch_size": 2.5}, InputError, "expected batch_size of at least 1, got 2.5; give a whole number"),
    ({"batch_size": "2"}, InputError, "expected batch_size of at least 1, got '2'; give a whole number"),
    (
        {"batch_size": 2**70},
        InputError,
        "expected batch_size of at most 9223372036854775807, got 1180591620717411303424",
    ),
    ({"noise_retries": True}, InputError, "expected noise_retries of at least 0, got True; give a whole number"),
    ({"seed": "a"}, InputError, "expected seed as a whole number, got 'a'; give a whole number"),
    ({"seed": 1.5}, InputError, "expected seed as a whole number, got 1.5; give a whole number"),
    ({"warm_start": "no"}, InputError, "expected warm_start as True or False, got 'no'; give one of them"),
    ({"loggers": "nothing"}, EstimatorError, "expected a logger of tensorboard, wandb, mlflow, got 'nothing'; "),
    ({"loggers": [5]}, EstimatorError, "expected loggers with log and close, got 5; "),
    ({"engine": "ray"}, InputError, "expected engine as an object with run, got 'ray'; "),
    (
        {"engine": InProcess},
        InputError,
        "expected engine as an object with run, got <class 'harness.tasks.InProcess'>; ",
    ),
    ({"listener": 5}, InputError, "expected listener as an object with images_done, got 5; "),
    ({"bounds": (0, math.nan)}, InputError, f"{BOUNDS_WORDS}(0, nan); "),
    ({"bounds": (0, math.inf)}, InputError, f"{BOUNDS_WORDS}(0, inf); "),
    ({"bounds": (-math.inf, 1)}, InputError, f"{BOUNDS_WORDS}(-inf, 1); "),
    ({"bounds": (1, 1)}, InputError, f"{BOUNDS_WORDS}(1, 1); "),
    ({"bounds": (1, 0)}, InputError, f"{BOUNDS_WORDS}(1, 0); "),
    ({"bounds": None}, InputError, f"{BOUNDS_WORDS}None; "),
    ({"bounds": (0,)}, InputError, f"{BOUNDS_WORDS}(0,); "),
    ({"bounds": ("a", "b")}, InputError, f"{BOUNDS_WORDS}('a', 'b'); "),
    ({"bounds": "01"}, InputError, f"{BOUNDS_WORDS}'01'; "),
]


@pytest.mark.parametrize(("change", "error", "words"), TRACKER, ids=lambda value: str(value)[:40])
def test_a_tracker_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked: dict[str, Any] = {
        "out": tmp_path / "run",
        "probes": {"test": (IMAGES, LABELS)},
        "estimators": ["linear"],
    } | change
    with pytest.raises(error) as caught:
        MarginTracker(**asked)
    assert str(caught.value).startswith(words)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value
    assert not (tmp_path / "run").exists()


def tracker(folder: Path, **options: Any) -> MarginTracker:
    asked: dict[str, Any] = {"probes": {"test": (IMAGES, LABELS)}, "estimators": ["linear"], "norms": ["l2"]} | options
    return MarginTracker(folder / "run", **asked)


@pytest.mark.parametrize(
    ("epoch", "words"),
    [
        (1.0, "expected an epoch of at least 0, got 1.0; give a whole number"),
        ("1", "expected an epoch of at least 0, got '1'; give a whole number"),
        (None, "expected an epoch of at least 0, got None; give a whole number"),
        (True, "expected an epoch of at least 0, got True; give a whole number"),
        (-1, "expected an epoch of at least 0, got -1; give a whole number"),
        (2**40, "expected an epoch of at most 2147483647, got 1099511627776; give a smaller number"),
    ],
)
def test_an_invalid_epoch_gives_a_one_line_error(tmp_path: Path, epoch: Any, words: str) -> None:
    one = tracker(tmp_path)
    for call in (lambda: one.update(epoch, dense()), lambda: one.check(epoch, dense()), lambda: one.has(epoch)):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == words
    assert not one.folder.margin_parts()


def test_numpy_numbers_are_accepted(tmp_path: Path) -> None:
    one = tracker(tmp_path, noise_retries=np.int64(2), seed=np.int32(3), bounds=(np.float32(0), np.float32(1)))
    assert one.update(np.int64(1), dense())["epoch"].tolist() == [1, 1, 1]  # type: ignore[arg-type]
    assert one.folder.margins(1, one.units[0]).exists()
    # the same run, with plain numbers
    assert tracker(tmp_path, noise_retries=2, seed=3).has(1)


def test_integer_bounds_stay_integers() -> None:
    assert [type(end) for end in plain_bounds([0, 1.0])] == [int, float]


LAZY = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
META = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, device="meta"))
MODELS: dict[str, tuple[Any, str]] = {
    "function": (lambda pixels: pixels, "expected a model that is a torch.nn.Module, got function; "),
    "None": (None, "expected a model that is a torch.nn.Module, got NoneType; "),
    "class": (nn.Linear, "expected a model that is a torch.nn.Module, got the class Linear; "),
    "lazy": (LAZY, "expected a model with weights, got 1.weight of a lazy layer that has seen no image; "),
    "meta": (META, "expected a model with weights, got 1.weight on the meta device; "),
}
DOORS: dict[str, Callable[[Path, Any], object]] = {
    "tracker": lambda folder, model: tracker(folder).update(0, model),
    "measure_margins": lambda _, model: measure_margins(model, IMAGES),
    "measure": lambda _, model: measure(model, IMAGES, create("linear"), "l2"),
    "exact_margins": lambda _, model: exact_margins(model, IMAGES, "l2"),
    "crown": lambda _, model: Crown().certify(model, IMAGES, "l2", domain="box", upper=torch.ones(6)),
}


@pytest.mark.parametrize(("model", "words"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_an_invalid_model_gives_a_one_line_error(
    tmp_path: Path, door: Callable[[Path, Any], object], model: Any, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        door(tmp_path, model)
    assert str(caught.value).startswith(words)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


def test_certifiers_without_estimators_bound_the_margins(tmp_path: Path) -> None:
    one = tracker(tmp_path, estimators=(), certifiers="crown")
    assert not len(one.update(0, dense()))
    rows = read_run(str(tmp_path / "run")).bounds
    assert len(rows) == 6
    assert (rows["lower"] > 0).all()
    assert rows["upper"].eq(math.inf).all()


# --- one finished model ---


@pytest.mark.parametrize("one", ["deepfool", create("deepfool")], ids=["text", "object"])
def test_a_single_estimator_is_accepted(one: Any) -> None:
    rows = measure_margins(dense(), (IMAGES, LABELS), one, "l2")
    pd.testing.assert_frame_equal(rows, measure_margins(dense(), (IMAGES, LABELS), ["deepfool"], ["l2", "l2"]))
    assert len(rows) == 6


def test_an_array_without_labels_is_accepted() -> None:
    rows = measure_margins(dense(), IMAGES.numpy().astype(">f4"), "linear", "l2")  # type: ignore[arg-type]
    assert "label" not in rows
    assert len(rows) == 6


def test_labels_beyond_the_classes_are_refused() -> None:
    for label in (2**62, 3, -1):
        with pytest.raises(InputError, match=rf"^expected labels of test in 0\.\.2, got {label}; "):
            measure_margins(dense(), (IMAGES, torch.tensor([0, 1, 2, 0, 1, label])))


def test_images_with_the_channels_last_are_reported() -> None:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 1, 25), nn.Flatten(), nn.LazyLinear(3))
    convolution(torch.rand(1, 1, 28, 28))
    words = r"got RuntimeError: .*; they look like \(B, H, W, C\): permute\(0, 3, 1, 2\)$"
    with pytest.raises(InputError, match=words) as caught:
        measure_margins(convolution, torch.rand(2, 28, 28, 1), "linear")
    assert ONE_LINE.fullmatch(str(caught.value))
    takes = nn.Sequential(nn.Flatten(), nn.Linear(12 * 12 * 3, 3))
    words = (
        r"^the images of test look like \(N, H, W, C\), being \(2, 12, 12, 3\); the model takes them, but give images"
    )
    with pytest.warns(LayoutWarning, match=words):
        measure_margins(takes, torch.rand(2, 12, 12, 3), "linear", "l2")
    # those in order are not: any warning is an error here
    measure_margins(takes, torch.rand(2, 3, 12, 12), "linear", "l2")


MEASURE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": IMAGES.numpy()}, InputError, "expected images as a dense tensor with values, got ndarray; "),
    (
        {"images": IMAGES.to("meta")},
        InputError,
        "expected images as a dense tensor with values, got torch.strided on m",
    ),
    ({"images": IMAGES.to_sparse()}, InputError, "expected images as a dense tensor with values, got torch.sparse_coo"),
    ({"estimator": "deepfool"}, EstimatorError, "expected an estimator object, got 'deepfool'; "),
    ({"estimator": Linear}, EstimatorError, "expected an estimator object, got <class "),
    ({"norm": 2}, EstimatorError, "expected a norm that linear has (l2, linf), got 2; "),
    ({"norm": ["l2"]}, EstimatorError, "expected a norm that linear has (l2, linf), got ['l2']; "),
    ({"domain": None}, EstimatorError, "expected a domain that linear has (box, free), got None; "),
    ({"bounds": (0, math.nan)}, InputError, f"{BOUNDS_WORDS}(0, nan); "),
    ({"batch_size": 2.5}, InputError, "expected batch_size of at least 1, got 2.5; "),
    ({"noise_retries": None}, InputError, "expected noise_retries of at least 0, got None; "),
    ({"seeds": "abcdef"}, InputError, "expected seeds as 64-bit integers, got 'abcdef'; "),
    ({"seeds": [0.5] * 6}, InputError, "expected seeds as 64-bit integers, got [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]; "),
    ({"seeds": [2**64] * 6}, InputError, "expected seeds as 64-bit integers, got list; "),
    ({"seeds": [1]}, InputError, "expected 6 seeds, got shape (1,); "),
    ({"start": IMAGES.numpy()}, InputError, "expected start of shape (6, 1, 2, 2), got ndarray; "),
    ({"start": [1]}, InputError, "expected start of shape (6, 1, 2, 2), got [1]; "),
]


@pytest.mark.parametrize(("change", "error", "words"), MEASURE, ids=lambda value: str(value)[:40])
def test_measure_refuses_in_one_line(change: dict[str, Any], error: type[Exception], words: str) -> None:
    asked: dict[str, Any] = {"model": dense(), "images": IMAGES, "estimator": create("linear"), "norm": "l2"} | change
    with pytest.raises(error) as caught:
        measure(**asked)
    assert str(caught.value).startswith(words)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


# --- lower bounds ---

EXACT: list[tuple[dict[str, Any], str]] = [
    ({"images": IMAGES.numpy()}, "expected images as a dense tensor with values, got ndarray; "),
    ({"norm": 2}, "expected a norm of l2, linf, got 2; "),
    ({"domain": []}, "expected a domain of box, free, got []; "),
    ({"bounds": (0, math.inf)}, f"{BOUNDS_WORDS}(0, inf); "),
    ({"gap": "a"}, "expected a gap of at least 1e-07 and below 1, got 'a'; "),
    ({"gap": None}, "expected a gap of at least 1e-07 and below 1, got None; "),
    ({"nodes": 2.5}, "expected nodes of at least 1, got 2.5; "),
    ({"seconds": "a"}, "expected seconds above 0, got 'a'; "),
    ({"seconds": math.nan}, "expected seconds above 0, got nan; "),
    ({"cache": 5}, "expected cache as a path, got 5; "),
    ({"witnesses": [1]}, "expected witnesses of shape (6, 1, 2, 2), got [1]; "),
]
CROWN: list[tuple[dict[str, Any], str]] = [
    ({"images": IMAGES.numpy()}, "expected images as a dense tensor with values, got ndarray; "),
    ({"norm": "l3"}, "expected a norm of l2, linf, got 'l3'; "),
    ({"domain": "sphere"}, "expected a domain of box, free, got 'sphere'; "),
    ({"bounds": (0, math.nan)}, f"{BOUNDS_WORDS}(0, nan); "),
    ({"upper": None}, "expected one upper bound per image, got None; "),
    ({"upper": [1.0] * 6}, "expected one upper bound per image, got [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]; "),
    ({"upper": torch.ones(5)}, "expected one upper bound per image, got (5,); "),
    ({"upper": torch.full((6,), -1.0)}, "expected upper bounds of at least 0, got NaN or less; "),
    ({"start": [1]}, "expected one start per image, got [1]; "),
]


def certify(model: nn.Module, images: Tensor, norm: Any, **options: Any) -> object:
    return Crown().certify(model, images, norm, **({"domain": "box", "upper": torch.ones(6)} | options))


@pytest.mark.parametrize(
    ("call", "change", "words"),
    [(exact_margins, *row) for row in EXACT] + [(certify, *row) for row in CROWN],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_certifiers_refuse_in_one_line(call: Callable[..., object], change: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"images": IMAGES, "norm": "l2"} | change
    with pytest.raises(InputError) as caught:
        call(dense(), **asked)
    assert str(caught.value).startswith(words)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


def test_a_cache_path_may_be_a_string(tmp_path: Path) -> None:
    for _ in range(2):
        assert exact_margins(dense(), IMAGES[:1], "l2", cache=str(tmp_path / "cache")).solved.all()
    assert any((tmp_path / "cache").iterdir())


# --- runs ---


def test_a_run_path_may_be_a_string(tmp_path: Path) -> None:
    tracker(tmp_path).update(0, dense())
    path = tmp_path / "run"
    assert read_run(str(path)).name == "run"
    for folder in (str(path), path, [str(path)]):
        assert [run.name for run in read_runs(folder)] == ["run"]
    for wrong in (5, None):
        with pytest.raises(InputError, match=rf"^expected a run folder as a path, got {wrong}; "):
            read_run(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=rf"^expected a run folder as a path, got {wrong}; "):
            read_runs(wrong)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"^expected each run once"):
        read_runs([path, str(path)])


def test_a_probe_is_a_split() -> None:
    probe = Probe(IMAGES, LABELS, torch.arange(10, 16))
    assert as_probe("test", probe, BOUNDS).ids.tolist() == list(range(10, 16))
