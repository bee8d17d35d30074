"""Memory does not grow with time: live tensors after a thousand iterations are those after a hundred."""

from __future__ import annotations

import gc
from typing import Any

import torch

from engine.sampling import Sampling
from sim.core.loop import Horizon
from sim.core.plan import Plan
from sim.core.request import Request
from tests.engine.tiny import EngineRun, JobSetup, Watched, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import LinearCost, build_policy, limits_of

WORLD = LinearCost(forward_s=2.0**-11, backward_s=2.0**-12, context_s=2.0**-16, optimizer_s=2.0**-24)


def live_tensors() -> tuple[int, int]:
    """How many there are, and their bytes; those of a captured graph, which have no sizes, are others'."""
    gc.collect()
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [t for t in plain if not torch._is_functional_tensor(t)]
    return len(tensors), sum(t.nbytes for t in tensors)


def test_live_tensors_are_the_same_after_a_hundred_iterations_and_a_thousand() -> None:
    """Requests on the base model, a fixed adapter and the two that are trained; blocks run out in between,
    and the next iteration is launched while one runs. A slice that is cut holds a few tensors more than none, so
    sixty iterations are looked at each time."""
    seen: list[tuple[int, int]] = []

    class Counting(Watched):
        def plan(self, view: Any) -> Plan:
            if len(self.plans) in (*range(100, 160), *range(1000, 1060)):
                seen.append(live_tensors())
            return super().plan(view)

    prompt = tokens_of(9, seed=1)
    adapters = (None, "one", "two", "fixed")
    prompts = {
        id: (Request(id, 0.04 * id, 9, 12, "chat", adapters[id % 4]), prompt, Sampling()) for id in range(330)
    }
    jobs = [
        JobSetup(
            id=name,
            samples=(sample_of(12, seed=n % 3) for n in range(10**6)),
            adapter=adapter_of("qwen2", 2, ["down_proj"]),
            accumulation=1,
            order=order,
            memory=memory,
        )
        for name, order, memory in (
            ("one", "layer_major", "stash"),
            ("two", "window_major", "recompute"),
        )
    ]
    policy = Counting(build_policy("coserving", predictor=WORLD, budget_s=0.016))
    run = EngineRun(
        tiny_model("qwen2"),
        policy,
        limits_of(kv_tokens=40, block_tokens=4, max_sequences=8, max_tokens=16, lookahead=1),
        prompts,
        adapters={"fixed": adapter_of("qwen2", 4, ["q_proj"], seed=5)},
        jobs=jobs,
        horizon=Horizon(duration_s=14.0, drain_s=9.0),
        world=WORLD,
        keep_logits=False,
    )
    early, late = set(seen[:60]), set(seen[60:])
    assert len(seen) == 120 and early == late
    between = policy.plans[100:1000]
    assert sum(bool(plan.preempted) for plan in between) > 3
    assert {piece.job for plan in between for piece in plan.finetune} == {"one", "two"}
    assert not run.engine._live and not run.engine._launched
