"""Trained networks from the literature: distances and bounds found here beside published numbers.

``python -m benchmarks.published --networks DIR`` measures the networks of `NETWORKS` whose files are in DIR, at the
radius of the publication. No copy of the networks is part of this project; `Published.origin` says where they are from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attacks.measure import measure
from attacks.registry import create, create_certifier, text_form
from attacks.types import one_line
from harness.command import DONE, FAILED, exit_code, run_command
from harness.config.options import ConfigError, OneLineParser
from harness.data.builtin import load
from harness.models.weights import Normalized
from harness.store import environment, now
from harness.store.files import write_text

ESTIMATORS = ("deepfool", "fmn", "cascade")


def _convolutional(channels: int, flat: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def _cifar(network: nn.Sequential) -> nn.Module:
    mean, deviation = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return Normalized(network, tuple(value / 255 for value in mean), tuple(value / 255 for value in deviation))


@dataclass(frozen=True)
class Published:
    """A trained network and what is published about it.

    Attributes:
        file: safetensors with the keys of ``network()``.
        network: makes the architecture. wrap: puts the normalisation in front of it.
        images: ``mnist`` for its whole test set, or an ``.npz`` with ``x_test`` uint8 and ``y_test`` next to the file.
        radius: of the publication, L-infinity, pixels in ``[0, 1]``.
        origin: where the public original is.
        within: published number of images at most ``radius`` away, errors included; none if it is not known.
        count: of how many images. source: of both numbers.
    """

    file: str
    network: Callable[[], nn.Sequential]
    images: str
    radius: float
    origin: str
    within: int | None = None
    count: int = 0
    source: str = ""
    wrap: Callable[[nn.Sequential], nn.Module] = lambda network: network


NETWORKS: dict[str, Published] = {
    "mnist-wong-kolter": Published(
        "mnist-wong-kolter.safetensors",
        lambda: _convolutional(1, 1568),
        "mnist",
        0.1,
        "vtjeng/MIPVerify_data on GitHub, WK17a (Wong & Kolter 2018)",
        438,
        10_000,
        "Tjeng, Xiao & Tedrake 2019, arXiv 1711.07356: adversarial error 4.38%, exact",
    ),
    "mnist-cnn-a-adv": Published(
        "mnist-cnn-a-adv.safetensors",
        lambda: _convolutional(1, 1568),
        "mnist-200.npz",
        0.3,
        "Verified-Intelligence/alpha-beta-CROWN on GitHub, models/sdp (Dathathri et al. 2020)",
    ),
    "cifar-cnn-a-adv": Published(
        "cifar-cnn-a-adv.safetensors",
        lambda: _convolutional(3, 2048),
        "cifar-200.npz",
        2 / 255,
        "Verified-Intelligence/alpha-beta-CROWN on GitHub, models/sdp (Dathathri et al. 2020)",
        wrap=_cifar,
    ),
}


@dataclass(frozen=True)
class Row:
    """One estimator or certifier on one network.

    Attributes:
        images, errors: measured images, and those of them that are misclassified.
        within: images at most ``radius`` away, errors included; of a certifier those not proved.
        left: images on which a certifier was tried: those not within the radius by any estimator.
        average: mean distance, or lower bound, of the correctly classified images that have one; none without any.
        passes, most: forwards and backwards per image, mean and largest; none of a certifier.
    """

    network: str
    method: str
    radius: float
    images: int
    errors: int
    within: int
    published: int | None
    left: int | None
    average: float | None
    passes: float | None
    most: float | None
    seconds: float


def read(published: Published, folder: Path, data_root: Path | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, its images ``(N, C, H, W)`` in ``[0, 1]`` and labels ``(N,)``.

    Raises:
        ConfigError: a file is missing, damaged, or of another network.
    """
    network, path = published.network(), folder / published.file
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"expected the network of {published.origin} at {path}, got {one_line(error, most=200)}; download it"
        ) from None
    model = published.wrap(network.requires_grad_(False)).eval()
    if published.images == "mnist":
        test = load("mnist", data_root).test
        return model, test.images.float() / 255, test.labels
    path = folder / published.images
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"expected arrays x_test and y_test at {path}, got {one_line(error, most=200)}; download it"
        ) from None
    return model, images.float() / 255, labels.long()


def compare(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    estimators: Sequence[str],
    certifiers: Sequence[str],
    batch_size: int,
) -> list[Row]:
    """One row per estimator, then one per certifier, in L-infinity and the box."""
    published = NETWORKS[name]
    known = published.within if len(images) == published.count else None
    nearest = torch.full((len(images),), torch.inf, dtype=torch.float64)
    rows = []
    for text in estimators:
        began = time.perf_counter()
        margins = measure(model, images, create(text), "linf", batch_size=batch_size)
        seconds = time.perf_counter() - began
        wrong, passes = margins.prediction != labels, margins.forwards + margins.backwards
        nearest = torch.minimum(nearest, torch.where(wrong, 0.0, margins.distance))
        measured = margins.distance[~wrong & margins.distance.isfinite()]
        rows.append(
            Row(
                network=name,
                method=text_form(create(text)),
                radius=published.radius,
                images=len(images),
                errors=int(wrong.sum()),
                within=int((wrong | (margins.distance <= published.radius)).sum()),
                published=known,
                left=None,
                average=float(measured.mean()) if len(measured) else None,
                passes=float(passes.mean()),
                most=float(passes.max()),
                seconds=seconds,
            )
        )
    left = torch.nonzero(nearest > published.radius).flatten()
    for text in certifiers if len(left) else ():
        began = time.perf_counter()
        lower = create_certifier(text).certify(model, images[left], "linf", domain="box", upper=nearest[left]).lower
        seconds = time.perf_counter() - began
        rows.append(
            Row(
                network=name,
                method=text,
                radius=published.radius,
                images=len(images),
                errors=rows[0].errors,
                within=len(images) - int((lower >= published.radius).sum()),
                published=known,
                left=len(left),
                average=float(lower.mean()),
                passes=None,
                most=None,
                seconds=seconds,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | radius | method | images | errors | within the radius | published | average | passes | "
        "ms per image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        within = f"{row.within}" if row.left is None else f"at most {row.within}"
        passes = f"{row.passes:.0f}, at most {row.most:.0f}" if row.left is None else f"({row.left} images)"
        average = "" if row.average is None else f"{row.average:.4f}"
        tried = row.images if row.left is None else row.left
        lines.append(
            f"| {row.network} | {row.radius:.4g} | `{row.method}` | {row.images} | {row.errors} | {within} | "
            f"{'' if row.published is None else row.published} | {average} | {passes} | "
            f"{1000 * row.seconds / tried:.1f} |"
        )
    return "\n".join(lines)


def contradictions(rows: Sequence[Row]) -> list[str]:
    """Rows of estimators that found more images than are published as exact: one of the two is wrong."""
    return [
        f"{row.network}: {row.method} found {row.within} images within {row.radius:.4g}, more than the published "
        f"{row.published}"
        for row in rows
        if row.left is None and row.published is not None and row.within > row.published
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a published exact number is contradicted."""
    options = _parser().parse_args(argv)
    return exit_code("published", lambda: _compare(options), resume="nothing was written")


def _parser() -> argparse.ArgumentParser:
    origins = "; ".join(f"{published.file}: {published.origin}" for published in NETWORKS.values())
    parser = OneLineParser(prog="python -m benchmarks.published", description=__doc__, epilog=f"Files: {origins}.")
    parser.add_argument("--networks", type=Path, required=True, metavar="DIR", help="folder with the networks' files")
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="repeatable (default: all)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of MNIST (default: data)")
    parser.add_argument(
        "--estimator", action="append", help=f"NAME[:key=value,...], repeatable (default: {', '.join(ESTIMATORS)})"
    )
    parser.add_argument("--certifier", action="append", help="NAME[:key=value,...], repeatable (default: none)")
    parser.add_argument("--images", type=int, help="only the first N images of each network (default: all)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per pass (default: 256)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON, and the table as FILE.md")
    return parser


def _compare(options: argparse.Namespace) -> int:
    if min(options.batch_size, options.threads) < 1 or (options.images is not None and options.images < 1):
        raise ConfigError("expected --images, --batch-size and --threads of at least 1, got less; give larger numbers")
    torch.set_num_threads(options.threads)
    estimators, certifiers = options.estimator or list(ESTIMATORS), options.certifier or []
    for text in estimators:
        create(text)
    for text in certifiers:
        create_certifier(text)
    names = options.network or list(NETWORKS)
    networks = {name: read(NETWORKS[name], options.networks, options.data_root) for name in names}
    rows: list[Row] = []
    for name, (model, images, labels) in networks.items():
        part = slice(0, options.images)
        rows += compare(name, model, images[part], labels[part], estimators, certifiers, options.batch_size)
    print(table(rows))
    if options.out:
        facts = {"created": now(), "rows": [asdict(row) for row in rows], **environment(options.threads)}
        write_text(options.out, json.dumps(facts, indent=2, allow_nan=False) + "\n")
        write_text(options.out.with_suffix(".md"), table(rows) + "\n")
    wrong = contradictions(rows)
    for line in wrong:
        print(f"published: {line}; a network that was misread, or a false witness", file=sys.stderr)
    return FAILED if wrong else DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
