"""Effects pooled over seeds: a bootstrap over seeds crossed with images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from harness.statistics.effects.effect import Effect, Student

LEAST_SEEDS = 5
DRAWS = 1000  # relative error of the standard error: 2%
BLOCK = 4_000_000  # counts held in memory at a time; matters where whole training sets are resampled


@lru_cache(maxsize=4)
def _draws(size: int, count: int, stream: int) -> np.ndarray:
    """``(count, size)`` number of times that each item is drawn.

    Equal arguments give equal draws, so that the same tables give the same report.
    """
    draw = np.random.default_rng((size, count, stream + 1))
    return draw.multinomial(size, np.full(size, 1 / size), size=count).astype(float)


@dataclass(frozen=True, eq=False)
class Pooled(Student):
    """Average of one effect over seeds; the runs of all seeds measured the same images.

    Seeds and images are drawn with replacement, independently of each other. Every drawn seed has the same drawn
    images (Owen 2007, "The pigeonhole bootstrap"). The interval is Student's with the standard error of this bootstrap
    and ``S - 1`` degrees of freedom for S seeds. The standard error is multiplied by ``sqrt(S / (S - 1))``, because a
    bootstrap of S seeds sees only ``(S - 1) / S`` of their variance.

    Attributes:
        effects: one per seed, with values aligned with the same images.
    """

    effects: tuple[Effect, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.effects[0].name}, average of {len(self.effects)} seeds"

    @cached_property
    def estimate(self) -> float:
        return float(np.mean([effect.estimate for effect in self.effects]))

    @cached_property
    def error(self) -> float:
        seeds, size = len(self.effects), self.size
        at_once = max(1, min(DRAWS, BLOCK // size))
        blocks = []
        for start in range(0, DRAWS, at_once):
            images = _draws(size, min(at_once, DRAWS - start), start)
            blocks.append(np.stack([effect.resample(images) for effect in self.effects], axis=1))
        each, drawn = np.concatenate(blocks), _draws(seeds, DRAWS, -1)
        return float(((each * drawn).sum(axis=1) / seeds).std(ddof=1) * np.sqrt(seeds / (seeds - 1)))

    def interval(self, alpha: float) -> tuple[float, float]:
        low, high = super().interval(alpha)
        least, most = self.effects[0].limits
        return max(low, least), min(high, most)

    @property
    def freedom(self) -> float:
        return len(self.effects) - 1

    @property
    def images(self) -> int:
        return min(effect.images for effect in self.effects)

    @property
    def left_out(self) -> int:
        return max(effect.left_out for effect in self.effects)

    @property
    def smaller_group(self) -> int:
        return min(effect.smaller_group for effect in self.effects)

    @property
    def size(self) -> int:
        return self.effects[0].size

    def obstacle(self) -> str:
        return next((words for words in (effect.obstacle() for effect in self.effects) if words), "")

    def show(self, value: float) -> float:
        return self.effects[0].show(value)

    def resample(self, counts: np.ndarray) -> np.ndarray:
        return np.asarray(np.mean([effect.resample(counts) for effect in self.effects], axis=0))
