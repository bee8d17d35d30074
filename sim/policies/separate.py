"""Separate clusters: a share of the pipelines serves, the rest finetunes. The practice to beat."""

from __future__ import annotations

from sim.core.plan import Policy
from sim.policies.finetune_only import FinetuneOnly
from sim.policies.inference_only import InferenceOnly


class Separate:
    """A cluster-level policy: it assigns a policy to each pipeline instead of planning itself."""

    def __init__(self, *, inference_share: float = 0.5, token_budget: int | None = None) -> None:
        if not 0 < inference_share < 1:
            raise ValueError(f"policy.inference_share must be in (0, 1), got {inference_share}")
        self._inference_share = inference_share
        self._token_budget = token_budget

    def assign(self, pipelines: int) -> list[Policy]:
        """Policies of so many pipelines, the serving ones first; the share must be whole pipelines."""
        serving = self._inference_share * pipelines
        if abs(serving - round(serving)) > 1e-9 or not 1 <= round(serving) < pipelines:
            raise ValueError(
                "policy.inference_share times cluster.pipelines must be a whole number that leaves at "
                f"least one pipeline on each side, got {self._inference_share} of {pipelines}"
            )
        serve, train = InferenceOnly(token_budget=self._token_budget), FinetuneOnly()
        return [serve] * round(serving) + [train] * (pipelines - round(serving))
