"""Spatial sharing within the latency budget: the second stream gets what keeps the shared iteration short."""

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


class SpatialLimited:
    """As `coserving`, but finetuning runs beside inference instead of inside its kernels."""

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
        """`budget_s`: bound on the time of an iteration; `margin`: share of it that is kept free;
        `first_token_share`: as of `coserving`."""
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
        inference = pack_inference(view, latency=self._latency if bounded else None)
        work = inference.work._replace(overlap=inference.busy)
        budget_s = finetuning_budget_s(view, self._budget_s, self._first_token_share)
        slices, predicted_s = fill(work, view.jobs, self._predictor, budget_s, self._max_forward_tokens)
        return inference.plan()._replace(
            finetune=slices,
            overlap=inference.busy and bool(slices),
            predicted_s=predicted_s,
        )
