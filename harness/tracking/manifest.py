"""The manifest of a run, and the notes that a reader of its curves needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.certifier import Certifier
from attacks.estimator import Estimator, revision_of
from attacks.measure import MeasureOptions
from attacks.pool import uses_pool
from attacks.registry import create_certifier, text_form
from attacks.types import NORMS, EstimatorError
from harness.config.run_config import RunConfig, as_dict, digest
from harness.data.dataset import Dataset
from harness.data.probes import Probe, checksum
from harness.measuring.plan import LONGEST, Plan
from harness.store import Unit, environment


def notes_of(model: nn.Module, config: RunConfig, device: torch.device) -> list[str]:
    """What a reader of the run's curves must know of the network and of the machine.

    What the tracker finds in the network as it is measured it notes itself.
    """
    notes = []
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        notes.append(
            "batch norm: its statistics are not estimated at epoch 0, so the step from epoch 0 to 1 is partly theirs"
        )
    if config.checkpoints:
        notes.append("checkpoints that were there already: training, loss and optimiser here are not theirs")
    if config.expect_over != 1:
        notes.append(
            f"expect-over {config.expect_over}: margins and their predictions are of the average; "
            "predictions/, loss and error are of one draw"
        )
    if device.type == "cuda" and not config.deterministic:
        notes.append("resuming: CUDA without --deterministic, so a resumed run trains on to slightly other weights")
    return notes


def tracker_manifest(
    probes: Mapping[str, Probe], plan: Plan, options: MeasureOptions, seed: int, certifiers: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of a folder that `MarginTracker` starts itself: what was measured, and where."""
    fingerprint = {
        "probes": {name: checksum(probe) for name, probe in probes.items()},
        "domain": options.domain,
        "bounds": list(options.bounds),
        "noise_retries": options.noise_retries,
        "measure_batch": options.batch_size,
        "seed": seed,
        **({"warm_start": True} if plan.cold else {}),
        **({"expect_over": options.expect_over} if options.expect_over != 1 else {}),
        **({"binary": True} if options.binary else {}),
    }
    facts = {
        "fingerprint": fingerprint,
        "digest": digest(fingerprint),
        "probes": fingerprint["probes"],
        **pool_entry(probes, plan.estimators),
        "estimators": describe(plan.estimators),
        "certifiers": certifiers,
    }
    return {**facts, **environment(torch.get_num_threads())}


def pool_entry(probes: Mapping[str, Probe], estimators: Mapping[str, Estimator]) -> dict[str, Any]:
    """The pool, the images of the first split, if an estimator uses it; a run is not continued with another one."""
    if not any(map(uses_pool, estimators.values())):
        return {}
    first, probe = next(iter(probes.items()))
    return {"pool": {"split": first, "images": len(probe.ids), "sha256": checksum(probe)}}


def manifest_of(
    config: RunConfig, dataset: Dataset, estimators: Mapping[str, Estimator], threads: int, device: torch.device
) -> dict[str, Any]:
    """What the run folder says of the run: options, fingerprint, data, estimators, versions and machine."""
    fingerprint = config.fingerprint | {"data": dataset.checksums}
    return {
        "config": as_dict(config),
        "fingerprint": fingerprint,
        "digest": digest(fingerprint),
        "seeds": {"seed": config.seed, "probe_seed": config.probe_seed},
        "data": dataset.checksums,
        "classes": dataset.classes,
        "estimators": describe(estimators),
        "certifiers": describe(
            {text_form(one): one for one in map(create_certifier, config.certify)},
            every=config.certify_every,
            probe=config.certify_probe,
        ),
        "device": str(device),
        **environment(threads),
    }


def describe(estimators: Mapping[str, Estimator] | Mapping[str, Certifier], **options: int) -> list[dict[str, Any]]:
    """Manifest entries: canonical text, name, revision and all parameters, as they come back from JSON.

    Args:
        options: what else is to be said of each, as how often it is asked.

    Raises:
        EstimatorError: a text that is too long for the name of a file.
    """
    for text in estimators:
        length = len(Unit(text, NORMS[-1]).filename)
        if length > LONGEST:
            raise EstimatorError(
                f"expected an estimator whose text names a file, at most {LONGEST} bytes, got {length} for "
                f"{text[:40]}...; give fewer parameters or members"
            )
    entries = [
        {
            "estimator": text,
            "name": estimator.name,
            "revision": revision_of(estimator),
            "parameters": dataclasses.asdict(estimator),  # type: ignore[call-overload]
            **options,
        }
        for text, estimator in estimators.items()
    ]
    return cast("list[dict[str, Any]]", json.loads(json.dumps(entries)))
