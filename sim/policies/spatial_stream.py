"""Spatial sharing in the units that an engine launches: a window or whole layers beside each iteration.

`spatial` sizes the second stream's slices by time, which needs an engine whose passes cost next to nothing
when they are small. One that pays for every pass gets nothing done that way; it launches whole pieces, and
the inference iteration beside them takes as long as contention makes it. No latency budget.
"""

from __future__ import annotations

from sim.core.finetune import Forward, JobView, Slice, Step
from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import checked_budget, pack_inference
from sim.policies.slices import whole_layers, whole_step


class SpatialStream:
    """Needs no predictor; finetunes a whole sample at once when nothing is to be served."""

    serves = True
    finetunes = True

    def __init__(
        self, *, forward_tokens: int = 256, backward_layers: int = 1, token_budget: int | None = None
    ) -> None:
        if forward_tokens < 1 or backward_layers < 1:
            raise ValueError(
                "policy.forward_tokens and policy.backward_layers must be at least 1, "
                f"got {forward_tokens} and {backward_layers}"
            )
        self._forward_tokens = forward_tokens
        self._backward_layers = backward_layers
        self._token_budget = checked_budget(token_budget)

    def plan(self, view: View) -> Plan:
        inference = pack_inference(view, self._token_budget)
        if not view.jobs:
            return inference.plan()
        if not inference.busy:
            return Plan(finetune=whole_step(Work(), view.jobs[0])[0])
        return inference.plan()._replace(finetune=(self._slice(view.jobs[0]),), overlap=True)

    def _slice(self, job: JobView) -> Slice:
        if job.step_due:
            return Step(job.id)
        if job.forward_left:
            return Forward(job.id, min(job.forward_left, self._forward_tokens))
        return whole_layers(job, self._backward_layers)
