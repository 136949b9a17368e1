"""Margins as tables: of one trained model, and of one unit of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.arguments import whole
from attacks.checks import check_module, check_pool
from attacks.estimator import Estimator, Margins
from attacks.measure import MeasureOptions, classified, measure_with
from attacks.seeds import derive_seed
from attacks.types import NOISE_RETRIES, NORMS, Domain, Norm
from harness.config.devices import device_of
from harness.data.probes import Given, Probe, as_probe, check_probes
from harness.measuring.plan import made_estimators, plain_norms, plan_units
from harness.store import MARGIN_COLUMNS, Unit


def measure_margins(
    model: nn.Module,
    images: Given | Tensor,
    estimators: str | Estimator | Sequence[str | Estimator] = ("deepfool",),
    norms: Norm | Sequence[Norm] = NORMS,
    *,
    domain: Domain = "box",
    bounds: tuple[float, float] = (0.0, 1.0),
    noise_retries: int = NOISE_RETRIES,
    batch_size: int = 128,
    seed: int = 0,
    expect_over: int = 1,
    binary: bool = False,
    pool: Tensor | None = None,
) -> pd.DataFrame:
    """Measure the margins of one finished model; nothing is written.

    The same seeds as `MarginTracker`'s at epoch 0 of a split called ``test``, so that its margins are met again.

    Args:
        model: pixels in ``bounds`` -> logits; left untouched, measured in eval mode on its own device.
        images: ``(N, C, H, W)`` float in ``bounds``, alone (a tensor or an array) or with labels and ids (see
            `harness.data.probes.as_probe`).
        estimators, norms, domain, bounds, noise_retries, batch_size, seed, expect_over, binary: see `MarginTracker`.
        pool: see `attacks.measure.measure`; a run measures with the images of its first split.

    Returns:
        A row per image, estimator and norm, in `harness.store.MARGIN_COLUMNS` but for ``epoch``, ``split`` and
        ``seconds``; without labels also but for ``label`` and ``correct``.

    Warns:
        ModelWarning: the model's margins say less than they seem to (see `attacks.checks`).

    Raises:
        InputError: images, labels or a model that cannot be measured, or an argument of the wrong type or value.
        EstimatorError: an unknown estimator, or one that has none of the norms.
    """
    check_module(model)
    given: Any = images
    if alone := isinstance(images, Tensor | np.ndarray):
        given = images, torch.zeros(images.shape[:1], dtype=torch.int64)
    seed = whole("seed", seed)
    options = MeasureOptions(
        domain=domain,
        bounds=bounds,
        noise_retries=noise_retries,
        batch_size=batch_size,
        expect_over=expect_over,
        binary=binary,
    )
    probe = as_probe("test", given, options.bounds)
    chosen = made_estimators(estimators)
    units, _ = plan_units(chosen, plain_norms(norms), domain)
    for told in check_probes({"test": probe}, model, options):
        warnings.warn(told, stacklevel=2)
    if pool is not None:
        check_pool(pool, probe.images, options.bounds)
    shared = None if pool is None else classified(model, pool.to(device_of(model)), options)
    tables = []
    for unit in units:
        names = (seed, 0, "test", unit.estimator, unit.norm)
        found = measure_with(
            model,
            probe.images.to(device_of(model)),
            chosen[unit.estimator],
            unit.norm,  # type: ignore[arg-type]
            options,
            seeds=[derive_seed(*names, image) for image in probe.ids.tolist()],
            pool=shared,
            checked=True,
        )
        tables.append(margin_rows(0, "test", probe, unit, domain, found))
    rows = pd.concat(tables, ignore_index=True)
    left_out = {"epoch", "split", "seconds", *(("label", "correct") if alone else ())}
    return rows[[name for name in MARGIN_COLUMNS if name not in left_out]]


def margin_rows(epoch: int, split: str, probe: Probe, unit: Unit, domain: Domain, margins: Margins) -> pd.DataFrame:
    """One row per image, in `MARGIN_COLUMNS` but for ``seconds``."""
    columns = {
        "epoch": epoch,
        "split": split,
        "image": probe.ids.numpy(),
        "label": probe.labels.numpy(),
        "prediction": margins.prediction.numpy(),
        "correct": (margins.prediction == probe.labels).numpy(),
        "confidence": margins.confidence.numpy(),
        "logit_margin": margins.logit_margin.numpy(),
        "estimator": unit.estimator,
        "norm": unit.norm,
        "domain": domain,
        "distance": margins.distance.numpy(),
        "attack_distance": margins.attack_distance.numpy(),
        "status": [str(status) for status in margins.status],
        "target": margins.target.numpy(),
        "message": list(margins.message),
        "basins": margins.basins.numpy(),
        "noise_retries": margins.noise_retries.numpy(),
        "forwards": margins.forwards.numpy(),
        "backwards": margins.backwards.numpy(),
    }
    return pd.DataFrame(columns)
