"""Spatial sharing: inference and finetuning run at once and share the device without regard to the SLO.

The finetuning stream never pauses: while inference iterations go by, it earns the time that they take, and
spends it on slices of a natural size, `slice_s`, which run beside an inference iteration (a smaller slice would
read all weights for a few tokens). The world's overlap model (or two CUDA streams) says how long the two take
together. What it remembers is the time earned and not yet spent.
"""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import checked_budget, checked_tokens, pack_inference
from sim.policies.slices import fill, whole_step


class Spatial:
    """The predictor only measures the two streams; no latency budget."""

    serves = True
    finetunes = True

    def __init__(
        self,
        *,
        predictor: Predictor,
        slice_s: float = 0.05,
        token_budget: int | None = None,
        max_forward_tokens: int = 8192,
    ) -> None:
        if not slice_s > 0:
            raise ValueError(f"policy.slice_s must be above 0 seconds, got {slice_s}")
        self._predictor = predictor
        self._slice_s = slice_s
        self._token_budget = checked_budget(token_budget)
        self._max_forward_tokens = checked_tokens("max_forward_tokens", max_forward_tokens)

    def plan(self, view: View) -> Plan:
        earned_s: float = view.memory or 0.0
        inference = pack_inference(view, self._token_budget)
        if not inference.busy:
            slices = whole_step(Work(), view.jobs[0])[0] if view.jobs else ()
            return Plan(finetune=slices, memory=earned_s)
        if earned_s >= self._slice_s:
            slices, took_s = fill(Work(), view.jobs, self._predictor, earned_s, self._max_forward_tokens)
            if slices:
                earned_s -= took_s
                return inference.plan()._replace(finetune=slices, overlap=True, memory=earned_s)
        alone_s = self._predictor.iteration_s(inference.work)
        return inference.plan()._replace(memory=min(earned_s + alone_s, 10 * self._slice_s))
