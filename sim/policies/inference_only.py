"""Serve and never finetune: the upper bound on latency and goodput."""

from __future__ import annotations

from sim.core.plan import Plan, View
from sim.policies.packing import checked_budget, pack_inference


class InferenceOnly:
    """Chunked prefill and decode, as plain continuous batching does."""

    serves = True
    finetunes = False

    def __init__(self, *, token_budget: int | None = None) -> None:
        """`token_budget`: inference tokens of an iteration; None is the pipeline's limit."""
        self._token_budget = checked_budget(token_budget)

    def plan(self, view: View) -> Plan:
        return pack_inference(view, self._token_budget).plan()
