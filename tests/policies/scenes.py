"""The scenes that the tests of policies share."""

from __future__ import annotations

from sim.core.loop import Horizon
from sim.core.plan import Plan
from sim.core.request import Request
from tests.support import LinearCost, limits_of

COST = LinearCost(context_s=2.0**-22)
BUDGETED = ["coserving", "spatial_limited", "temporal_limited"]
BUSY = Horizon(duration_s=20.0, drain_s=0.0)
ROOMY = limits_of(kv_tokens=400_000, max_sequence_tokens=20_000)
PLACES = limits_of(kv_tokens=20_000, max_sequences=64)


def long_requests(count: int = 8) -> list[Request]:
    """Decode throughout a 20 s run."""
    return [Request(i, 0.0, 16, 10_000) for i in range(count)]


def is_inference(plan: Plan) -> bool:
    return plan.decode or bool(plan.prefills)
