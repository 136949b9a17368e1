"""Certify the first probe images at chosen epochs and check the lower bounds against the measured distances."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks.certifier import Certificates, Certifier
from attacks.estimator import revision_of
from attacks.isolation.outputs import Logits
from attacks.measure import MeasureOptions
from attacks.types import EstimatorError, Norm, UnsoundError
from harness.config.devices import device_of
from harness.data.probes import Probe
from harness.store import BOUND_COLUMNS, MARGIN_COLUMNS, RunFolder, Unit
from harness.store.parts import read_bounds, read_margins
from harness.store.places import Place
from harness.store.tables import concatenate
from harness.store.tensors import save_checkpoint, save_tensors

# witnesses are classified in float32, bounds hold for the network in float64: what that may come to, of the distance
# and in pixel units
FLOAT32 = (1e-4, 1e-6)


class Certifying:
    """Certifiers of a run, each in every norm; what the folder has already is not done again.

    Attributes:
        every: every how many epochs, besides 0 and the last. probe: how many images of each split, the first ones.
    """

    def __init__(
        self,
        folder: RunFolder,
        probes: Mapping[str, Probe],
        certifiers: Mapping[str, Certifier],
        norms: Sequence[Norm],
        options: MeasureOptions,
        *,
        every: int,
        probe: int,
    ) -> None:
        self.folder, self.certifiers, self.options, self.every = folder, certifiers, options, every
        domain = options.domain
        self.probes = {
            name: Probe(given.images[:probe], given.labels[:probe], given.ids[:probe]) for name, given in probes.items()
        }
        for text, one in self.certifiers.items():
            if domain not in one.domains or not set(norms) & one.norms:
                raise EstimatorError(
                    f"expected a certifier of {', '.join(norms)} in the {domain} domain, got {text}; choose another"
                )
        self.units = [Unit(text, norm) for text, one in self.certifiers.items() for norm in norms if norm in one.norms]

    def missing(self, epoch: int, last: bool) -> list[Unit]:
        """What is to be done at the epoch."""
        if not (last or epoch % self.every == 0):
            return []
        return [unit for unit in self.units if not self.folder.bounds(epoch, unit).exists()]

    @property
    def images(self) -> int:
        """Of all splits."""
        return sum(len(probe.ids) for probe in self.probes.values())

    def certify(self, epoch: int, unit: Unit, model: nn.Module, weights: str) -> None:
        """Bound the margins of one unit and write its part.

        Raises:
            UnsoundError: a bound above the distance of a witness; the case is kept under ``unsound/``.
            InputError: a network that cannot be bounded.
        """
        began = time.perf_counter()
        before = max((done for done in self.folder.bounded_epochs(unit) if done < epoch), default=None)
        rows = pd.concat(
            [self._of_split(epoch, split, unit, model, before) for split in self.probes], ignore_index=True
        )
        rows["seconds"] = (time.perf_counter() - began) / len(rows)
        begun = {} if before is None else {"start": str(before)}
        begun["revision"] = str(revision_of(self.certifiers[unit.estimator]))
        self.folder.write_part(self.folder.bounds(epoch, unit), rows[list(BOUND_COLUMNS)], weights=weights, **begun)

    def _of_split(self, epoch: int, split: str, unit: Unit, model: nn.Module, before: int | None) -> pd.DataFrame:
        probe = self.probes[split]
        measured = self._measured(epoch, split, unit.norm)
        upper = torch.from_numpy(measured["distance"].to_numpy().copy())
        device = device_of(model)
        certificates = self.certifiers[unit.estimator].certify(
            Logits(model, binary=True) if self.options.binary else model,
            probe.images.to(device),
            unit.norm,  # type: ignore[arg-type]
            domain=self.options.domain,
            upper=upper,
            bounds=self.options.bounds,
            start=None if before is None else self._start(before, split, unit, upper),
        )
        predicted = measured["prediction"].to_numpy()
        # no estimator has measured this norm: there is nothing to disagree with
        prediction = np.where(predicted < 0, certificates.label.numpy(), predicted)
        # where float32 and float64 disagree, the image is on the boundary as far as either can tell
        lower = np.where(certificates.label.numpy() == prediction, certificates.lower.numpy(), 0.0)
        self._alarm(epoch, split, unit, model, certificates, lower, upper.numpy())
        return pd.DataFrame(
            {
                "epoch": epoch,
                "split": split,
                "image": probe.ids.numpy(),
                "label": probe.labels.numpy(),
                "prediction": prediction,
                "correct": prediction == probe.labels.numpy(),
                "certifier": unit.estimator,
                "norm": unit.norm,
                "domain": self.options.domain,
                "lower": np.minimum(lower, upper.numpy()),
                "upper": upper.numpy(),
                "solved": certificates.solved.numpy(),
            }
        )

    def _measured(self, epoch: int, split: str, norm: str) -> pd.DataFrame:
        """The smallest distance and the prediction of each probe image, in order; inf and -1 if there is none."""
        tables = [read_margins(self.folder, path)[0] for path in self.folder.margin_parts(epoch)]
        rows = concatenate(tables, MARGIN_COLUMNS)
        rows = rows[(rows["split"] == split) & (rows["norm"] == norm)]
        least = rows.groupby("image").agg(distance=("distance", "min"), prediction=("prediction", "first"))
        wanted = least.reindex(self.probes[split].ids.numpy())
        # without any estimator the columns have no type yet
        wanted = wanted.astype({"distance": float, "prediction": float})
        return wanted.fillna({"distance": np.inf, "prediction": -1}).astype({"prediction": int})

    def _start(self, before: int, split: str, unit: Unit, upper: Tensor) -> Tensor:
        """The radius that is as far from the witness as the last one was; NaN where there was none."""
        rows, _ = read_bounds(self.folder, self.folder.bounds(before, unit))
        rows = rows[rows["split"] == split].set_index("image").reindex(self.probes[split].ids.numpy())
        share = torch.from_numpy((rows["lower"] / rows["upper"]).to_numpy().copy())
        start = torch.where(upper.isfinite(), share, torch.nan) * upper
        return torch.where(start > 0, start, torch.nan)

    def _alarm(
        self,
        epoch: int,
        split: str,
        unit: Unit,
        model: nn.Module,
        certificates: Certificates,
        lower: np.ndarray[tuple[int], np.dtype[np.float64]],
        upper: np.ndarray[tuple[int], np.dtype[np.float64]],
    ) -> None:
        wrong = np.flatnonzero(lower > upper * (1 + FLOAT32[0]) + FLOAT32[1])
        if not len(wrong):
            return
        probe = self.probes[split]
        path = self.folder.unsound(epoch, unit)
        facts = self.folder.facts(Place("unsound", epoch, unit, split))
        case = {"images": probe.images[wrong], "ids": probe.ids[wrong], "label": certificates.label[wrong]}
        case |= {"lower": torch.from_numpy(lower[wrong]), "upper": torch.from_numpy(upper[wrong])}
        save_tensors(path, case, **facts)
        save_checkpoint(path.with_name(f"{path.stem}.model.safetensors"), model, epoch, facts)
        first = wrong[0]
        raise UnsoundError(
            f"expected lower bounds below the distances of witnesses, got {lower[first]:.6g} above {upper[first]:.6g} "
            f"for {split} image {int(probe.ids[first])} by {unit} at epoch {epoch}; a bug: report it with {path}"
        )
