"""The hybrid token scheduler: inference first, then the largest finetuning slice within the latency budget.

FlexLLM (NSDI 2026): s = max { s : f(c, s) <= SLO } with f the predicted time of an iteration that has c
inference tokens and s finetuning tokens. The slice is a forward window or a backward slice in
layers x tokens. Prefill chunks are sized by the same budget where somebody decodes, unless first tokens came late. An
iteration holds a bounded number of prompt tokens however long it may take, so finetuning also gives way where prompts
would wait for too long, where answers would end too late, and where requests came late.
"""

from __future__ import annotations

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.policies.packing import (
    Latency,
    checked_share,
    checked_tokens,
    finetuning_budget_s,
    pack_inference,
    prompts_first,
)
from sim.policies.slices import fill


class CoServing:
    """Pure; its decisions depend on the predictor that it is given."""

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
        """`budget_s`: bound on the time of an iteration, the tightest TPOT bound of the traffic; `margin`:
        share of it that is kept free, because predictions are not exact; `first_token_share`: share of the time
        left to the TTFT deadlines that finetuning may use up until the waiting prompts are done."""
        if not 0 <= margin < 1:
            raise ValueError(f"policy.margin must be in [0, 1), got {margin}")
        self._predictor = predictor
        self._budget_s = (1 - margin) * budget_s
        self._first_token_share = checked_share("first_token_share", first_token_share)
        self._max_forward_tokens = checked_tokens("max_forward_tokens", max_forward_tokens)
        self.min_chunk_tokens = checked_tokens("min_chunk_tokens", min_chunk_tokens)
        self._latency = Latency(predictor, self._budget_s, self.min_chunk_tokens)

    def plan(self, view: View) -> Plan:
        bounded = view.decode_count and not prompts_first(view, self._predictor)
        decode, prefills, preempted, work = pack_inference(view, latency=self._latency if bounded else None)
        budget_s = finetuning_budget_s(view, self._budget_s, self._first_token_share)
        slices, predicted_s = fill(work, view.jobs, self._predictor, budget_s, self._max_forward_tokens)
        return Plan(decode, prefills, preempted, slices, predicted_s=predicted_s)
