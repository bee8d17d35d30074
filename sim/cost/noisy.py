"""`Noisy`: seeded multiplicative error around another model, so that the world is not what was predicted.

Factors are lognormal with mean 1 and coefficient of variation `spread`, drawn in blocks: one per call of
`iteration_s`. The inverse questions are the inner model's, which knows nothing of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from sim.core.cost import Predictor
from sim.core.work import Work
from sim.cost.context import CostBuilder, CostContext

BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    """Builder: `of` with noise."""

    of: CostBuilder
    spread: float
    """Standard deviation over mean of an iteration's seconds for equal work."""
    seed: int = 0
    """Added to the context's seed as a stream of its own."""

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must be in [0, 1), got {self.spread}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def build(self, context: CostContext) -> Predictor:
        return NoisyCost(self.of.build(context), self.spread, (context.seed, self.seed))


class NoisyCost:
    """A cost model whose `iteration_s` varies; equal seeds give equal sequences."""

    def __init__(self, inner: Predictor, spread: float, seed: tuple[int, int]) -> None:
        self.inner = inner
        self.largest_prefill = inner.largest_prefill
        self.largest_forward = inner.largest_forward
        self.largest_backward = inner.largest_backward
        self._inner_s = inner.iteration_s
        self._sigma = sqrt(log(1 + spread**2))
        self._random = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._factor = 1.0

    def iteration_s(self, work: Work) -> float:
        if not self._factors:
            self._draw()
        self._factor = self._factors.pop()
        return self._inner_s(work) * self._factor

    def parts(self, work: Work) -> dict[str, float]:
        """The inner parts times the factor of the latest `iteration_s`."""
        return {name: seconds * self._factor for name, seconds in self.inner.parts(work).items()}

    def _draw(self) -> None:
        normal = self._random.standard_normal(BLOCK)
        self._factors = np.exp(self._sigma * normal - self._sigma**2 / 2)[::-1].tolist()
