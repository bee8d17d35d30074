"""What the loop's users need of a cost model: seconds for a Work, and the scheduler's inverse."""

from __future__ import annotations

from typing import Protocol

from sim.core.finetune import JobView
from sim.core.work import Work

Fit = tuple[int, float]
"""The answer to an inverse question about finetuning: tokens of a forward window or layer-tokens of a backward
slice, 0 when not even the smallest fits, and `iteration_s` of the work with them."""


class CostModel(Protocol):
    """Maps Work to seconds. `world` and `predictor` are two objects of this kind."""

    def iteration_s(self, work: Work) -> float:
        """Seconds of one iteration, host time included. Work without any tokens costs host time."""
        ...

    def parts(self, work: Work) -> dict[str, float]:
        """The same seconds by part; the values add up to `iteration_s`."""
        ...


class Predictor(CostModel, Protocol):
    """A cost model that can be asked backwards; each answer is exact for its own `iteration_s`.

    The answers about finetuning come with their seconds, since with them the work is complete.
    """

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        """Most tokens (0..max_tokens) of one more prefill chunk that keep `work` within the budget."""
        ...

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> Fit:
        """Most tokens (0..max_tokens) of one more forward window that keep `work` within the budget."""
        ...

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> Fit:
        """Most layer-tokens of `job`'s backward, from where it stands, that keep within the budget."""
        ...
