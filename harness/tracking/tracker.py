"""MarginTracker: measure the same images at every epoch and keep the rows in a run folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from attacks.arguments import check_flag, check_object, plain_path, whole
from attacks.certifier import Certifier
from attacks.checks import ModelWarning, check_module
from attacks.estimator import Estimator
from attacks.isolation import WeightsError
from attacks.measure import MeasureOptions
from attacks.types import NOISE_RETRIES, NORMS, Domain, EstimatorError, InputError, Norm
from harness.config.run_config import check_provable
from harness.data.probes import Given, as_probes, check_probes
from harness.loggers import Logger, averages, made_loggers
from harness.measuring.bounds import Certifying
from harness.measuring.listener import Listener
from harness.measuring.margins import Estimating
from harness.measuring.plan import Plan, made_certifiers, made_estimators, make_plan, plain_epoch, plain_norms
from harness.measuring.shards import drop_stale_shards
from harness.runs import check_files
from harness.statistics import SUMMARY_COLUMNS, summarise
from harness.store import RunFolder, Unit
from harness.store.files import write_text
from harness.store.growing import GrowingTable
from harness.store.identity import StoreError
from harness.store.parts import read_margins
from harness.store.tensors import weights_checksum
from harness.tasks import Engine, InProcess
from harness.tracking.manifest import describe, tracker_manifest
from harness.workers import Workers


class MarginTracker:
    """Tracks margins of probe images while the caller trains; see README for an example.

    Making one writes nothing: the folder is started, and locked against other processes, by `update`. Of several
    processes that train together, each may make one, and one calls `update`, which calls none of the others.

    Args:
        out: the run folder (made if missing, at the first `update`; one with the same images and options is
            continued).
        probes: name of a split -> ``(images, labels)`` or ``(images, labels, ids)``, tensors or NumPy arrays: images
            ``(N, C, H, W)`` float in ``bounds``, labels ``(N,)`` integer, ids ``(N,)`` integer (default: row numbers);
            or a Dataset or DataLoader of them (see `harness.data.probes.as_probe`). The images of the first split are
            also the pool of estimators that use one (see `attacks.measure.measure`): classified once an epoch.
        estimators: text forms (``"fmn:steps=200"``) or estimator objects; one alone or several; or a plan of them.
        norms: one or both of ``l2`` and ``linf``; an estimator without one of them skips it if it has another.
        domain: ``box`` or ``free``.
        bounds: pixel range of the images, two finite numbers.
        noise_retries, batch_size, expect_over, binary: see `attacks.measure.measure`.
        seed: from which all random draws of the attacks derive.
        warm_start: use the warm form of every estimator that has a setting ``warm``, started from the witnesses of the
            latest epoch measured before, and measure its cold form next to it at some epochs.
        cold_every: every how many epochs the cold form is measured, besides 0, 1 and the last.
        certifiers: text forms (``"crown:cuts=8"``) or certifier objects, of lower bounds.
        certify_every: every how many epochs bounds are computed, besides 0 and the last. certify_probe: of how many
            images of each split, the first ones.
        loggers: texts (``"tensorboard:DIR"``) or objects that get the averages of what is measured at an epoch.
        engine: what runs the attacks, such as `harness.workers.Workers`; by default this process.
        unit_timeout: seconds after which an estimator in a norm is stopped at an epoch, and has no margins there until
            the epoch is measured again; by default no limit. It takes a process of its own (see
            `harness.workers.Workers`, which has the same argument for where ``engine`` is given). Certifiers have no
            limit.

    Epochs of an estimator that starts warm have to be measured in order, as its margins depend on what was measured
    before; an epoch earlier than one that it has measured is refused.

    Raises:
        EstimatorError: an unknown estimator, or one that has none of the norms.
        EngineError: a ``unit_timeout`` that is not above 0.
        ConfigError: ``warm_start`` without an estimator that can, or ``expect_over`` with certifiers.
        InputError: probes that cannot be measured, or an argument of the wrong type or value.
        StoreError: the folder holds another run.

    Attributes:
        measured_averages: what the latest `update` measured, by names such as ``margin/test/deepfool/l2``.
    """

    def __init__(
        self,
        out: str | Path | RunFolder,
        probes: Mapping[str, Given],
        estimators: str | Estimator | Sequence[str | Estimator] | Plan = ("deepfool",),
        norms: Norm | Sequence[Norm] = NORMS,
        *,
        domain: Domain = "box",
        bounds: tuple[float, float] = (0.0, 1.0),
        noise_retries: int = NOISE_RETRIES,
        batch_size: int = 128,
        seed: int = 0,
        expect_over: int = 1,
        binary: bool = False,
        warm_start: bool = False,
        cold_every: int = 5,
        certifiers: str | Certifier | Sequence[str | Certifier] = (),
        certify_every: int = 5,
        certify_probe: int = 100,
        loggers: str | Logger | Sequence[str | Logger] = (),
        engine: Engine | None = None,
        unit_timeout: float | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.options = MeasureOptions(
            domain=domain,
            bounds=bounds,
            noise_retries=noise_retries,
            batch_size=batch_size,
            expect_over=expect_over,
            binary=binary,
        )
        self.probes = as_probes(probes, self.options.bounds)
        proving = made_certifiers(certifiers)
        check_provable(self.options.expect_over, proving)
        norms, seed, cold_every = plain_norms(norms), whole("seed", seed), whole("cold_every", cold_every, 1)
        certify_every = whole("certify_every", certify_every, 1)
        certify_probe = whole("certify_probe", certify_probe, 1)
        check_flag("warm_start", warm_start)
        check_object("engine", engine, "run")
        check_object("listener", listener, "images_done")
        self.plan = _plan(estimators, norms, domain, warm_start, proving)
        self.listener, self.loggers = listener or Listener(), made_loggers(loggers)
        # by the latest update, under the names that loggers get
        self.measured_averages: dict[str, float] = {}
        # the one that updates; a lock could not be copied with the tracker
        self._thread: dict[str, int] = {}
        self._summary = GrowingTable(SUMMARY_COLUMNS, lambda path: summarise(read_margins(self.folder, path)[0]))
        self._manifest: dict[str, Any] | None = None
        self._begun = self._remarked = False
        if isinstance(out, RunFolder):
            self.folder = out
            with self.folder.locked():
                self._begin()
        else:
            self.folder = RunFolder(plain_path("out", out))
            proofs = describe(proving, every=certify_every, probe=certify_probe)
            self._manifest = tracker_manifest(self.probes, self.plan, self.options, seed, proofs)
            self.folder.check(self._manifest)
        check_files(self.folder)
        self.estimating = Estimating(
            self.folder,
            self.probes,
            self.plan,
            self.options,
            cold_every=cold_every,
            seed=seed,
            engine=_engine(engine, unit_timeout),
            listener=self.listener,
        )
        self.certifying = Certifying(
            self.folder, self.probes, proving, norms, self.options, every=certify_every, probe=certify_probe
        )

    @property
    def estimators(self) -> Mapping[str, Estimator]:
        """The estimators by their canonical texts."""
        return self.plan.estimators

    @property
    def units(self) -> Sequence[Unit]:
        """Every estimator in every norm that it has."""
        return self.plan.units

    @property
    def skipped(self) -> Sequence[str]:
        """A line for each norm of an estimator that is skipped, and for each estimator without a warm start."""
        return self.plan.lines

    def update(self, epoch: int, model: nn.Module, *, last: bool = False, refuse_late: bool = True) -> pd.DataFrame:
        """Measure what is missing at this epoch; the same epoch and weights again cost nothing.

        The model is left as it is, whatever its mode, and the caller may be in ``no_grad``. No other thread may use it
        meanwhile (see `attacks.measure.measure`). An estimator that writes the weights is in `broken` afterwards, and
        the weights are as before.

        Args:
            epoch: an integer of at least 0.
            model: pixels in ``bounds`` -> logits; measured in eval mode on its own device. Of a compiled,
                DataParallel, DistributedDataParallel or AveragedModel one, the network inside.
            last: no epoch will follow; with ``warm_start``, the cold forms are measured then.
            refuse_late: an epoch that is too late for an estimator that starts warm is an error; else that is left out.

        Returns:
            This epoch's summary rows (see `harness.statistics.summarise`).

        Raises:
            InputError: a model that cannot be measured, no such epoch, or another thread's update is under way.
            StoreError: the epoch was measured with other weights, or a later one by an estimator that starts warm; or
                another process writes to the folder.
            UnsoundError: a lower bound above the distance of a witness: a bug, of which the case is kept.
        """
        epoch = plain_epoch(epoch)
        with self._alone(), self.folder.locked():
            return self._update(epoch, model, last, refuse_late)

    def _begin(self) -> None:
        """Start the run or continue it, before anything else is written; the caller has the lock."""
        if self._manifest is not None:
            self.folder.start(self._manifest, resume=True)
        self._keep_probes()
        drop_stale_shards(self.folder)
        self._begun = True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse another thread's update while one is under way; the same thread may come again.

        Raises:
            InputError: another thread updates.
        """
        me = threading.get_ident()
        again = self._thread.get("updates") == me
        if self._thread.setdefault("updates", me) != me:
            raise InputError(
                "expected one update of a tracker at a time, got one while another thread's is under way; wait for it "
                "to end, or give each thread a tracker and a folder of its own"
            )
        try:
            yield
        finally:
            if not again:
                self._thread.clear()

    def _update(self, epoch: int, model: nn.Module, last: bool, refuse_late: bool) -> pd.DataFrame:
        weights = self.check(epoch, model)
        missing = self.estimating.missing(epoch, last, late=refuse_late)
        proving = self.certifying.missing(epoch, last)
        warned = self._checked(model) if missing or proving else []
        if not self._begun:
            self._begin()
        self._note(epoch, warned)
        if missing:
            for unit in missing:
                self._summary.forget(self.folder.margins(epoch, unit))
            self.estimating.measure(epoch, missing, model, weights)
        self.estimating.thin(epoch, last)
        for unit in proving:
            self.listener.certifying_started(epoch, unit, self.certifying.images)
            self.certifying.certify(epoch, unit, model, weights)
        summary = self.summary()
        if not self._remarked:
            self._remarked = True
            for line in self.folder.remarks():
                self.listener.remarked(line)
        rows = summary[summary["epoch"] == epoch].reset_index(drop=True)
        self.measured_averages = averages(rows, missing)
        for logger in self.loggers if self.measured_averages else ():
            logger.log(epoch, self.measured_averages)
        return rows

    def _checked(self, model: nn.Module) -> list[ModelWarning]:
        """Refuse what cannot be measured; what else spoils the model's margins."""
        return check_probes(self.probes, model, self.options)

    def _note(self, epoch: int, warned: Sequence[ModelWarning]) -> None:
        """Tell what spoils margins, and note it in the manifest once."""
        if not warned:
            return
        manifest = self.folder.read_manifest()
        notes = manifest.get("notes", [])
        new = [f"epoch {epoch}: {warning}" for warning in warned if not any(str(warning) in note for note in notes)]
        if new:
            self.folder.write_manifest({**manifest, "notes": notes + new})
        for warning in warned:
            self.listener.told(warning)

    def close(self) -> None:
        """End the loggers and the engine; nothing else is open between updates."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.estimating.engine.close)
            for logger in self.loggers:
                stack.callback(logger.close)

    @property
    def broken(self) -> dict[Unit, str]:
        """Units without margins at an epoch, with the reason, such as the library's message; also warned of.

        They failed on every image, or wrote the weights.
        """
        return self.estimating.broken

    @property
    def failures(self) -> list[str]:
        """One line for each unit that failed or wrote the weights, and one for all that took too long."""
        lines = [
            f"expected margins from {unit}, got {' '.join(message.split())}"
            f"{'' if message == WeightsError.TEXT else ' on every image'}; fix it"
            for unit, message in self.broken.items()
        ]
        overdue = ", ".join(
            f"{unit} at epoch {', '.join(map(str, epochs))}"
            for unit, epochs in self.estimating.overdue.items()
            if epochs
        )
        if overdue:
            lines.append(f"stopped after the unit timeout, and without margins: {overdue}; measure again to try again")
        return lines

    def has(self, epoch: int, *, last: bool = False, witnesses: bool = True) -> bool:
        """Whether `update` would find nothing to measure.

        Args:
            witnesses: whether margins without their witnesses count as missing.
        """
        epoch = plain_epoch(epoch)
        missing = self.estimating.missing(epoch, last, witnesses=witnesses, late=False)
        return not missing and not self.certifying.missing(epoch, last)

    def check(self, epoch: int, model: nn.Module) -> str:
        """The checksum of the model's weights, which must be those that the epoch was measured with, if it was.

        Raises:
            StoreError: the epoch was measured with other weights.
        """
        check_module(model)
        weights = weights_checksum(model)
        for path in self.folder.margin_parts(plain_epoch(epoch)):
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
        """All epochs' summary, also written to ``summary.csv`` where a run has been started."""
        parts = self.folder.margin_parts()
        table = self._summary.of(parts)
        if self.folder.exists():
            write_text(self.folder.summary_csv, self._summary.csv(parts))
        return table

    def _keep_probes(self) -> None:
        for split, probe in self.probes.items():
            path = self.folder.probes(split)
            if not path.exists():
                self.folder.save_tensors(path, {"images": probe.images, "labels": probe.labels, "ids": probe.ids})


def _plan(
    given: str | Estimator | Sequence[str | Estimator] | Plan,
    norms: Sequence[Norm],
    domain: Domain,
    warm_start: bool,
    certifiers: Mapping[str, Certifier],
) -> Plan:
    """The plan itself, or one of the estimators; a tracker needs estimators or certifiers."""
    plan = given if isinstance(given, Plan) else make_plan(made_estimators(given), norms, domain, warm_start=warm_start)
    if not plan.estimators and not certifiers:
        raise EstimatorError("expected at least one estimator, got none; name one, such as 'deepfool'")
    return plan


def _engine(given: Engine | None, unit_timeout: float | None) -> Engine:
    """The engine given, or this process, or for limited units one worker, with as many threads as this process."""
    if unit_timeout is None:
        return given or InProcess()
    if given is not None:
        raise InputError("expected unit_timeout without engine, got both; write engine=Workers(..., unit_timeout=...)")
    return Workers(1, threads=torch.get_num_threads(), unit_timeout=unit_timeout)
