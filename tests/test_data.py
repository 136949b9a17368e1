"""Data sets: real digits, and fake files in torchvision's layout for the readers."""

import functools
import gzip
import hashlib
import lzma
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torchvision import datasets

from harness.config.registry import DATASETS
from harness.data.builtin import load
from harness.data.dataset import DataError, Split, draw_probe

Arrays = dict[str, NDArray[np.uint8]]

SIZES = {"train": 7, "t10k": 5}


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_read_only(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def arrays() -> Arrays:
    draws = np.random.default_rng(0)
    images = {f"{part}-images-idx3-ubyte": draws.integers(0, 256, (n, 28, 28)) for part, n in SIZES.items()}
    labels = {f"{part}-labels-idx1-ubyte": draws.integers(0, 10, n) for part, n in SIZES.items()}
    return {name: array.astype(np.uint8) for name, array in (images | labels).items()}


@pytest.fixture
def mnist_root(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake MNIST as ``.gz`` alone, listed with its MD5 sums."""
    root = tmp_path / "data"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    listed = [(path.name, md5(path.read_bytes())) for path in sorted(raw.iterdir())]
    monkeypatch.setattr(datasets.MNIST, "resources", listed)
    return root


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake CIFAR-10 with two training batches of 3 and a test batch of 2."""
    draws = np.random.default_rng(1)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, count in {"data_batch_1": 3, "data_batch_2": 3, "test_batch": 2}.items():
        images = draws.integers(0, 256, (count, 3072)).astype(np.uint8)
        # protocol 2, as the real files have
        content = pickle.dumps({"data": images, "labels": list(range(count))}, protocol=2)
        (folder / name).write_bytes(content)
    list_cifar(folder, monkeypatch)
    return tmp_path / "data"


def list_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(pattern: str) -> list[list[str]]:
        return [[path.name, md5(path.read_bytes())] for path in sorted(folder.glob(pattern))]

    monkeypatch.setattr(datasets.CIFAR10, "train_list", listed("data_batch_*"))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", listed("test_batch"))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Serve a folder on this machine: the real downloader without a network."""
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    monkeypatch.setenv("no_proxy", "*")
    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_digits_split_is_fixed_and_stratified() -> None:
    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1397, 400)
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert int(digits.train.images.max()) == digits.train.levels == 16
    counts = digits.test.labels.bincount() / (digits.test.labels.bincount() + digits.train.labels.bincount())
    assert counts.sub(400 / 1797).abs().max() < 0.005
    # fixes the split itself, which must never change
    assert hashlib.sha256(digits.test.images.numpy().tobytes()).hexdigest()[:16] == "06379005f7936649"
    assert digits.checksums["digits.images"][:8] == "8f26b2bd"
    assert torch.equal(digits.test.labels, load("digits").test.labels)


def test_digits_splits_partition_the_images() -> None:
    digits = load("digits")
    rows = torch.cat([digits.train.images, digits.test.images]).flatten(1).numpy()
    expected = load_digits().data.astype(np.uint8)
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_pixels_are_levels_scaled_to_one() -> None:
    images = torch.tensor([0, 4, 16, 8], dtype=torch.uint8).reshape(4, 1, 1, 1)
    split = Split(images, torch.zeros(4, dtype=torch.int64), levels=16)
    assert split.pixels().flatten().tolist() == [0.0, 0.25, 1.0, 0.5]
    assert split.pixels(torch.tensor([2, 1])).flatten().tolist() == [1.0, 0.25]
    assert split.pixels(slice(3, None)).flatten().tolist() == [0.5]
    assert split.pixels().dtype == torch.float32


def test_probe_is_sorted_distinct_and_leaves_the_global_generator() -> None:
    split = load("digits").train
    before = torch.get_rng_state()
    probe = draw_probe(split, 1000, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.dtype == torch.int64
    assert probe.shape == (1000,)
    assert (probe.diff() > 0).all()
    assert torch.equal(probe, draw_probe(split, 1000, seed=0))
    assert not torch.equal(probe, draw_probe(split, 1000, seed=1))
    assert torch.equal(draw_probe(split, 5000, seed=0), torch.arange(1397))
    with pytest.raises(ValueError, match=r"^expected a probe of at least 1 image, got 0; ask for more$"):
        draw_probe(split, 0, seed=0)


def test_mnist_from_gz_in_a_read_only_folder(mnist_root: Path, arrays: Arrays) -> None:
    set_read_only(mnist_root)
    before = snapshot(mnist_root)
    mnist = load("mnist", mnist_root)
    assert snapshot(mnist_root) == before
    assert mnist.shape == (1, 28, 28)
    assert np.array_equal(mnist.train.images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(mnist.test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    expected = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in arrays.items()}
    assert mnist.checksums == expected


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".xz", lzma.compress)], ids=["extracted", "xz"])
def test_mnist_packing_changes_neither_images_nor_checksums(
    mnist_root: Path, arrays: Arrays, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    expected = load("mnist", mnist_root)
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        path.with_suffix(suffix).write_bytes(pack(gzip.decompress(path.read_bytes())))
        path.unlink()
    mnist = load("mnist", mnist_root)
    assert torch.equal(mnist.train.images, expected.train.images)
    assert mnist.checksums == expected.checksums


def test_fashion_mnist_has_its_own_folder(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.FashionMNIST, "resources", datasets.MNIST.resources)
    (mnist_root / "MNIST").rename(mnist_root / "FashionMNIST")
    assert len(load("fashion-mnist", mnist_root).train) == 7
    with pytest.raises(DataError, match="MNIST/raw, got no such file"):
        load("mnist", mnist_root)


def test_torchvision_reads_the_same_mnist(mnist_root: Path) -> None:
    mnist = load("mnist", mnist_root)
    theirs = datasets.MNIST(mnist_root, download=True)
    assert torch.equal(mnist.train.images[:, 0], theirs.data)
    assert torch.equal(mnist.train.labels, theirs.targets)


def test_cifar10_batches_plain_and_packed(cifar_root: Path) -> None:
    cifar = load("cifar10", cifar_root)
    folder = cifar_root / "cifar-10-batches-py"
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert cifar.shape == (3, 32, 32)
    assert np.array_equal(cifar.train.images[:3].flatten(1).numpy(), first["data"])
    assert cifar.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert cifar.test.labels.tolist() == [0, 1]
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
        path.unlink()
    set_read_only(cifar_root)
    packed = load("cifar10", cifar_root)
    assert torch.equal(packed.train.images, cifar.train.images)
    assert packed.checksums == cifar.checksums


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_calls_a_command_is_refused(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cifar_root / "cifar-10-batches-py"
    marker = cifar_root / "marker"
    content = pickle.dumps({"data": _Command(f"touch {marker}"), "labels": []}, protocol=2)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_1 is damaged: MD5 \w+ where torchvision lists \w+;"):
        load("cifar10", cifar_root)
    list_cifar(folder, monkeypatch)
    with pytest.raises(DataError, match=r"data_batch_1 is damaged: not a batch of images \(it asks for \w+.system"):
        load("cifar10", cifar_root)
    assert not marker.exists()
    # control: a plain unpickler runs it
    pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize("name", list(DATASETS)[1:])
def test_missing_files_say_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert message.startswith("expected ")
    assert str(tmp_path) in message
    assert message.endswith("place torchvision's files there, use --download, or use --dataset digits")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_unknown_name_lists_the_known() -> None:
    expected = "expected a data set of digits, mnist, fashion-mnist, cifar10, got 'foo'; choose one of them"
    with pytest.raises(DataError, match=f"^{expected}$"):
        load("foo")


def _truncate(content: bytes) -> bytes:
    return content[:-1]


def _behead(content: bytes) -> bytes:
    return content[:6]


def _wrong_label(content: bytes) -> bytes:
    return content[:-1] + b"\x0a"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-images-idx3-ubyte", _truncate, r"5503 bytes that are not an IDX array of its kind"),
        ("train-images-idx3-ubyte", _behead, r"6 bytes that are not an IDX array of its kind"),
        ("t10k-labels-idx1-ubyte", _wrong_label, r"5 labels up to 10 for 5 images of 10 classes"),
    ],
)
def test_damaged_extracted_files_are_named(
    mnist_root: Path, name: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    packed = mnist_root / "MNIST" / "raw" / f"{name}.gz"
    packed.with_suffix("").write_bytes(damage(gzip.decompress(packed.read_bytes())))
    packed.unlink()
    with pytest.raises(DataError, match=rf"^\S+{name} is damaged: {reason}; delete it and .*again$"):
        load("mnist", mnist_root)


def test_damaged_archives_are_named(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = mnist_root / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"\S+train-labels-idx1-ubyte.gz is damaged: MD5"):
        load("mnist", mnist_root)
    listed = [(name, md5((packed.parent / name).read_bytes())) for name, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", listed)
    with pytest.raises(DataError, match=r"\S+train-labels-idx1-ubyte.gz is damaged: Compressed file ended"):
        load("mnist", mnist_root)


def test_download_of_mnist_survives_a_dead_mirror_and_a_bad_file(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Callable[[Path], str]
) -> None:
    source = mnist_root / "MNIST" / "raw"
    address = served(source)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}nothing/", address])
    expected = load("mnist", mnist_root)
    name = "t10k-labels-idx1-ubyte.gz"
    intact = (source / name).read_bytes()
    (source / name).write_bytes(b"half")

    root = tmp_path / "downloaded"
    with pytest.raises(DataError, match=r"^expected to download into .*404.*corrupted.*--dataset digits$"):
        load("mnist", root, download=True)
    raw = root / "MNIST" / "raw"
    assert not [path for path in raw.iterdir() if path.name.startswith((".", "t10k-labels"))]

    (source / name).write_bytes(intact)
    mnist = load("mnist", root, download=True)
    assert torch.equal(mnist.train.images, expected.train.images)
    assert sorted(path.name for path in raw.glob("*.gz")) == sorted(path.name for path in source.iterdir())
    # nothing is downloaded twice
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    assert load("mnist", root, download=True).checksums == expected.checksums


def test_download_of_cifar10(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Callable[[Path], str]
) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar_root / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "url", served(tmp_path) + archive.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive.read_bytes()))
    root = tmp_path / "downloaded"
    assert load("cifar10", root, download=True).checksums == load("cifar10", cifar_root).checksums
    names = sorted(path.name for path in (root / "cifar-10-batches-py").iterdir())
    assert names == ["data_batch_1", "data_batch_2", "test_batch"]


def test_download_without_a_network_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a port without a listener
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path, download=True)
    message = str(caught.value)
    assert message.startswith(f"expected to download into {tmp_path}")
    assert "refused" in message
    assert message.endswith("; place torchvision's files there, or use --dataset digits")
    assert "\n" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
