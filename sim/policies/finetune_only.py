"""Finetune and never serve: the upper bound on finetuning throughput."""

from __future__ import annotations

from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.slices import whole_step


class FinetuneOnly:
    """One sample forward and backward per iteration, as a training program does."""

    serves = False
    finetunes = True

    def plan(self, view: View) -> Plan:
        if not view.jobs:
            return Plan()
        slices, _ = whole_step(Work(), view.jobs[0])
        return Plan(finetune=slices)
