"""Closed-loop co-serving: the budget is the time until the earliest token deadline, not a constant.

Two things that `coserving` cannot do. Time that fast tokens have banked is spent on finetuning, never more
than is there: every decoding sequence keeps its mean TPOT at every token, so it meets the bound whenever it
ends. And the predictor is corrected online by measured / predicted, with a margin that follows the error
seen, so a predictor that is wrong costs throughput or slack for a moment, not the SLO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.policies.packing import Latency, pack_inference
from sim.policies.slices import fill


class _Error(NamedTuple):
    """Measured over predicted time: exponential averages of the ratio and of its distance from that."""

    ratio: float = 1.0
    deviation: float = 0.0
    iteration: int = -1
    """The last one that is in the averages."""


class CoServingSlack:
    """Remembers the predictor's error."""

    serves = True

    def __init__(
        self,
        *,
        predictor: Predictor,
        budget_s: float,
        max_burst: float = 4.0,
        first_token_share: float = 0.5,
        smoothing: float = 0.05,
        margin_deviations: float = 2.0,
        max_forward_tokens: int = 8192,
        min_chunk_tokens: int = 16,
    ) -> None:
        """`budget_s`: the tightest TPOT bound; the budget of an iteration without decodes.

        `max_burst`: an iteration is never longer than so many `budget_s`, however much is banked.
        `first_token_share`: share of the time left to a prompt's TTFT deadline that may be used up
        until its prefill is done. `smoothing`: weight of the newest iteration in the error averages.
        `margin_deviations`: how many mean deviations of measured/predicted are kept as margin.
        """
        if not 0 < smoothing <= 1 or not 0 < first_token_share <= 1:
            raise ValueError(
                "policy.smoothing and policy.first_token_share must be in (0, 1], "
                f"got {smoothing} and {first_token_share}"
            )
        if not max_burst >= 1 or not margin_deviations >= 0:
            raise ValueError(
                "policy.max_burst must be at least 1 and policy.margin_deviations at least 0, "
                f"got {max_burst} and {margin_deviations}"
            )
        self._predictor = predictor
        self._budget_s = budget_s
        self._max_burst = max_burst
        self._first_token_share = first_token_share
        self._smoothing = smoothing
        self._margin_deviations = margin_deviations
        self._max_forward_tokens = max_forward_tokens
        self._min_chunk_tokens = min_chunk_tokens

    def plan(self, view: View) -> Plan:
        error = self._observe(view)
        correction = error.ratio * (1 + self._margin_deviations * error.deviation)
        budget_s = self._budget(view) / correction
        latency = Latency(self._predictor, budget_s, self._min_chunk_tokens)
        decode, prefills, preempted, work = pack_inference(view, latency=latency)
        slices, work = fill(work, view.jobs, self._predictor, budget_s, self._max_forward_tokens)
        predicted_s = self._predictor.iteration_s(work)
        return Plan(decode, prefills, preempted, slices, False, predicted_s, error)

    def _observe(self, view: View) -> _Error:
        error: _Error = view.memory or _Error()
        last = view.last
        if last is None or last.predicted_s is None or last.iteration == error.iteration:
            return error
        ratio = last.actual_s / last.predicted_s
        weight = self._smoothing
        return _Error(
            error.ratio + weight * (ratio - error.ratio),
            error.deviation + weight * (abs(ratio / error.ratio - 1) - error.deviation),
            last.iteration,
        )

    def _budget(self, view: View) -> float:
        """Seconds that the coming iteration may take."""
        if view.decode_count:
            banked_s = view.token_deadline_s - view.start_s
            budget_s = min(banked_s, self._max_burst * self._budget_s)
        else:
            budget_s = self._budget_s
        if view.prefilling or len(view.waiting):
            budget_s = min(budget_s, self._first_token_budget(view))
        return budget_s

    def _first_token_budget(self, view: View) -> float:
        """Seconds per iteration that let the first prompt in line be done before its TTFT deadline."""
        first = view.prefilling[0] if view.prefilling else view.waiting.first()
        deadline_s = first.first_token_deadline_s
        room = max(1, view.limits.max_tokens - view.decode_count)
        iterations = math.ceil(first.remaining_tokens / room)
        left_s = self._first_token_share * (deadline_s - view.start_s) / iterations
        # A deadline that is already lost must not cost the other requests theirs.
        return left_s if left_s > 0 else math.inf
