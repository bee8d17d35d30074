"""`Scaled`: a model that is wrong by a constant factor; 0.5 believes everything to be twice as fast."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nextafter

from sim.core.cost import Fit, Predictor
from sim.core.finetune import JobView
from sim.core.work import Work
from sim.cost.context import CostBuilder, CostContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Builder: `of` with every second multiplied by `factor`."""

    of: CostBuilder
    factor: float = 1.0

    def __post_init__(self) -> None:
        # Far outside, a budget over the factor would overflow; nobody means such a factor.
        if not 1e-3 <= self.factor <= 1e3:
            raise ValueError(f"factor must be in [0.001, 1000], got {self.factor}")

    def build(self, context: CostContext) -> Predictor:
        inner = self.of.build(context)
        return inner if self.factor == 1 else ScaledCost(inner, self.factor)


class ScaledCost:
    """`inner` times `factor`; the inverses stay exact."""

    def __init__(self, inner: Predictor, factor: float) -> None:
        self.inner = inner
        self.factor = factor
        self._inner_s = inner.iteration_s

    def iteration_s(self, work: Work) -> float:
        return self._inner_s(work) * self.factor

    def parts(self, work: Work) -> dict[str, float]:
        return {name: seconds * self.factor for name, seconds in self.inner.parts(work).items()}

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        return self.inner.largest_prefill(work, context, max_tokens, self._inner_budget_s(budget_s))

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> Fit:
        budget_s = self._inner_budget_s(budget_s)
        tokens, seconds = self.inner.largest_forward(work, context, max_tokens, budget_s)
        return tokens, seconds * self.factor

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> Fit:
        tokens, seconds = self.inner.largest_backward(work, job, self._inner_budget_s(budget_s))
        return tokens, seconds * self.factor

    def _inner_budget_s(self, budget_s: float) -> float:
        """The largest float whose product with the factor is within the budget; a division may miss it."""
        inner_s = budget_s / self.factor
        while inner_s * self.factor > budget_s:
            inner_s = nextafter(inner_s, -inf)
        while (above_s := nextafter(inner_s, inf)) * self.factor <= budget_s and above_s < inf:
            inner_s = above_s
        return inner_s
