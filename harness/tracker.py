"""MarginTracker: measure the same images at every epoch and keep the rows in a run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from attacks.certify.certifiers import Certifier
from attacks.checks import check_batches
from attacks.estimator import NORMS, Domain, Estimator, InputError, Norm
from attacks.registry import create, create_certifier, text_form
from harness.certifying import Certifying
from harness.checking import check_files
from harness.config import digest
from harness.estimating import Estimating
from harness.files import StoreError, weights_checksum, write_text
from harness.growing import GrowingTable
from harness.listening import Listener
from harness.loggers import Logger, averages, create_logger
from harness.probes import Given, as_probe, check_labels, checksum
from harness.rows import read_margins
from harness.shards import drop_stale_shards
from harness.statistics import SUMMARY_COLUMNS, summarise
from harness.store import RunFolder, Unit, environment
from harness.tasks import Engine, InProcess
from harness.units import describe, plan_units, warm_starts


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
        engine: what runs the attacks, such as `harness.workers.Workers`; by default this process.

    Epochs of an estimator that starts warm have to be measured in order, as its margins depend on what was measured
    before; an epoch earlier than one that it has measured is refused.

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
        engine: Engine | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.probes = {name: as_probe(name, given, bounds) for name, given in probes.items()}
        if not self.probes:
            raise InputError("expected at least one split of probes, got none; give images and labels")
        self.estimators = {text_form(e): e for e in (create(e) if isinstance(e, str) else e for e in estimators)}
        check_batches(batch_size, noise_retries)
        if cold_every < 1:
            raise InputError(f"expected cold_every of at least 1, got {cold_every}; give a number of epochs")
        cold, said = set[str](), list[str]()
        if warm_start:
            self.estimators, cold, said = warm_starts(self.estimators)
        self.units, self.skipped = (
            plan_units(self.estimators, norms, domain) if self.estimators or not certifiers else ([], [])
        )
        self.skipped = said + self.skipped
        self.domain, self.bounds = domain, bounds
        self.listener = listener or Listener()
        self.loggers = [create_logger(one) if isinstance(one, str) else one for one in loggers]
        self._remarked = False
        self._summary = GrowingTable(SUMMARY_COLUMNS, lambda path: summarise(read_margins(self.folder, path)[0]))
        if isinstance(out, RunFolder):
            self.folder = out
        else:
            self.folder = RunFolder(Path(out))
            fingerprint = {
                "probes": {name: checksum(probe) for name, probe in self.probes.items()},
                "domain": domain,
                "bounds": list(bounds),
                "noise_retries": noise_retries,
                "measure_batch": batch_size,
                "seed": int(seed),
                **({"warm_start": True} if cold else {}),
            }
            proving = {text_form(c): c for c in (create_certifier(c) if isinstance(c, str) else c for c in certifiers)}
            facts = {
                "fingerprint": fingerprint,
                "digest": digest(fingerprint),
                "probes": fingerprint["probes"],
                "estimators": describe(self.estimators),
                "certifiers": describe(proving, every=certify_every, probe=certify_probe),
            }
            with self.folder.locked():
                self.folder.start({**facts, **environment(torch.get_num_threads())}, resume=True)
        with self.folder.locked():
            self._keep_probes()
            check_files(self.folder)
            drop_stale_shards(self.folder)
        self.estimating = Estimating(
            self.folder,
            self.probes,
            self.estimators,
            self.units,
            cold=cold,
            cold_every=cold_every,
            domain=domain,
            bounds=bounds,
            noise_retries=noise_retries,
            batch_size=batch_size,
            seed=int(seed),
            engine=engine or InProcess(),
            listener=self.listener,
        )
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

    def update(self, epoch: int, model: nn.Module, *, last: bool = False, refuse_late: bool = True) -> pd.DataFrame:
        """Measure what is missing at this epoch; the same epoch and weights again cost nothing.

        The model is left as it is, whatever its mode, and the caller may be in ``no_grad``.

        Args:
            epoch: at least 0.
            model: pixels in ``bounds`` -> logits; measured in eval mode on its own device.
            last: no epoch will follow; with ``warm_start``, the cold forms are measured then.
            refuse_late: an epoch that is too late for an estimator that starts warm is an error; else that is left out.

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
            return self._update(epoch, model, last, refuse_late)

    def _update(self, epoch: int, model: nn.Module, last: bool, refuse_late: bool) -> pd.DataFrame:
        weights = self.check(epoch, model)
        missing = self.estimating.missing(epoch, last, late=refuse_late)
        if missing:
            check_labels(self.probes, model, self.bounds, self.domain)
            for unit in missing:
                self._summary.forget(self.folder.margins(epoch, unit))
            self.estimating.measure(epoch, missing, model, weights)
        self.estimating.thin(epoch, last)
        for unit in self.certifying.missing(epoch, last):
            self.listener.certifying_started(epoch, unit, self.certifying.images)
            self.certifying.certify(epoch, unit, model, weights)
        summary = self.summary()
        if not self._remarked:
            self._remarked = True
            for line in self.folder.remarks():
                self.listener.remarked(line)
        here = summary[summary["epoch"] == epoch].reset_index(drop=True)
        for logger in self.loggers if missing else ():
            logger.log(epoch, averages(here))
        return here

    def close(self) -> None:
        """End the loggers and the engine; nothing else is open between updates."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.estimating.engine.close)
            for logger in self.loggers:
                stack.callback(logger.close)

    @property
    def broken(self) -> dict[Unit, str]:
        """Units that failed on every image of an epoch, with the library's message; also warned of."""
        return self.estimating.broken

    def has(self, epoch: int, *, last: bool = False, witnesses: bool = True) -> bool:
        """Whether `update` would find nothing to measure.

        Args:
            witnesses: whether margins without their witnesses count as missing.
        """
        missing = self.estimating.missing(epoch, last, witnesses=witnesses, late=False)
        return not missing and not self.certifying.missing(epoch, last)

    def check(self, epoch: int, model: nn.Module) -> str:
        """The checksum of the model's weights, which must be those that the epoch was measured with, if it was.

        Raises:
            StoreError: the epoch was measured with other weights.
        """
        weights = weights_checksum(model)
        for path in self.folder.margin_parts(epoch):
            place, facts = self.folder.place(path), read_margins(self.folder, path)[1]
            before = facts.get("weights", "none")
            if before != weights:
                unit = place.unit if place else None
                raise StoreError(
                    f"expected the weights {before[:12]} that {unit} measured at epoch {epoch}, got {weights[:12]}; "
                    "use another folder for another network"
                )
        return weights

    def summary(self) -> pd.DataFrame:
        """All epochs' summary, also written to ``summary.csv``."""
        parts = self.folder.margin_parts()
        table = self._summary.of(parts)
        write_text(self.folder.summary_csv, self._summary.csv(parts))
        return table

    def _keep_probes(self) -> None:
        for split, probe in self.probes.items():
            path = self.folder.probes(split)
            if not path.exists():
                self.folder.save_tensors(path, {"images": probe.images, "labels": probe.labels, "ids": probe.ids})
