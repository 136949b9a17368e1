"""Another estimator's witnesses, moved along the boundary of a ReLU network to local minima of the distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.regions.cells import Passes, check_units
from attacks.certify.regions.faces import Task
from attacks.certify.regions.walk import nearest_boundary
from attacks.estimator import Estimator, revision_of
from attacks.geometry import boundary_fraction, least_step, on_segment, per_row, row_norm
from attacks.isolation import Classifier
from attacks.isolation.outputs import Logits
from attacks.types import Domain, EstimatorError, InputError, Norm

# Parts of the distance beyond the boundary at which the classifier, in its own precision, is asked, with what rounding
# might swallow added. Nearer, another batch puts some points back (as for the judge's own step), and the row is lost.
STEPS_OVER = (5e-5, 1e-4, 1e-3)
# entries of the constraints of a group of images that are polished at a time, at most, and so many constraints each
ENTRIES = 2**23
CONSTRAINTS = 64
# of polishing (see `attacks.estimator.Settings`)
REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Polished:
    """Runs ``inner``, then polishes its witnesses: ``deepfool:refine=polish``.

    Where units keep their signs, a ReLU network is affine, and the nearest point at which another class leads solves a
    convex problem; across the faces that hold that point, it is looked for again (see `attacks.certify.regions.walk`),
    and so it is from walks to the classes nearby.
    Rows without a witness, and those whose polished point the model does not confirm, stay as the inner estimator left
    them. Only networks of affine layers, ReLU and LeakyReLU can be read; their passes in float64 count as passes.
    """

    inner: Estimator

    def __post_init__(self) -> None:
        if isinstance(self.inner, Polished):
            raise EstimatorError(f"expected refine=polish once, got it twice on {self.name}; leave one out")
        if warm := warmth(self.inner):
            raise EstimatorError(
                f"expected refine=polish of an estimator without warm starts, got {self.name} with warm={warm}; "
                "leave one of the two out"
            )

    @property
    def name(self) -> str:
        """The inner estimator's."""
        return self.inner.name

    @property
    def norms(self) -> frozenset[Norm]:
        """The inner estimator's."""
        return self.inner.norms

    @property
    def domains(self) -> frozenset[Domain]:
        """The inner estimator's."""
        return self.inner.domains

    @property
    def tightness(self) -> Mapping[Norm, float]:
        """The inner estimator's: polishing makes no distance larger."""
        return self.inner.tightness

    @property
    def batch_invariant(self) -> bool:
        """The inner estimator's."""
        return self.inner.batch_invariant

    @property
    def revision(self) -> int:
        """Rises with the inner estimator's and with that of polishing."""
        return revision_of(self.inner) + REVISION - 1

    @property
    def refills(self) -> bool:
        """Whether the inner estimator fills its batches up by itself."""
        return bool(getattr(self.inner, "refills", False))

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`.

        Raises:
            InputError: the model is no such network; names the layer.
        """
        network = read(model, images)
        found = self.inner.perturb(model, images, labels, norm, seeds=seeds, start=start).detach().to(images)
        # the library's attack may have left its modes and buffers in the view
        model.settle()
        result = found.clone()
        size = max(1, ENTRIES // (CONSTRAINTS * images[0].numel()))
        witnesses = torch.nonzero(_changed(model, found, labels)).flatten()
        for rows in torch.split(witnesses, size) if len(witnesses) else ():
            with model.rows(rows), torch.no_grad():
                witness = found[rows].clamp(*model.bounds)
                result[rows] = _polish(network, model, images[rows], labels[rows], witness, norm)
        return result


def warmth(estimator: object) -> int:
    """The setting ``warm``, 0 where there is none."""
    return int(getattr(estimator, "warm", 0))


def read(model: Classifier, images: Tensor) -> PiecewiseNetwork:
    """The network behind a view.

    Raises:
        InputError: it is none of affine layers, ReLU and LeakyReLU; names the layer.
    """
    if model.draws > 1:
        raise InputError(
            f"expected one network to read for refine=polish, got an average over {model.draws} draws; leave "
            "refine=polish or expect_over out"
        )
    model_of_two = Logits(model.network, binary=True) if model.binary else model.network
    network = PiecewiseNetwork(model_of_two, tuple(images.shape[1:]), images.device)
    check_units(network)
    return network


def _polish(
    network: PiecewiseNetwork, model: Classifier, images: Tensor, labels: Tensor, witness: Tensor, norm: Norm
) -> Tensor:
    """Witnesses that are no farther than these, which are inside the bounds."""

    def outside(points: Tensor, rows: Tensor) -> Tensor:
        with model.rows(rows):
            return _changed(model, points, labels[rows])

    ends = on_segment(images, witness, boundary_fraction(outside, images, witness))
    limits = model.pixel_bounds if model.domain == "box" else (-math.inf, math.inf)
    pixels = model.to_pixels(images).double().clamp(*limits)
    task = Task(
        network, pixels, labels, norm, limits, torch.arange(len(images), device=images.device), Passes.none(images)
    )
    points = nearest_boundary(task, model.to_pixels(ends).double())
    model.charge(task.passes.forwards, task.passes.backwards)
    return _confirmed(model, images, labels, witness, model.from_pixels(points), norm)


def _confirmed(
    model: Classifier, images: Tensor, labels: Tensor, witness: Tensor, points: Tensor, norm: Norm
) -> Tensor:
    """The points, a little farther from the image, where they are of another class and nearer than the witness."""
    result, pending = witness.clone(), torch.arange(len(images), device=images.device)
    longest = row_norm(witness - images, norm)
    length = row_norm(points - images, norm).clamp_min(torch.finfo(torch.float64).tiny)
    for farther in STEPS_OVER:
        here = images[pending]
        reach = per_row(1 + farther + least_step(images, norm) / length[pending], points)
        trial = (here + reach * (points[pending] - here)).to(images).clamp(*model.bounds)
        with model.rows(pending):
            better = _changed(model, trial, labels[pending]) & (row_norm(trial - here, norm) < longest[pending])
        result[pending[better]] = trial[better]
        pending = pending[~better]
        if not len(pending):
            break
    return result


def _changed(model: Classifier, points: Tensor, labels: Tensor) -> Tensor:
    """Whether the model puts points into other classes: ``(B,)`` bool; those that are not finite are in none."""
    finite = points.flatten(1).isfinite().all(1)
    with torch.no_grad():
        logits: Tensor = model(torch.where(per_row(finite, points).bool(), points, 0.0).clamp(*model.bounds))
    return finite & logits.isfinite().all(1) & (logits.argmax(1) != labels)
