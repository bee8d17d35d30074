"""Closed-loop co-serving: the budget is the time until the earliest token deadline, not a constant.

What `coserving` cannot do. Time that fast tokens have banked is spent on finetuning, never more than is
there: unless first tokens came late, every decoding sequence keeps its mean TPOT at every token, so it meets
the bound whenever it ends.
Where even the least chunk of a prompt would break that (64 tokens after 50,000 on an A100, for 45 ms), the
prompt waits for iterations that only decode, and bank the time for it. The predictor is corrected online by
measured / predicted, with a margin that follows the error seen, so a predictor that is wrong costs throughput
or slack for a moment, not the SLO. Where no request is, and the less one is to be expected, iterations are
long. And finetuning runs on a second stream beside inference where the predictor, corrected by what two
streams took so far, says that this gets more done.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sim.core.cost import Predictor
from sim.core.finetune import JobView, Slice
from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import (
    Latency,
    checked_share,
    checked_tokens,
    finetuning_budget_s,
    pack_inference,
    prompts_first,
    time_share,
)
from sim.policies.slices import add_slices, fill

WORTH_A_STREAM = 1.01
"""How many times the seconds of two streams one must take for the same work: below that it is rounding."""


RETRIED = 400
"""Iterations in a row on two streams after which one is tried again: what it takes has been unseen for so long."""


class _Memory(NamedTuple):
    """Measured over predicted time: exponential averages of the ratio and of its distance from what it was
    expected to be."""

    ratio: float
    """On one stream."""
    deviation: float
    beside: float | None
    """The ratio on two streams: how much they hide of each other is what a predictor knows least. None, and
    that of one is taken, until it has been seen."""
    in_a_row: int
    """Last iterations on two streams."""
    iteration: int
    """The last one that is in the averages."""
    quiet_from_s: float
    """Start of the last iteration that was planned with a request here."""


class CoServingSlack:
    """Remembers the predictor's error, and since when it is idle."""

    serves = True
    finetunes = True

    def __init__(
        self,
        *,
        predictor: Predictor,
        budget_s: float,
        ttft_s: float,
        max_burst: float = 4.0,
        idle_share: float = 0.3,
        quiet_share: float = 0.01,
        first_token_share: float = 0.5,
        smoothing: float = 0.05,
        margin_deviations: float = 3.0,
        max_forward_tokens: int = 8192,
        min_chunk_tokens: int = 64,
    ) -> None:
        """`budget_s`, `ttft_s`: the tightest TPOT and TTFT bounds of the traffic.

        `max_burst`: while requests decode, an iteration is never longer than so many `budget_s`, however much
        is banked, unless first tokens came late and prompts fill it. `idle_share`: share of `ttft_s` that an
        iteration may last while no request is here; one that arrives meanwhile waits for its end.
        `quiet_share`: share of the time for which none has been here that it may last if that is more, up to
        `first_token_share` of `ttft_s`: requests that come after a long quiet are few. `first_token_share`:
        share of the time left to the TTFT deadlines that may be used up until the waiting prompts are done.
        `smoothing`: weight of the newest iteration in the error averages. `margin_deviations`: how many mean
        deviations of measured/predicted are kept as margin; since deadlines are absolute, time that it leaves
        is there for the next iteration.
        """
        if not max_burst >= 1 or not 0 <= margin_deviations < math.inf:
            raise ValueError(
                "policy.max_burst must be at least 1, policy.margin_deviations at least 0 and finite, "
                f"got {max_burst} and {margin_deviations}"
            )
        self._predictor = predictor
        self._budget_s = budget_s
        self._max_burst = max_burst
        self._idle_s = max(budget_s, checked_share("idle_share", idle_share) * ttft_s)
        self._quiet_share = checked_share("quiet_share", quiet_share)
        self._quiet_s = max(budget_s, first_token_share * ttft_s)
        self._first_token_share = checked_share("first_token_share", first_token_share)
        self._smoothing = checked_share("smoothing", smoothing)
        self._margin_deviations = margin_deviations
        self._max_forward_tokens = checked_tokens("max_forward_tokens", max_forward_tokens)
        self.min_chunk_tokens = checked_tokens("min_chunk_tokens", min_chunk_tokens)

    def plan(self, view: View) -> Plan:
        memory = self._observe(view)
        correction = memory.ratio * (1 + self._margin_deviations * memory.deviation)
        tokens_s = self._token_budget(view, memory)
        within_s = tokens_s / correction
        hurry = prompts_first(view, self._predictor, correction)
        latency = None if hurry else Latency(self._predictor, within_s, self.min_chunk_tokens)
        decode, prefills, preempted, work = pack_inference(view, latency=latency)
        # A prompt in a hurry gets its chunk as large as the decodes allow; only finetuning makes way.
        budget_s = finetuning_budget_s(view, tokens_s, self._first_token_share)
        if view.prefilling or view.waiting.count:
            if len(prefills) == 1 and view.decode_count and not (preempted or hurry):
                alone_s = self._predictor.iteration_s(view.decode_work)
                if alone_s <= within_s < self._predictor.iteration_s(work):
                    # Even the least chunk would break a bound that decoding alone keeps: it waits until time
                    # for it has been banked.
                    return Plan(decode, predicted_s=alone_s, memory=memory)
            budget_s = min(budget_s, self._budget_s)
        beside = 1.0 if memory.beside is None else memory.beside / memory.ratio
        if memory.in_a_row >= RETRIED:
            beside = math.inf
        slices, overlap, predicted_s = self._finetuning(work, view.jobs, budget_s / correction, beside)
        return Plan(decode, prefills, preempted, slices, overlap, predicted_s, memory)

    def _finetuning(
        self, work: Work, jobs: tuple[JobView, ...], budget_s: float, beside: float
    ) -> tuple[tuple[Slice, ...], bool, float]:
        """The slices, whether they run on a second stream beside inference, and the predicted seconds.
        `beside`: how many times as wrong as on one stream the prediction is on two.

        On one stream a forward window shares the read of the weights with inference, which pays while few
        tokens use it; on two, the shorter stream hides in part behind the longer.
        """
        slices, predicted_s = fill(work, jobs, self._predictor, budget_s, self._max_forward_tokens)
        if slices and (work.decode_count or work.prefill):
            two = work._replace(overlap=True)
            two_s = beside * self._predictor.iteration_s(add_slices(two, jobs, slices))
            if WORTH_A_STREAM * two_s < predicted_s:
                more, two_s = fill(two, jobs, self._predictor, budget_s / beside, self._max_forward_tokens)
                return more, True, two_s
        return slices, False, predicted_s

    def _observe(self, view: View) -> _Memory:
        memory: _Memory = view.memory or _Memory(1.0, 0.0, None, 0, -1, view.start_s)
        ratio, deviation, beside, in_a_row, iteration, quiet_from_s = memory
        if view.running or len(view.waiting):
            quiet_from_s = view.start_s
        last = view.last
        if last is not None and last.predicted_s is not None and last.iteration != iteration:
            seen = last.actual_s / last.predicted_s
            two = ratio if beside is None else beside
            expected = two if last.work.overlap else ratio
            deviation += self._smoothing * (abs(seen / expected - 1) - deviation)
            if last.work.overlap:
                beside, ratio = self._averaged(seen, two, ratio)
                in_a_row += 1
            else:
                ratio, two = self._averaged(seen, seen if in_a_row >= RETRIED else ratio, two)
                beside = None if beside is None else two
                in_a_row = 0
            iteration = last.iteration
        return _Memory(ratio, deviation, beside, in_a_row, iteration, quiet_from_s)

    def _averaged(self, seen: float, average: float, other: float) -> tuple[float, float]:
        """The average with what was seen, and the one of which nothing was. That one, where it is worse, comes
        slowly closer: a bad iteration must not keep its number of streams from being tried again."""
        weight = self._smoothing
        average += weight * (seen - average)
        return average, (other + weight * weight * (average - other) if other > average else other)

    def _token_budget(self, view: View, memory: _Memory) -> float:
        """Seconds that the coming iteration may take for the sake of the decoding requests, or of one that
        may come."""
        if view.decode_count:
            return min(view.token_deadline_s - view.start_s, self._max_burst * self._budget_s)
        idle_s = self._idle_s
        if not view.running and not view.waiting.count:
            idle_s = max(self._budget_s, time_share(view.late_share) * idle_s)
        quiet_s = self._quiet_share * (view.start_s - memory.quiet_from_s)
        return max(idle_s, min(quiet_s, self._quiet_s))
