"""Separate clusters: a share of the pipelines serves, the rest finetunes. The practice to beat."""

from __future__ import annotations

from sim.core.plan import Policy
from sim.policies.finetune_only import FinetuneOnly
from sim.policies.inference_only import InferenceOnly

MOST_SHARES = 7
"""Listed in a message; of more pipelines the others are told in words."""


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
            count = "1 pipeline" if pipelines == 1 else f"{pipelines} pipelines"
            raise ValueError(
                f"a share of {self._inference_share:g} of {count} cannot serve: whole ones must, and at least one must "
                f"finetune; possible with {_possible(pipelines)}"
            )
        serve, train = InferenceOnly(token_budget=self._token_budget), FinetuneOnly()
        return [serve] * round(serving) + [train] * (pipelines - round(serving))


def _possible(pipelines: int) -> str:
    """What shares so many pipelines out."""
    if pipelines == 1:
        return "cluster.pipelines=2 or more"
    few = range(1, min(pipelines, MOST_SHARES + 1))
    shares = ", ".join(f"{serving / pipelines:.12g}" for serving in few)
    more = f" and other multiples of 1/{pipelines}" if len(few) < pipelines - 1 else ""
    return f"policy=separate policy.inference_share={shares}{more}"
