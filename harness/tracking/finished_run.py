"""Measure a finished run's checkpoints again: the same images, seeds and options, more estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from attacks.estimator import Estimator
from attacks.registry import create, create_certifier, text_form
from attacks.types import Domain, Norm
from harness.config.options import ConfigError
from harness.config.run_config import check_provable, from_dict, parse_normalize
from harness.data.dataset import CLASSES
from harness.data.probes import Probe, read_probe
from harness.measuring.plan import make_plan, starts_warm
from harness.models.build import build
from harness.models.libraries import Shape
from harness.runs import Run
from harness.store.identity import StoreError
from harness.tasks import Engine
from harness.tracking.manifest import describe, pool_entry
from harness.tracking.terminal import Terminal
from harness.tracking.tracker import MarginTracker

# of a run's options, to measure it again
NEEDED = ("model", "norm", "domain", "noise_retries", "measure_batch", "seed")


def remeasure(
    run: Run,
    estimators: Sequence[str],
    norms: Sequence[str] | None,
    epochs: Sequence[int] | None,
    device: torch.device,
    terminal: Terminal,
    certifiers: Sequence[str] = (),
    certify_probe: int = 100,
    engine: Engine | None = None,
) -> list[str]:
    """Add margins by more estimators and lower bounds to a run; units that are there already are not done again.

    Margins are those that tracking with the estimator would have given: seeds derive from the run's own, and an
    estimator that starts warm goes through all epochs in order.

    Args:
        estimators: text forms.
        norms: default those of the run.
        epochs: default all that the run measured and has a checkpoint of.
        certifiers: text forms; of every one of the epochs. certify_probe: images of each split.
        engine: what runs the attacks; by default this process. It is left open.

    Returns:
        A line for each estimator that failed on every image of an epoch, and one for those that took too long.

    Raises:
        StoreError: a run that does not say its model, an epoch that it did not measure, a damaged file, single
            epochs for an estimator that starts warm, or another process that writes to the run.
        EstimatorError: an estimator that has none of the norms or not the domain.
    """
    config = options_of(run)
    check_provable(config.get("expect_over", 1), certifiers)
    chosen = {text_form(e): e for e in map(create, estimators)}
    wanted = _epochs(run, epochs)
    _check_warm(chosen, wanted, _epochs(run, None))
    asked = cast("Sequence[Norm]", norms or config["norm"])
    domain = cast(Domain, config["domain"])
    plan = make_plan(chosen, asked, domain)
    probes = probes_of(run)
    model = model_of(run, next(iter(probes.values())).images).to(device)
    run.folder.load_checkpoint(wanted[0], model)  # before anything is changed
    proving = {text_form(one): one for one in map(create_certifier, certifiers)}
    added = {"estimators": describe(chosen), "certifiers": describe(proving, every=1, probe=certify_probe)}
    added |= pool_entry(probes, chosen)
    with run.folder.locked():
        run.folder.start({**run.manifest, **added}, resume=True)
        tracker = MarginTracker(
            run.folder,
            probes,
            plan,
            asked,
            domain=domain,
            noise_retries=config["noise_retries"],
            batch_size=config["measure_batch"],
            seed=config["seed"],
            expect_over=config.get("expect_over", 1),
            binary=config.get("binary", False),
            certifiers=list(proving.values()),
            certify_every=1,
            certify_probe=certify_probe,
            engine=engine,
            listener=terminal,
        )
        for line in plan.lines:
            terminal.say(line)
        for epoch in wanted:
            run.folder.load_checkpoint(epoch, model)
            summary = tracker.update(epoch, model)
            terminal.epoch_ended(epoch, {}, summary[summary["estimator"].isin(list(chosen))])
    return tracker.failures


def _epochs(run: Run, asked: Sequence[int] | None) -> list[int]:
    everything = sorted(int(epoch) for epoch in run.margins["epoch"].unique())
    # where all are kept, one that is not there is a damage, which is said when it is read
    thinned = run.config.get("keep_checkpoints", 1) != 1
    measured = [epoch for epoch in everything if not thinned or run.folder.checkpoint(epoch).exists()]
    absent = [epoch for epoch in asked or () if epoch not in measured]
    if absent or not measured:
        there = (", ".join(map(str, measured)) or "none") + (", whose checkpoints are kept" if thinned else "")
        raise StoreError(f"expected epochs that {run.name} measured ({there}), got {absent or 'none'}; choose others")
    return sorted(asked) if asked else measured


def _check_warm(estimators: Mapping[str, Estimator], wanted: list[int], measured: list[int]) -> None:
    """Margins of an estimator that starts warm are those of tracking only if every epoch of it is measured in turn."""
    warm = [text for text, estimator in estimators.items() if starts_warm(estimator)]
    if warm and wanted != measured:
        raise StoreError(
            f"expected all measured epochs for {', '.join(warm)}, which starts from the epoch before, got --epoch "
            f"{', '.join(map(str, wanted))}; leave --epoch out, or warm out of the estimator"
        )


def options_of(run: Run) -> dict[str, Any]:
    """The run's options, without which its model cannot be built.

    Raises:
        StoreError: a run of `MarginTracker`, which has none, or options that were changed by hand.
    """
    if not run.config:
        raise StoreError(
            f"expected a run of harness.track, got {run.folder.path} without options; "
            "name the estimator to its MarginTracker"
        )
    missing = sorted(set(NEEDED) - set(run.config))
    try:
        if missing:
            raise ConfigError(f"none of {', '.join(missing)}")
        from_dict({name: value for name, value in run.config.items() if name in NEEDED})
    except ConfigError as error:
        raise StoreError(f"expected the options of a run in {run.folder.manifest}, got {error}; restore it") from None
    return run.config


def probes_of(run: Run) -> dict[str, Probe]:
    """The run's own images: a data set may have been drawn anew since."""
    return {str(split): read_probe(run.folder, str(split)) for split in pd.unique(run.margins["split"])}


def model_of(run: Run, images: Tensor) -> nn.Module:
    """The run's model as it was before training, for images like these; load a checkpoint into it."""
    config = options_of(run)
    classes = run.manifest.get("classes", CLASSES)
    normalize = parse_normalize(config.get("normalize", ""))
    return build(
        config["model"],
        cast(Shape, tuple(images.shape[1:])),
        classes,
        config["seed"],
        normalize=normalize,
        binary=config.get("binary", False),
    )
