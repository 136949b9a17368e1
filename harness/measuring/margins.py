"""Measure the probe images at every epoch with every estimator in each of its norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from attacks.estimator import Estimator, Status, revision_of
from attacks.isolation import WeightsError
from attacks.measure import MeasureOptions, classified, join_margins
from attacks.memory import chunk_length
from attacks.pool import Pool, uses_pool
from attacks.seeds import derive_seed
from harness.config.devices import device_of
from harness.data.probes import Probe
from harness.measuring.listener import Listener
from harness.measuring.plan import Plan, starts_warm
from harness.measuring.rows import margin_rows
from harness.measuring.shards import drop_shards, find_shard, keep_shard
from harness.measuring.witnesses import keep_witnesses, starts, thin_witnesses
from harness.store import MARGIN_COLUMNS, RunFolder, Unit
from harness.tasks import Engine, Outcome, Overdue, Task

# of a split's images in a unit, for each worker, at most: each costs some milliseconds besides its attack
SHARDS = 4


class Estimating:
    """Estimators of a run, each in each of its norms; what the folder has already is not done again.

    Attributes:
        cold_every: how often the cold forms of estimators that start warm are measured, in epochs.
        overdue: units that the engine stopped after their time, with the epochs.
    """

    def __init__(
        self,
        folder: RunFolder,
        probes: Mapping[str, Probe],
        plan: Plan,
        options: MeasureOptions,
        *,
        cold_every: int,
        seed: int,
        engine: Engine,
        listener: Listener,
    ) -> None:
        self.folder, self.probes, self.plan, self.options = folder, probes, plan, options
        self.cold_every, self.seed, self.engine, self.listener = cold_every, seed, engine, listener
        self._failed: dict[Unit, dict[int, str]] = {}
        self.overdue: dict[Unit, list[int]] = {}
        self._thinned = set[Path]()

    @property
    def broken(self) -> dict[Unit, str]:
        """Units without margins at an epoch, with the reason: that of all images, or that they wrote the weights."""
        return {unit: list(messages.values())[-1] for unit, messages in self._failed.items() if messages}

    def asked(self, epoch: int, last: bool) -> list[Unit]:
        """The units of the epoch, done or not."""
        sampled = last or epoch in (0, 1) or epoch % self.cold_every == 0
        return [unit for unit in self.plan.units if sampled or unit.estimator not in self.plan.cold]

    def missing(self, epoch: int, last: bool, *, witnesses: bool = True, late: bool = True) -> list[Unit]:
        """What is to be done at the epoch: units without margins, or without the witnesses of them.

        An estimator that starts warm cannot be measured again at an epoch that it has measured.

        Args:
            witnesses: whether those count that have margins but no witnesses.
            late: whether those count that start warm and have measured a later epoch, which is too late for them.
        """
        wanted = []
        for unit in self.asked(epoch, last):
            warm = starts_warm(self.plan.estimators[unit.estimator])
            done = self.folder.margins(epoch, unit).exists()
            if done and (warm or not witnesses or self.folder.witnesses(epoch, unit).exists()):
                continue
            if warm and not late and max(self.folder.measured_epochs(unit), default=0) > epoch:
                continue
            wanted.append(unit)
        return wanted

    def measure(self, epoch: int, units: Sequence[Unit], model: nn.Module, weights: str) -> None:
        """Measure the units and write their parts.

        A unit that fails on every image, writes the weights, or is stopped gets none.
        """
        for unit in units:  # what failed or was stopped is tried again
            self._failed.get(unit, {}).pop(epoch, None)
            self.overdue[unit] = [one for one in self.overdue.get(unit, ()) if one != epoch]
        warm = [unit for unit in units if starts_warm(self.plan.estimators[unit.estimator])]
        begin = {unit: starts(self.folder, epoch, unit, self.probes) for unit in warm}  # all, before any is measured
        pool = self._pool(units, model)
        for together in [units] if self.engine.parallel else [[unit] for unit in units]:
            tasks = {
                unit: list(self._tasks(epoch, unit, model, begin[unit][1] if unit in begin else {}, pool))
                for unit in together
            }
            images = sum(len(task.images) for several in tasks.values() for task in several)
            self.listener.units_started(epoch, together, images)
            for unit, outcomes in self._outcomes(epoch, tasks, model, weights):
                before = begin[unit][0] if unit in begin else None
                self._keep(epoch, unit, tasks[unit], outcomes, weights, before)

    def thin(self, epoch: int, last: bool) -> None:
        """Keep of earlier epochs' witnesses the extremes."""
        for unit in self.asked(epoch, last):
            thin_witnesses(self.folder, unit, self._thinned)

    def _tasks(
        self, epoch: int, unit: Unit, model: nn.Module, start: Mapping[str, Tensor], pool: Pool | None
    ) -> Iterator[Task]:
        """The unit's images by split, in parts where units are measured in parallel."""
        estimator = self.plan.estimators[unit.estimator]
        for split, probe in self.probes.items():
            length = self._length(probe, estimator, model) if self.engine.parallel else len(probe.ids)
            names = (self.seed, epoch, split, unit.estimator, unit.norm)
            for first in range(0, len(probe.ids), length):
                part = slice(first, first + length)
                yield Task(
                    unit,
                    split,
                    first,
                    estimator,
                    probe.images[part],
                    tuple(derive_seed(*names, image) for image in probe.ids[part].tolist()),
                    start[split][part] if start else None,
                    self.options,
                    pool if uses_pool(estimator) and _alike(pool, probe) else None,
                )

    def _pool(self, units: Sequence[Unit], model: nn.Module) -> Pool | None:
        """The images of the first split with the model's predictions, if any of the units' estimators uses them."""
        if not any(uses_pool(self.plan.estimators[unit.estimator]) for unit in units):
            return None
        first = next(iter(self.probes.values()))
        pool = classified(model, first.images.to(device_of(model)), self.options)
        return pool.to(torch.device("cpu"))

    def _length(self, probe: Probe, estimator: Estimator, model: nn.Module) -> int:
        """Images of a shard: whole chunks, as many as leave each worker a few shards to end together."""
        like = probe.images[:1].to(device_of(model))
        chunk = chunk_length(
            model,
            like,
            estimator,
            domain=self.options.domain,
            bounds=self.options.bounds,
            batch_size=self.options.batch_size,
            expect_over=self.options.expect_over,
        )
        return chunk * math.ceil(len(probe.ids) / (chunk * SHARDS * self.engine.count))

    def _outcomes(
        self, epoch: int, tasks: Mapping[Unit, Sequence[Task]], model: nn.Module, weights: str
    ) -> Iterator[tuple[Unit, list[Outcome]]]:
        """Run what no shard is there of; yield each unit with its tasks' outcomes, in order, when it has all."""
        got: dict[Unit, dict[int, Outcome]] = {unit: {} for unit in tasks}
        place = {id(task): (unit, number) for unit, several in tasks.items() for number, task in enumerate(several)}
        waiting = []
        for task in (task for several in tasks.values() for task in several):
            finished = find_shard(self.folder, epoch, task, weights) if self.engine.parallel else None
            if finished is None:
                waiting.append(task)
                continue
            unit, number = place[id(task)]
            got[unit][number] = finished
            self.listener.images_done(len(task.images))
        yield from ((unit, _in_order(done)) for unit, done in got.items() if len(done) == len(tasks[unit]))
        for task, outcome in self.engine.run(model, waiting, self.listener.images_done):
            unit, number = place[id(task)]
            if isinstance(outcome, Overdue):
                self._give_up(epoch, unit, outcome.seconds)
                continue
            got[unit][number] = outcome
            if len(got[unit]) == len(tasks[unit]):
                yield unit, _in_order(got[unit])
            elif self.engine.parallel:
                keep_shard(self.folder, epoch, task, outcome, weights)

    def _give_up(self, epoch: int, unit: Unit, seconds: float) -> None:
        """Note, once, that a unit was stopped; no part of it is written, so that --resume tries again."""
        epochs = self.overdue.setdefault(unit, [])
        if epoch not in epochs:
            epochs.append(epoch)
            self.listener.unit_overdue(epoch, unit, seconds)

    def _keep(
        self,
        epoch: int,
        unit: Unit,
        tasks: Sequence[Task],
        outcomes: Sequence[Outcome],
        weights: str,
        before: int | None,
    ) -> None:
        """Write a unit's witnesses, then its margins."""
        results = {
            split: join_margins([o.margins for t, o in zip(tasks, outcomes, strict=True) if t.split == split])
            for split in self.probes
        }
        rows = pd.concat(
            [
                margin_rows(epoch, split, self.probes[split], unit, self.options.domain, m)
                for split, m in results.items()
            ],
            ignore_index=True,
        )
        rows["seconds"] = sum(outcome.seconds for outcome in outcomes) / len(rows)
        spoiled = rows["message"] == WeightsError.TEXT
        if spoiled.any() or (rows["status"] == Status.FAILED.value).all():
            # no part is written, so that --resume tries again
            message = WeightsError.TEXT if spoiled.any() else str(rows["message"].iloc[0])
            self._failed.setdefault(unit, {})[epoch] = message
            self.listener.unit_failed(epoch, unit, message)
        else:
            keep_witnesses(self.folder, epoch, unit, self.probes, results)
            self._thinned.discard(self.folder.witnesses(epoch, unit))
            begun = {} if before is None else {"start": str(before)}
            begun["revision"] = str(revision_of(self.plan.estimators[unit.estimator]))
            self.folder.write_part(
                self.folder.margins(epoch, unit), rows[list(MARGIN_COLUMNS)], weights=weights, **begun
            )
            self.listener.unit_ended(epoch, unit, rows)
        drop_shards(self.folder, epoch, unit)


def _alike(pool: Pool | None, probe: Probe) -> bool:
    """Whether the pool's images are of the split's size and dtype: splits may differ."""
    return (
        pool is not None and pool.points[:1].shape == probe.images[:1].shape and pool.points.dtype is probe.images.dtype
    )


def _in_order(outcomes: Mapping[int, Outcome]) -> list[Outcome]:
    return [outcomes[number] for number in sorted(outcomes)]
