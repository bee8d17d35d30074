"""Temporal sharing: one full finetuning iteration (a sample's forward and backward) after every N
inference iterations. Requests wait while it runs, so N trades token latency for finetuning."""

from __future__ import annotations

from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import checked_budget, pack_inference
from sim.policies.slices import whole_step


class Temporal:
    """Remembers how many inference iterations have passed; finetunes at once when nothing is to be served."""

    serves = True
    finetunes = True

    def __init__(self, *, interval: int = 64, token_budget: int | None = None) -> None:
        if interval < 1:
            raise ValueError(f"policy.interval must be at least 1 inference iteration, got {interval}")
        self._interval = interval
        self._token_budget = checked_budget(token_budget)

    def plan(self, view: View) -> Plan:
        passed = view.memory or 0
        inference = pack_inference(view, self._token_budget)
        if view.jobs and (passed >= self._interval or not inference.busy):
            slices, _ = whole_step(Work(), view.jobs[0])
            return Plan(finetune=slices, memory=0)
        return inference.plan()._replace(memory=passed + 1)
