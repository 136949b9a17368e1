"""Restarts: short descents from other points of the ball of the best distance, and walks from outside.

After adversarial training the walks from an image end in whichever basin its gradient points to. A start elsewhere in
the ball decides for another one, and a few steps are enough to see whether it is nearer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.geometry import ball_point, boundary_fraction, on_segment, per_row, project, row_norm
from attacks.isolation import Classifier
from attacks.pool import Pool
from attacks.search.descent import Nearest, advance, note_witnesses, set_out
from attacks.search.linearised import left_class
from attacks.seeds import seeded_directions
from attacks.types import Norm

# smallest relative reduction of a distance that counts as a gain
GAIN = 1e-3
# bisections of the segment to a pool's image, one forward each, and their tolerance
BISECTIONS = 6
TOLERANCE = 0.03
# most steps of the last descent, in those of the default budget: longer ones gained nothing
LONGEST_FINISH = 4.0


@dataclass(frozen=True)
class Course:
    """A descent of one walk per image.

    Attributes:
        steps: how many.
        stride, shrink: first and last value, on half a cosine; see `attacks.search.descent.advance`.
        momentum: factor of the drift.
    """

    steps: int
    stride: tuple[float, float]
    shrink: tuple[float, float]
    momentum: float

    @property
    def passes(self) -> int:
        """Passes of an image: two a step, and one for the last point."""
        return 2 * self.steps + 1


@dataclass(frozen=True)
class Plan:
    """What follows an image's walks.

    Attributes:
        restart: the descent of a restart.
        tries: how many restarts are made where none gains.
        expected: how many are made on average over images that are hard to measure.
        patience: where one has gained, how many in a row gain nothing before they end.
        kick: length of the kicks off the witness at which restarts begin, in distances; None for points at random.
        outside: the descent of the walk from the way to a point of another class.
        finish: the last descent, from the nearest witness.
    """

    restart: Course
    tries: int
    expected: int
    patience: int
    kick: float | None
    outside: Course
    finish: Course

    @property
    def passes(self) -> int:
        """Passes of an average image."""
        return self.expected * self.restart.passes + self.finish.passes

    def scaled(self, factor: float) -> Plan:
        """More restarts and a longer last descent, for ``factor`` times the passes."""
        if factor <= 1:
            return self
        longer = replace(self.finish, steps=round(self.finish.steps * min(factor, LONGEST_FINISH)))
        return replace(
            self,
            tries=round(self.tries * factor),
            expected=round(self.expected * factor),
            patience=round(self.patience * factor),
            finish=longer,
        )


@dataclass(frozen=True)
class Search:
    """A batch of images, whose nearest witnesses are improved in place."""

    model: Classifier
    images: Tensor
    labels: Tensor
    norm: Norm
    seeds: Tensor
    nearest: Nearest
    pool: Pool | None

    def run(self, plan: Plan, rows: Tensor, *, limit: float) -> None:
        """The whole plan for the images ``rows`` ``(A,)``, of which none spends more than ``limit`` passes."""
        stale, patience = torch.zeros_like(self.labels), torch.full_like(self.labels, plan.tries)
        self._walk_from_outside(plan, rows[self.nearest.distance[rows].isinf()], limit)
        rows = rows[self.nearest.distance[rows].isfinite()]
        number, ever = 0, torch.zeros_like(stale, dtype=torch.bool)
        while len(due := self._afford(rows[(stale < patience)[rows]], limit, plan.restart, plan.finish)):
            gained = self._descend(plan.restart, due, self._starts(plan, due, number))
            stale[due] = torch.where(gained, 0, stale[due] + 1)
            patience[due[gained]] = plan.patience
            ever[due[gained]] = True
            number += 1
        if self.pool is not None and plan.kick:
            # where a kick gained, walks disagree; where none did, this walk gained nothing on standard networks
            self._walk_from_outside(plan, rows[ever[rows]], limit)
        rows = self._afford(rows, limit, plan.finish)
        self._descend(plan.finish, rows, self.nearest.witness[rows])

    def _afford(self, rows: Tensor, limit: float, *cost: Course | int) -> Tensor:
        """Those of the rows that have passes left for all of this."""
        passes = sum(part if isinstance(part, int) else part.passes for part in cost)
        return rows[(spent(self.model) + passes <= limit)[rows]]

    def _starts(self, plan: Plan, rows: Tensor, number: int) -> Tensor:
        """Where the restart of this number begins, inside the ball of each image's best distance: ``(A, ...)``."""
        images, radius = self.images[rows], self.nearest.distance[rows]
        direction = seeded_directions(images, self.seeds[rows], self.norm, 1 + number)
        centre, size = (images, 1.0) if plan.kick is None else (self.nearest.witness[rows], plan.kick)
        points = ball_point(centre, direction, size * radius, self.model.bounds)
        if plan.kick is None and self.pool is not None and number % 2 == 0:
            others, there = self.pool.nearest_others(images, self.labels[rows], number // 2)
            points = torch.where(per_row(there, images).bool(), others, points)
        return images + project(points - images, radius, self.norm)

    def _walk_from_outside(self, plan: Plan, rows: Tensor, limit: float) -> None:
        """Walks from the boundary on the way to a point of another class.

        The gradient at the image plays no part, and the point where a walk sets out is a witness at once.
        """
        rows = self._afford(rows, limit, plan.outside, plan.finish, BISECTIONS, 1)
        if not len(rows):
            return
        others = self._others(rows)
        logits = self._logits(others, rows)
        there = left_class(logits, self.labels[rows])
        rows, others, target = rows[there], others[there], logits.argmax(1)[there]
        if not len(rows):
            return

        def outside(points: Tensor, active: Tensor) -> Tensor:
            return self._outside(points, rows[active])

        fraction = boundary_fraction(outside, self.images[rows], others, tolerance=TOLERANCE, passes=BISECTIONS)
        points = on_segment(self.images[rows], others, fraction)
        self._descend(plan.outside, rows, points, target, row_norm(points - self.images[rows], self.norm))

    def _others(self, rows: Tensor) -> Tensor:
        """The pool's nearest image of another class, else the image's negative: ``(A, ...)``."""
        images = self.images[rows]
        if self.pool is None:
            return 1.0 - images
        points, there = self.pool.nearest_others(images, self.labels[rows], 0)
        return torch.where(per_row(there, images).bool(), points, 1.0 - images)

    def _descend(
        self, course: Course, rows: Tensor, points: Tensor, target: Tensor | None = None, radius: Tensor | None = None
    ) -> Tensor:
        """A walk of each of the images from ``points`` ``(A, ...)``.

        Args:
            target: ``(A,)`` classes to walk towards; by default the leading other class at each step.
            radius: ``(A,)`` float64, of the ball that a walk begins in; by default that of the nearest witness, which
                the walk then never leaves.

        Returns:
            ``(A,)`` bool, whether the best distance fell by more than `GAIN`.
        """
        if not len(rows):
            return torch.zeros_like(rows, dtype=torch.bool)
        before = self.nearest.distance[rows]
        walks = set_out(self.images, rows, self.labels[rows] if target is None else target)
        walks.point, walks.radius = points, before if radius is None else radius
        if radius is None:
            walks.distance, walks.witness = before, self.nearest.witness[rows]
        for step in range(course.steps):
            fall = (1 + math.cos(math.pi * step / course.steps)) / 2
            stride, shrink = (
                torch.full_like(before, last + (first - last) * fall) for first, last in (course.stride, course.shrink)
            )
            advance(
                self.model,
                self.images,
                self.labels,
                walks,
                self.norm,
                stride=stride,
                shrink=shrink,
                momentum=course.momentum,
            )
        note_witnesses(walks, self.images, self._outside(walks.point, rows), self.norm)
        self.nearest.note(walks)
        return self.nearest.distance[rows] < before * (1 - GAIN)

    def _outside(self, points: Tensor, rows: Tensor) -> Tensor:
        """Whether points have another class, ``(A,)`` bool; false where logits are not finite."""
        return left_class(self._logits(points, rows), self.labels[rows])

    @torch.no_grad()
    def _logits(self, points: Tensor, rows: Tensor) -> Tensor:
        with self.model.rows(rows):
            logits: Tensor = self.model(points)
        return logits


def spent(model: Classifier) -> Tensor:
    """Passes so far of each active image, ``(B,)`` float64; an average over draws is one here."""
    return (model.forwards + model.backwards)[model.active] / model.draws
