"""Polishing: move an estimator's witnesses along a ReLU network's boundary to local minima of the distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.certify.network.nonlinearities import MaxPool
from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.certify.regions.cells import Passes, check_units
from attacks.certify.regions.faces import Task
from attacks.certify.regions.walk import nearest_boundary
from attacks.estimator import Estimator, revision_of
from attacks.geometry import boundary_fraction, least_step, on_segment, per_row, row_norm
from attacks.isolation import Classifier
from attacks.isolation.outputs import Logits
from attacks.pool import Pool, uses_pool, with_pool
from attacks.search.linearised import left_class
from attacks.types import Domain, EstimatorError, InputError, Norm

# Relative overshoots beyond the boundary at which the classifier checks a point in its own precision, in addition to
# the least step that rounding preserves. With less, some points change back in another batch (as for the step of
# `measure` itself), and the row is lost.
STEPS_OVER = (5e-5, 1e-4, 1e-3)
# most entries of the constraints of the images that are polished together, at this many constraints per image
ENTRIES = 2**23
CONSTRAINTS = 64
# revision of polishing (see `attacks.estimator.Settings`)
REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Polished:
    """Runs ``inner``, then polishes its witnesses: ``deepfool:refine=polish``.

    Where its units keep their signs, a ReLU network is affine, and the nearest point at which another class leads is
    the solution of a convex problem. The search continues across the faces that are active at that point (see
    `attacks.certify.regions.walk`). It starts from the witness and from points of the nearest classes.

    Rows without a witness, and rows whose polished point the model does not confirm, stay as the inner estimator left
    them. Only networks of affine layers, ReLU, LeakyReLU and max pooling can be read. Passes in float64 count as
    passes.
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
        """That of the inner estimator."""
        return self.inner.name

    @property
    def norms(self) -> frozenset[Norm]:
        """Those of the inner estimator."""
        return self.inner.norms

    @property
    def domains(self) -> frozenset[Domain]:
        """Those of the inner estimator."""
        return self.inner.domains

    @property
    def tightness(self) -> Mapping[Norm, float]:
        """That of the inner estimator: polishing makes no distance larger."""
        return self.inner.tightness

    @property
    def batch_invariant(self) -> bool:
        """That of the inner estimator."""
        return self.inner.batch_invariant

    @property
    def revision(self) -> int:
        """Rises with the revision of the inner estimator and with that of polishing."""
        return revision_of(self.inner) + REVISION - 1

    @property
    def refills(self) -> bool:
        """Whether the inner estimator refills its batches itself."""
        return bool(getattr(self.inner, "refills", False))

    @property
    def uses_pool(self) -> bool:
        """Whether the inner estimator takes a pool."""
        return uses_pool(self.inner)

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`.

        Raises:
            InputError: the model cannot be read; names the layer.
        """
        network = read(model, images)
        given = with_pool(self.inner, pool)
        candidates = self.inner.perturb(model, images, labels, norm, seeds=seeds, start=start, **given)
        candidates = candidates.detach().to(images)
        # a library's attack may have changed modes and buffers of the view
        model.settle()
        return polished(network, model, images, labels, candidates, norm)


def polished(
    network: PiecewiseNetwork, model: Classifier, images: Tensor, labels: Tensor, candidates: Tensor, norm: Norm
) -> Tensor:
    """The candidates ``(B, ...)``, with nearer witnesses in the place of those that are witnesses where there are any.

    Args:
        network: see `read`.
    """
    result = candidates.clone()
    size = max(1, ENTRIES // (CONSTRAINTS * images[0].numel()))
    witnesses = torch.nonzero(_changed(model, candidates, labels)).flatten()
    for rows in torch.split(witnesses, size) if len(witnesses) else ():
        with model.rows(rows), torch.no_grad():
            witness = candidates[rows].clamp(*model.bounds)
            result[rows] = _polish(network, model, images[rows], labels[rows], witness, norm)
    return result


def warmth(estimator: object) -> int:
    """The setting ``warm``, 0 for an estimator without it."""
    return int(getattr(estimator, "warm", 0))


def read(model: Classifier, images: Tensor, most: float = math.inf) -> PiecewiseNetwork:
    """Read the network of a view.

    Args:
        most: units that the network may have.

    Raises:
        InputError: the network has other layers than affine ones, ReLU, LeakyReLU and max pooling; names the layer.
    """
    if model.draws > 1:
        raise InputError(
            f"expected a single network for refine=polish, got an average over {model.draws} draws; leave "
            "refine=polish or expect_over out"
        )
    model_of_two = Logits(model.network, binary=True) if model.binary else model.network
    shape = tuple(images.shape[1:])
    network = PiecewiseNetwork(model_of_two, shape, images.device)
    if (units := sum(map(network.units, range(len(network.nonlinearities))))) > most:
        raise InputError(f"expected at most {most:.0f} units to polish, got {units}; leave refine=polish out")
    if any(isinstance(nonlinearity, MaxPool) for nonlinearity in network.nonlinearities):
        # a large network takes long to unfold
        network = PiecewiseNetwork(model_of_two, shape, images.device, pooling=False)
    check_units(network)
    return network


def _polish(
    network: PiecewiseNetwork, model: Classifier, images: Tensor, labels: Tensor, witness: Tensor, norm: Norm
) -> Tensor:
    """Witnesses that are no farther than ``witness``, which lies inside the bounds."""

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
    """The points with a small overshoot, where these are of another class and nearer than the witness."""
    result, pending = witness.clone(), torch.arange(len(images), device=images.device)
    longest = row_norm(witness - images, norm)
    length = row_norm(points - images, norm).clamp_min(torch.finfo(torch.float64).tiny)
    for farther in STEPS_OVER:
        origin = images[pending]
        reach = per_row(1 + farther + least_step(images, norm) / length[pending], points)
        trial = (origin + reach * (points[pending] - origin)).to(images).clamp(*model.bounds)
        with model.rows(pending):
            better = _changed(model, trial, labels[pending]) & (row_norm(trial - origin, norm) < longest[pending])
        result[pending[better]] = trial[better]
        pending = pending[~better]
        if not len(pending):
            break
    return result


def _changed(model: Classifier, points: Tensor, labels: Tensor) -> Tensor:
    """Whether points have another class than their label: ``(B,)`` bool; false for points that are not finite."""
    finite = points.flatten(1).isfinite().all(1)
    with torch.no_grad():
        logits: Tensor = model(torch.where(per_row(finite, points).bool(), points, 0.0).clamp(*model.bounds))
    return finite & left_class(logits, labels)
