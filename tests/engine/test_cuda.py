"""On a GPU the kernels give what the references give: tokens, logits and losses of whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.sampling import Sampling
from sim.core.request import Request
from tests.engine.tiny import (
    CONFIGS,
    EngineRun,
    JobSetup,
    adapter_of,
    on_cuda,
    sample_of,
    tiny_model,
    tokens_of,
)
from tests.support import LinearCost, build_policy, limits_of

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("order", "memory"), [("layer_major", "stash"), ("window_major", "recompute")])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_whole_run_equals_the_cpu(family: str, order: str, memory: str, lookahead: int) -> None:
    def run(cuda: bool) -> EngineRun:
        model = tiny_model(family)
        prompts = {}
        for id in range(9):
            prompt = tokens_of(3 + (id * 23) % 58, seed=id)
            request = Request(id, id * 0.005, len(prompt), 12, "default", (None, "wide", "job")[id % 3])
            # Greedy ties may fall either way between two roundings: draws with a fixed number do not.
            prompts[id] = (request, prompt, Sampling(temperature=0.0 if id % 2 else 1.0, top_k=30, seed=id))
        job = JobSetup(
            samples=[sample_of(20 + 7 * i, seed=i) for i in range(8)],
            adapter=adapter_of(family, 4, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
            order=order,
            memory=memory,
            max_tokens=80,
        )
        predictor = LinearCost(forward_s=2.0**-10, backward_s=2.0**-11, optimizer_s=0.0)
        return EngineRun(
            on_cuda(model) if cuda else model,
            build_policy("coserving", predictor=predictor, budget_s=0.02),
            limits_of(kv_tokens=192, block_tokens=16, max_tokens=32, lookahead=lookahead),
            prompts,
            adapters={"wide": adapter_of(family, 8, ["k_proj", "gate_proj", "down_proj"], seed=3)},
            jobs=[job],
        )

    ours, reference = run(cuda=True), run(cuda=False)
    assert ours.policy.plans == reference.policy.plans
    assert any(plan.preempted for plan in ours.policy.plans)
    assert ours.tokens == reference.tokens
    for id, rows in reference.logits.items():
        torch.testing.assert_close(torch.stack(ours.logits[id]), torch.stack(rows), atol=2e-3, rtol=2e-3)
    assert len(reference.engine.steps) == 4
    for own, other in zip(ours.engine.steps, reference.engine.steps, strict=True):
        assert own.loss == pytest.approx(other.loss, rel=1e-3)
        assert own.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)
