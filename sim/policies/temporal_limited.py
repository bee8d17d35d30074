"""Budgeted time slicing: finetuning alone in an iteration, cut to what the latency budget leaves.

The strongest baseline without fusion: it alternates an inference iteration with a finetuning-only slice,
sized so that the two together stay within the latency budget.
"""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.core.work import Work
from sim.policies.packing import (
    Latency,
    checked_share,
    checked_tokens,
    finetuning_budget_s,
    pack_inference,
    prompts_first,
)
from sim.policies.slices import fill


class TemporalLimited:
    """Remembers the predicted time of the inference iteration that has just run."""

    serves = True
    finetunes = True

    def __init__(
        self,
        *,
        predictor: Predictor,
        budget_s: float,
        margin: float = 0.05,
        first_token_share: float = 0.5,
        max_forward_tokens: int = 8192,
        min_chunk_tokens: int = 64,
    ) -> None:
        """`budget_s`: bound on an inference iteration and the finetuning slice after it, together;
        `margin`: share of it that is kept free; `first_token_share`: as of `coserving`."""
        if not 0 <= margin < 1:
            raise ValueError(f"policy.margin must be in [0, 1), got {margin}")
        self._predictor = predictor
        self._budget_s = (1 - margin) * budget_s
        self._first_token_share = checked_share("first_token_share", first_token_share)
        self._max_forward_tokens = checked_tokens("max_forward_tokens", max_forward_tokens)
        self.min_chunk_tokens = checked_tokens("min_chunk_tokens", min_chunk_tokens)
        self._latency = Latency(predictor, self._budget_s, self.min_chunk_tokens)

    def plan(self, view: View) -> Plan:
        spent_s = view.memory
        budget_s = finetuning_budget_s(view, self._budget_s, self._first_token_share)
        if spent_s is not None:
            plan = self._finetune(view, budget_s - spent_s)
            if plan.finetune:
                return plan
        bounded = view.decode_count and not prompts_first(view, self._predictor)
        inference = pack_inference(view, latency=self._latency if bounded else None)
        if not inference.busy:
            return self._finetune(view, budget_s)
        predicted_s = self._predictor.iteration_s(inference.work)
        return inference.plan()._replace(predicted_s=predicted_s, memory=predicted_s)

    def _finetune(self, view: View, budget_s: float) -> Plan:
        slices, predicted_s = fill(Work(), view.jobs, self._predictor, budget_s, self._max_forward_tokens)
        return Plan(finetune=slices, predicted_s=predicted_s if slices else None)
