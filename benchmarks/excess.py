"""How often the estimated excess holds: ``python -m benchmarks.excess``.

Measures small networks whose margins can be computed exactly, and compares the excess of each unit's average with the
interval that `harness.statistics.excess` gives, with a pool of training images, as runs have one, and without. None of
the networks was used to fit it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from attacks.certify.exact import exact_margins
from attacks.measure import measure
from attacks.registry import create
from attacks.types import NORMS, Norm
from benchmarks import small
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.data.builtin import load
from harness.data.probes import Probe
from harness.statistics.excess import own_excess
from harness.store import environment
from harness.store.files import write_text

NETWORKS = ("64-24-24-24-10", "64-100-10", "leaky", "residual", "conv", "conv-conv", "batch-norm", "pool")
EPOCHS = (4, 30)
SEED = 1
# images of the pool
POOL = 1000
# a unit of which more images stay open is left out
SOLVED = 0.9
# relative gap and wall time per image of the exact margins
GAP, SECONDS = 1e-4, 10.0


@dataclass(frozen=True)
class Unit:
    """One network, training, epoch and norm; the excess is over the images whose exact margin is known.

    Attributes:
        pool: whether `cascade` had a pool.
        accuracy: share of the images that are classified correctly.
        near: share of the images whose distance is within 1% of the exact margin. worst: the largest ratio of the two.
        excess: by which share the average distance exceeds the average margin. estimate, low, high: what was estimated.
    """

    network: str
    training: str
    epoch: int
    norm: Norm
    pool: bool
    images: int
    accuracy: float
    near: float
    worst: float
    excess: float
    estimate: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the interval contains the excess, which is known to within `GAP`."""
        return self.low <= self.excess + GAP and self.excess <= self.high


def units(networks: Sequence[str], epochs: Sequence[int], images: int) -> Iterator[Unit]:
    """Measure; a unit is left out where less than `SOLVED` of the margins are known."""
    for network in networks:
        for training in ("standard", "pgd"):
            for epoch, model in small.trained(network, training, epochs, seed=SEED).items():
                for norm in NORMS:
                    yield from _units((network, training, epoch, norm), model, small.probe(images))


def _units(names: tuple[str, str, int, Norm], model: nn.Module, probe: Probe) -> Iterator[Unit]:
    """The unit without and with a pool."""
    network, training, epoch, norm = names
    pools = {False: None, True: load("digits").train.pixels(torch.arange(POOL))}
    found = {pool: measure(model, probe.images, create("cascade"), norm, pool=given) for pool, given in pools.items()}
    nearest = torch.minimum(found[False].distance, found[True].distance)
    start = torch.where(
        (found[True].distance <= nearest)[:, None, None, None], found[True].witness, found[False].witness
    )
    # the witnesses only shorten the search: the bounds that it proves do not depend on them
    exact = exact_margins(model, probe.images, norm, witnesses=start, gap=GAP, seconds=SECONDS)
    known = exact.solved & nearest.isfinite()
    if known.double().mean() < SOLVED:
        return
    for pool, margins in found.items():
        distance, margin = margins.distance[known], exact.upper[known]
        estimate = own_excess("cascade", norm, distance.numpy(), margins.basins[known].numpy())
        if math.isnan(estimate["excess"]):
            continue
        yield Unit(
            network=network,
            training=training,
            epoch=epoch,
            norm=norm,
            pool=pool,
            images=int(known.sum()),
            accuracy=float((margins.prediction == probe.labels).double().mean()),
            near=float((distance <= 1.01 * margin).double().mean()),
            worst=float((distance / margin).max()),
            excess=float(distance.mean() / margin.mean() - 1),
            estimate=estimate["excess"],
            low=estimate["excess_low"],
            high=estimate["excess_high"],
        )


def line(unit: Unit) -> str:
    """A row of the Markdown table."""
    cells = [
        *(unit.network, unit.training, unit.epoch, unit.norm, "yes" if unit.pool else "no", unit.images),
        *(f"{unit.accuracy:.0%}", f"{unit.near:.0%}", f"{unit.worst:.3f}", f"{100 * unit.excess:.2f}"),
        *(f"{100 * unit.estimate:.2f} ({100 * unit.low:.2f} to {100 * unit.high:.2f})", "yes" if unit.holds else "no"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def totals(done: Sequence[Unit]) -> str:
    """How many intervals hold and how wide they are, without and with a pool."""
    lines = []
    for pool in (False, True):
        part = [unit for unit in done if unit.pool == pool]
        if not part:
            continue
        count = sum(unit.images for unit in part)
        near = sum(unit.near * unit.images for unit in part) / count
        excess = sum(unit.excess for unit in part) / len(part)
        width = median(unit.high - unit.low for unit in part)
        lines.append(
            f"{'with' if pool else 'without'} a pool: {sum(unit.holds for unit in part)} of {len(part)} intervals hold "
            f"the excess, median width {100 * width:.2f}%; mean excess {100 * excess:.2f}%, {near:.1%} of {count} "
            "distances within 1% of the exact margin"
        )
    return "\n\n".join(lines) or "no unit: too few margins are known"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = OneLineParser(prog="python -m benchmarks.excess", description=__doc__)
    parser.add_argument("--images", type=int, default=40, help="images a unit (default: 40)")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only these, repeatable")
    parser.add_argument("--epoch", action="append", type=int, help=f"repeatable (default: {EPOCHS[0]} and {EPOCHS[1]})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    given = parser.parse_args(argv)
    if min(given.images, given.threads, *(given.epoch or EPOCHS)) < 1:
        parser.error("expected --images, --threads and --epoch of at least 1, got less; give larger numbers")
    torch.set_num_threads(given.threads)
    print("| network | training | epoch | norm | pool | images | right | near | worst | excess, % | estimate | holds |")
    print("|---" * 12 + "|")
    done = []
    for unit in units(given.network or NETWORKS, given.epoch or EPOCHS, given.images):
        done.append(unit)
        print(line(unit), flush=True)
    print(f"\n{totals(done)}")
    if given.out:
        facts = {"units": [asdict(unit) for unit in done], "images": given.images, "seed": SEED}
        write_text(given.out, json.dumps(facts | environment(given.threads), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
