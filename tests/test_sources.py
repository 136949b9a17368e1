"""Data of the user: arrays, image folders, and torchvision's data sets by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data.dataset import DataError
from harness.data.sources import load_source
from harness.track import main
from tests.runs import ONE_LINE

DRAW = np.random.default_rng(0)
TRAIN, TEST = np.arange(12) % 3, np.arange(6) % 3


def arrays(**changes: Any) -> dict[str, Any]:
    whole = {
        "x_train": DRAW.integers(0, 256, (12, 8, 8), dtype=np.uint8),
        "y_train": TRAIN,
        "x_test": DRAW.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        "y_test": TEST,
    }
    return whole | changes


def saved(path: Path, content: dict[str, Any]) -> str:
    np.savez(path / "mine.npz", **content)
    return f"npz:{path / 'mine.npz'}"


def load(text: str, root: Path = Path("data")) -> Any:
    return load_source(text, root, False)


def test_an_npz_file_is_read(tmp_path: Path) -> None:
    content = arrays()
    dataset = load(saved(tmp_path, content))
    assert (dataset.classes, dataset.shape) == (3, (1, 8, 8))
    np.testing.assert_array_equal(dataset.train.images[:, 0], content["x_train"])
    assert dataset.test.labels.tolist() == TEST.tolist()
    assert dataset.test.pixels().max() <= 1
    assert set(dataset.checksums) == {"train images", "train labels", "test images", "test labels"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((6, 8, 8, 3), (3, 8, 8)), ((6, 3, 8, 8), (3, 8, 8)), ((6, 8, 5, 1), (1, 8, 5)), ((6, 4, 9), (1, 4, 9))],
)
def test_layouts_of_images_are_recognised(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = DRAW.random((12, *shape[1:])).astype(np.float64)
    dataset = load(saved(tmp_path, arrays(x_train=images, x_test=images[:6])))
    assert dataset.shape == expected
    assert dataset.train.pixels().dtype == torch.float32
    last = images[3] if len(shape) == 3 else images[3].transpose(2, 0, 1) if shape[1] != 3 else images[3]
    torch.testing.assert_close(dataset.train.pixels()[3], torch.from_numpy(last).float().view(expected))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_test": np.zeros((6, 7, 8), np.uint8)}, "images of one size"),
        ({"y_test": TEST[:5]}, "test labels"),
        ({"y_test": TEST - 1}, "at least 0"),
        ({"y_test": TEST + 0.5}, "integers"),
        ({"y_train": 0 * TRAIN, "y_test": 0 * TEST}, "at least 2 classes"),
        ({"y_test": TEST + 2**62}, rf"at most 100000 classes in npz:.*, got {2**62 + int(TEST.max())}; number"),
        ({"y_train": (TRAIN + 2**40).astype(np.uint64)}, "at most 100000 classes"),
        ({"y_train": TRAIN.astype(np.uint64) + np.uint64(2**63)}, "at most 100000 classes"),
        ({"x_train": np.full((12, 8, 8), 1.5)}, r"in \[0, 1\]"),
        ({"x_train": np.full((12, 8, 8), np.nan)}, r"in \[0, 1\]"),
        ({"x_train": np.zeros((12, 64), np.uint8)}, "convert them"),
        ({"x_train": np.array([{"a": 1}] * 12, dtype=object)}, "save it with numpy.savez"),
    ],
)
def test_invalid_images_or_labels_give_a_one_line_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(saved(tmp_path, arrays(**changes)))
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"words"])
def test_an_invalid_npz_file_gives_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    for path in (tmp_path / "a.npz", tmp_path / "none.npz"):
        with pytest.raises(DataError) as caught:
            load(f"npz:{path}")
        assert ONE_LINE.fullmatch(str(caught.value)), caught.value


def pictures(folder: Path, size: int = 8, classes: tuple[str, ...] = ("cat", "dog"), mode: str = "RGB") -> None:
    for split, count in (("train", 6), ("test", 3)):
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = DRAW.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / split / name / f"{number}.png")


def test_folders_of_pictures_are_read(tmp_path: Path) -> None:
    pictures(tmp_path)
    dataset = load(f"folder:{tmp_path}")
    assert (dataset.classes, dataset.shape, len(dataset.train), len(dataset.test)) == (2, (3, 8, 8), 12, 6)
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = np.asarray(Image.open(tmp_path / "train" / "cat" / "0.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset.train.images[0], first)


def test_invalid_folders_give_a_one_line_error(tmp_path: Path) -> None:
    pictures(tmp_path / "sizes")
    Image.new("RGB", (9, 9)).save(tmp_path / "sizes" / "train" / "cat" / "x.png")
    pictures(tmp_path / "classes")
    (tmp_path / "classes" / "test" / "dog").rename(tmp_path / "classes" / "test" / "wolf")
    (tmp_path / "damaged").mkdir()
    pictures(tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "cat" / "0.png").write_bytes(b"no picture")
    for name, words in (
        ("sizes", "one size"),
        ("classes", "wolf"),
        ("damaged", "pictures in"),
        ("none", "pictures in"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load(f"folder:{tmp_path / name}")
        assert ONE_LINE.fullmatch(str(caught.value)), caught.value


def test_a_data_set_of_torchvision_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, labels in (("train", TRAIN), ("t10k", TEST)):
        images = DRAW.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big")
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())
    dataset = load("torchvision:KMNIST", tmp_path)
    assert (dataset.classes, dataset.shape) == (3, (1, 28, 28))
    np.testing.assert_array_equal(dataset.test.images[-1, 0], images[-1])


@pytest.mark.parametrize("name", ["KMNIST", "CIFAR100", "Nothing", "VisionDataset", "FakeData"])
def test_a_missing_data_set_by_name_gives_a_one_line_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load(f"torchvision:{name}", tmp_path)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value


@pytest.mark.slow
def test_an_npz_file_is_tracked_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])
    text = saved(tmp_path, arrays())
    options = [
        "--model",
        "dense",
        "--epochs",
        "1",
        "--estimator",
        "linear",
        "--normalize",
        "0.5:0.25",
        "--device",
        "cpu",
    ]
    out = ["--out", str(tmp_path / "run")]
    assert main(["--dataset", text, *options, *out]) == 0
    from harness.compare import main as compare

    assert compare([str(tmp_path / "run"), "--estimator", "sdf", "--norm", "l2"]) == 0
    assert len(list((tmp_path / "run").glob("margins/*/sdf.l2.parquet"))) == 2
