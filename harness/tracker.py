"""MarginTracker: measure the same images at every epoch and keep the rows in a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from attacks.certify.certifiers import Certifier
from attacks.checks import check_batches
from attacks.estimator import NORMS, Domain, Estimator, InputError, Norm, Status
from attacks.measure import derive_seed, measure
from attacks.registry import create, text_form
from harness.certifying import Certifying
from harness.config import digest
from harness.devices import device_of
from harness.files import (
    StoreError,
    read_part,
    save_tensors,
    weights_checksum,
    write_csv,
    write_part,
)
from harness.growing import GrowingTable
from harness.listening import Listener
from harness.loggers import Logger, averages, create_logger
from harness.measuring import margin_rows
from harness.probes import Given, as_probe, check_labels, checksum
from harness.statistics import SUMMARY_COLUMNS, summarise
from harness.store import MARGIN_COLUMNS, RunFolder, Unit, environment
from harness.units import describe, plan_units, starts_warm, warm_starts
from harness.witnesses import keep_witnesses, starts, thin_witnesses


class MarginTracker:
    """Tracks margins of probe images while the caller trains; see README for the three-line use.

    Args:
        out: the run folder (made if missing; one with the same images and options is gone on with).
        probes: name of a split -> ``(images, labels)`` or ``(images, labels, ids)``, tensors or NumPy arrays: images
            ``(N, C, H, W)`` float in ``bounds``, labels ``(N,)`` integer, ids ``(N,)`` integer (default: row numbers);
            or a Dataset or DataLoader of them (see `harness.probes.as_probe`).
        estimators: text forms (``"fmn:steps=200"``) or estimator objects.
        norms: of ``l2`` and ``linf``; an estimator without one of them skips it if it has another.
        domain: ``box`` or ``free``.
        bounds: pixel range of the images.
        noise_retries, batch_size: see `attacks.measure.measure`.
        seed: from which all random draws of the attacks derive.
        warm_start: use the warm form of every estimator that has a setting ``warm``, started from the witnesses of the
            latest epoch measured before, and measure its cold form beside it at some epochs.
        cold_every: these epochs: every so many, 0, 1 and the last always.
        certifiers: text forms (``"crown:cuts=8"``) or certifier objects, of lower bounds.
        certify_every: these epochs: every so many, 0 and the last. certify_probe: of each split's images, the first.
        loggers: texts (``"tensorboard:DIR"``) or objects that get the averages of epochs as they are measured.

    Epochs of an estimator that starts warm have to be measured in order, as its margins depend on what was measured
    before; an epoch earlier than one that it has measured is refused.

    Attributes:
        broken: units that failed on every image of an epoch, with the library's message; also warned of.

    Raises:
        EstimatorError: an unknown estimator, or one that has none of the norms.
        ConfigError: ``warm_start`` without an estimator that can.
        InputError: probes that cannot be measured.
        StoreError: the folder holds another run.
    """

    def __init__(
        self,
        out: str | Path | RunFolder,
        probes: Mapping[str, Given],
        estimators: Sequence[str | Estimator] = ("deepfool",),
        norms: Sequence[Norm] = NORMS,
        *,
        domain: Domain = "box",
        bounds: tuple[float, float] = (0.0, 1.0),
        noise_retries: int = 6,
        batch_size: int = 128,
        seed: int = 0,
        warm_start: bool = False,
        cold_every: int = 5,
        certifiers: Sequence[str | Certifier] = (),
        certify_every: int = 5,
        certify_probe: int = 100,
        loggers: Sequence[str | Logger] = (),
        listener: Listener | None = None,
    ) -> None:
        self.probes = {name: as_probe(name, given, bounds) for name, given in probes.items()}
        if not self.probes:
            raise InputError("expected at least one split of probes, got none; give images and labels")
        self.estimators = {text_form(e): e for e in (create(e) if isinstance(e, str) else e for e in estimators)}
        check_batches(batch_size, noise_retries)
        if cold_every < 1:
            raise InputError(f"expected cold_every of at least 1, got {cold_every}; give a number of epochs")
        self.cold, said = set[str](), list[str]()
        if warm_start:
            self.estimators, self.cold, said = warm_starts(self.estimators)
        self.units, self.skipped = (
            plan_units(self.estimators, norms, domain) if self.estimators or not certifiers else ([], [])
        )
        self.skipped = said + self.skipped
        self.cold_every = cold_every
        self.domain, self.bounds, self.seed = domain, bounds, int(seed)
        self.noise_retries, self.batch_size = noise_retries, batch_size
        self.listener = listener or Listener()
        self.loggers = [create_logger(one) if isinstance(one, str) else one for one in loggers]
        self.broken: dict[Unit, str] = {}
        self._summary = GrowingTable(SUMMARY_COLUMNS, lambda path: summarise(read_part(path)[0]))
        self._thinned = set[Path]()
        if isinstance(out, RunFolder):
            self.folder = out
        else:
            self.folder = RunFolder(Path(out))
            fingerprint = self._fingerprint()
            facts = {"fingerprint": fingerprint, "digest": digest(fingerprint), "estimators": describe(self.estimators)}
            with self.folder.locked():
                self.folder.start({**facts, **environment(torch.get_num_threads())}, resume=True)
        with self.folder.locked():
            self._keep_probes()
        self.certifying = Certifying(
            self.folder,
            self.probes,
            certifiers,
            norms,
            domain=domain,
            bounds=bounds,
            every=certify_every,
            probe=certify_probe,
        )

    def update(self, epoch: int, model: nn.Module, *, last: bool = False) -> pd.DataFrame:
        """Measure what is missing at this epoch; the same epoch and weights again cost nothing.

        The model is left as it is, whatever its mode, and the caller may be in ``no_grad``.

        Args:
            epoch: at least 0.
            model: pixels in ``bounds`` -> logits; measured in eval mode on its own device.
            last: no epoch will follow; with ``warm_start``, the cold forms are measured then.

        Returns:
            This epoch's summary rows (see `harness.statistics.summarise`).

        Raises:
            InputError: a model that cannot be measured.
            StoreError: the epoch was measured with other weights, or a later one by an estimator that starts warm; or
                another process writes to the folder.
            UnsoundError: a lower bound above the distance of a witness: a bug, of which the case is kept.
        """
        if epoch < 0:
            raise InputError(f"expected an epoch of at least 0, got {epoch}; count from 0, before the first update")
        with self.folder.locked():
            return self._update(epoch, model, last)

    def _update(self, epoch: int, model: nn.Module, last: bool) -> pd.DataFrame:
        weights = self.check(epoch, model)
        asked = self._asked(epoch, last)
        missing = [unit for unit in asked if not self.folder.margins(epoch, unit).exists()]
        if missing:
            check_labels(self.probes, model, self.bounds, self.domain)
        warm = [unit for unit in missing if starts_warm(self.estimators[unit.estimator])]
        begin = {unit: starts(self.folder, epoch, unit, self.probes) for unit in warm}  # all, before any is measured
        for unit in missing:
            self._measure_unit(epoch, unit, model, weights, *begin.get(unit, (None, {})))
        for unit in asked:
            thin_witnesses(self.folder, unit, self._thinned)
        for unit in self.certifying.missing(epoch, last):
            self.listener.certifying_started(epoch, unit, self.certifying.images)
            self.certifying.certify(epoch, unit, model, weights)
        summary = self.summary()
        here = summary[summary["epoch"] == epoch].reset_index(drop=True)
        for logger in self.loggers if missing else ():
            logger.log(epoch, averages(here))
        return here

    def close(self) -> None:
        """End the loggers; nothing else is open between updates."""
        for logger in self.loggers:
            logger.close()

    def has(self, epoch: int, *, last: bool = False) -> bool:
        """Whether `update` would find nothing to measure."""
        measured = all(self.folder.margins(epoch, unit).exists() for unit in self._asked(epoch, last))
        return measured and not self.certifying.missing(epoch, last)

    def _asked(self, epoch: int, last: bool) -> list[Unit]:
        sampled = last or epoch in (0, 1) or epoch % self.cold_every == 0
        return [unit for unit in self.units if sampled or unit.estimator not in self.cold]

    def check(self, epoch: int, model: nn.Module) -> str:
        """The checksum of the model's weights, which must be those that the epoch was measured with, if it was.

        Raises:
            StoreError: the epoch was measured with other weights.
        """
        weights = weights_checksum(model)
        for path in self.folder.margin_parts(epoch):
            rows, facts = read_part(path)
            before = facts.get("weights", "none")
            if before != weights:
                unit = Unit(rows["estimator"].iloc[0], rows["norm"].iloc[0])
                raise StoreError(
                    f"expected the weights {before[:12]} that {unit} measured at epoch {epoch}, got {weights[:12]}; "
                    "use another folder for another network"
                )
        return weights

    def summary(self) -> pd.DataFrame:
        """All epochs' summary, also written to ``summary.csv``."""
        table = self._summary.of(self.folder.margin_parts())
        write_csv(self.folder.summary_csv, table)
        return table

    def _measure_unit(
        self, epoch: int, unit: Unit, model: nn.Module, weights: str, before: int | None, start: Mapping[str, Tensor]
    ) -> None:
        estimator = self.estimators[unit.estimator]
        self.listener.unit_started(epoch, unit, sum(len(probe.ids) for probe in self.probes.values()))
        began, results = time.perf_counter(), {}
        for split, probe in self.probes.items():
            names = (self.seed, epoch, split, unit.estimator, unit.norm)
            results[split] = measure(
                model,
                probe.images.to(device_of(model)),
                estimator,
                unit.norm,  # type: ignore[arg-type]
                domain=self.domain,
                bounds=self.bounds,
                noise_retries=self.noise_retries,
                batch_size=self.batch_size,
                seeds=[derive_seed(*names, image) for image in probe.ids.tolist()],
                start=start[split].to(device_of(model)) if start else None,
                on_progress=self.listener.images_done,
            )
        rows = pd.concat(
            [margin_rows(epoch, split, self.probes[split], unit, self.domain, m) for split, m in results.items()],
            ignore_index=True,
        )
        rows["seconds"] = (time.perf_counter() - began) / len(rows)
        if (rows["status"] == Status.FAILED.value).all():
            # no part is written, so that --resume tries again
            self.broken[unit] = rows["message"].iloc[0]
            self.listener.unit_failed(epoch, unit, self.broken[unit])
            return
        keep_witnesses(self.folder, epoch, unit, self.probes, results)
        self._thinned.discard(self.folder.witnesses(epoch, unit))
        begun = {} if before is None else {"start": str(before)}
        write_part(self.folder.margins(epoch, unit), rows[list(MARGIN_COLUMNS)], weights=weights, **begun)
        self.listener.unit_ended(epoch, unit, rows)

    def _keep_probes(self) -> None:
        for split, probe in self.probes.items():
            path = self.folder.probes(split)
            if not path.exists():
                save_tensors(path, {"images": probe.images, "labels": probe.labels, "ids": probe.ids})

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "probes": {name: checksum(probe) for name, probe in self.probes.items()},
            "domain": self.domain,
            "bounds": list(self.bounds),
            "noise_retries": self.noise_retries,
            "measure_batch": self.batch_size,
            "seed": self.seed,
            **({"warm_start": True} if self.cold else {}),
        }
