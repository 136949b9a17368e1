"""Ways to an input gradient, on one clock: ``python -m benchmarks.gradients``.

What `attacks.input_gradient` replaces, and what was tried beside it and is not used: the second convolution of the
28x28 `cnn` differently, nine classes' gradients in one product, other sizes of batches. All ways are held to the
same gradient before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.input_gradient import quicken
from benchmarks.speed.report import made_with
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.models.build import build
from harness.store.files import write_atomically

CLASSES = 10
Ways = Mapping[str, Callable[[], Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = OneLineParser(prog="python -m benchmarks.gradients", description="Time ways to an input gradient.")
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 100, 200], help="images (default: 32 100 200)")
    parser.add_argument("--repeats", type=int, default=30, help="rounds (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, help="JSON file")
    given: argparse.Namespace = parser.parse_args(argv)
    if min(*given.batch, given.repeats, given.threads) < 1:
        parser.error("expected numbers of at least 1, got less; give larger ones")
    torch.set_num_threads(given.threads)
    rows = []
    print("| images | way | ms a batch | µs an image |", "|---:|---|---:|---:|", sep="\n")
    for batch in given.batch:
        for ways in (network_ways(batch), convolution_ways(batch)):
            for name, seconds in medians(ways, given.repeats).items():
                rows.append({"images": batch, "way": name, "seconds": seconds})
                print(f"| {batch} | {name} | {1e3 * seconds:.2f} | {1e6 * seconds / batch:.1f} |", flush=True)
    if given.out is not None:
        text = json.dumps({**made_with(torch.device("cpu")), "rows": rows}, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def medians(ways: Ways, repeats: int) -> dict[str, float]:
    """Seconds of each, taken in turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - began)
    # the first round sets things up
    return {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}


def network_ways(batch: int) -> dict[str, Callable[[], Tensor]]:
    """A forward pass of the whole network, and nine gradients."""
    plain = build("cnn", (1, 28, 28), CLASSES, seed=0).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    quicken(folded)
    images = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    pick = torch.eye(CLASSES)[: CLASSES - 1, None].expand(-1, batch, -1)

    def single(network: nn.Module) -> Callable[[], Tensor]:
        leaf = images.clone().requires_grad_()
        logits = network(leaf)
        return lambda: torch.stack([torch.autograd.grad(logits, leaf, one, retain_graph=True)[0] for one in pick])

    def at_once() -> Callable[[], Tensor]:
        leaf = images.clone().requires_grad_()
        logits = plain(leaf)
        return lambda: torch.autograd.grad(logits, leaf, pick, retain_graph=True, is_grads_batched=True)[0]

    ways = {
        "network: nine gradients": single(plain),
        "network: nine gradients in one product": at_once(),
        "network: nine gradients, first convolution folded (used)": single(folded),
    }
    check(ways)
    return {"network: forward": lambda: torch.no_grad()(plain)(images), **ways}


def convolution_ways(batch: int) -> dict[str, Callable[[], Tensor]]:
    """The input gradient of the second convolution, 16 to 32 channels, 4x4, stride 2, padding 1."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, 4, 4, generator=draws)
    gradient = torch.randn(batch, 32, 7, 7, generator=draws)
    last = gradient.to(memory_format=torch.channels_last)
    weight_last = weight.to(memory_format=torch.channels_last)
    phases = _phases(weight)
    how = {"stride": 2, "padding": 1}
    unit = torch.zeros(1, 16, 14, 14)
    matrix = torch.autograd.functional.jacobian(lambda x: functional.conv2d(x, weight, **how).flatten(), unit)
    matrix = matrix.flatten(1)
    ways: dict[str, Callable[[], Tensor]] = {
        "second convolution: oneDNN (used)": lambda: torch.nn.grad.conv2d_input(
            (batch, 16, 14, 14), weight, gradient, **how
        ),
        "second convolution: transposed, channels_last": lambda: functional.conv_transpose2d(last, weight_last, **how),
        "second convolution: four phases and a pixel shuffle": lambda: functional.pixel_shuffle(
            functional.conv2d(gradient, phases, padding=1), 2
        ),
        "second convolution: product and fold": lambda: functional.fold(
            weight.flatten(1).T @ gradient.flatten(2), (14, 14), (4, 4), **how
        ),
        "second convolution: one dense matrix": lambda: (gradient.flatten(1) @ matrix).view(batch, 16, 14, 14),
    }
    check(ways)
    return ways


def _phases(weight: Tensor) -> Tensor:
    """The transposed convolution of stride 2 as a 3x3 one onto four times the channels, for the pixel shuffle."""
    # output row 2i + phase gets kernel row k from row i + offset - 1
    rows = {0: {1: 1, 3: 0}, 1: {0: 2, 2: 1}}
    out = torch.zeros(16, 2, 2, 32, 3, 3)
    for across, down in ((a, b) for a in rows for b in rows):
        for k, i in rows[across].items():
            for m, j in rows[down].items():
                out[:, across, down, :, i, j] = weight[:, :, k, m].T
    return out.reshape(64, 32, 3, 3)


def check(ways: Ways) -> None:
    """All ways end at the first one's gradient."""
    first, *others = (way() for way in ways.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4 * float(first.abs().max()))


if __name__ == "__main__":
    sys.exit(run_command(main))
