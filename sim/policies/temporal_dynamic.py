"""Temporal sharing whose interval follows the load: finetuning comes often when traffic is light, rarely
when requests queue or arrive quickly."""

from __future__ import annotations

from typing import NamedTuple

from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import checked_budget, pack_inference
from sim.policies.slices import whole_step


class _Memory(NamedTuple):
    passed: int = 0
    """Inference iterations since the last finetuning."""
    rate_rps: float = 0.0
    """Arrival rate, averaged exponentially over `window_s`."""
    seen_s: float = 0.0
    arrived: int = 0


class TemporalDynamic:
    """N = min_interval * (1 + queue / queue_step) * (1 + rate / rate_step), at most max_interval.

    The published system says that N adapts to queue length and arrival rate, not how; this rule is ours:
    each `queue_step` waiting requests and each `rate_step_rps` of arrivals add the base interval once more.
    """

    serves = True
    finetunes = True

    def __init__(
        self,
        *,
        min_interval: int = 32,
        max_interval: int = 512,
        queue_step: float = 4.0,
        rate_step_rps: float = 2.0,
        window_s: float = 10.0,
        token_budget: int | None = None,
    ) -> None:
        if not 1 <= min_interval <= max_interval:
            raise ValueError(
                f"policy.min_interval must be 1..policy.max_interval, got {min_interval} and {max_interval}"
            )
        if not (queue_step > 0 and rate_step_rps > 0 and window_s > 0):
            raise ValueError(
                "policy.queue_step, policy.rate_step_rps and policy.window_s must be above 0, "
                f"got {queue_step}, {rate_step_rps} and {window_s}"
            )
        self._min_interval = min_interval
        self._max_interval = max_interval
        self._queue_step = queue_step
        self._rate_step_rps = rate_step_rps
        self._window_s = window_s
        self._token_budget = checked_budget(token_budget)

    def plan(self, view: View) -> Plan:
        memory = self._observe(view)
        inference = pack_inference(view, self._token_budget)
        if view.jobs and (memory.passed >= self._interval(view, memory) or not inference.busy):
            slices, _ = whole_step(Work(), view.jobs[0])
            return Plan(finetune=slices, memory=memory._replace(passed=0))
        return inference.plan()._replace(memory=memory._replace(passed=memory.passed + 1))

    def _observe(self, view: View) -> _Memory:
        memory: _Memory = view.memory or _Memory()
        elapsed_s = view.now_s - memory.seen_s
        if elapsed_s <= 0:
            return memory
        share = min(1.0, elapsed_s / self._window_s)
        rate_rps = memory.rate_rps + share * ((view.arrived - memory.arrived) / elapsed_s - memory.rate_rps)
        return memory._replace(rate_rps=rate_rps, seen_s=view.now_s, arrived=view.arrived)

    def _interval(self, view: View, memory: _Memory) -> int:
        pressure = (1 + len(view.waiting) / self._queue_step) * (1 + memory.rate_rps / self._rate_step_rps)
        return min(self._max_interval, round(self._min_interval * pressure))
