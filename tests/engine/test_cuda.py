"""On a GPU the engine gives what it gives on the CPU: kernels, captured iterations, two streams.

    pytest -m gpu tests/engine

Whole runs on float32 weights, so that a difference is a mistake and not a rounding; one in bfloat16, which is
what is served. What can be said without a GPU is in test_graphs, test_streams, test_no_waiting and
kernels/test_hopper.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.graphs import CudaCapture, Decodes, Graphs
from engine.launching import Launching, LaunchSettings, SecondStream
from engine.model import Model
from engine.optimizer import KINDS, MasterOptimizer, OptimizerSettings
from engine.sampling import Sampling
from sim.core.request import Request
from tests.engine.tiny import (
    CONFIGS,
    EngineRun,
    JobSetup,
    adapter_of,
    bank_of,
    on_cuda,
    put,
    sample_of,
    tiny_model,
    tokens_of,
)
from tests.support import LinearCost, build_policy, limits_of

pytestmark = pytest.mark.gpu

MODES = [("layer_major", "stash"), ("window_major", "stash"), ("window_major", "recompute")]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = before


def run(
    model: Model,
    mode: tuple[str, str],
    lookahead: int,
    launching: Launching,
    policy: str = "coserving",
    kv_tokens: int = 192,
    watch: Any = None,
) -> EngineRun:
    """Nine requests of three adapters beside a job of four steps; preempted, if pages are few."""
    order, memory = mode
    family = model.config.family
    prompts = {}
    for id in range(9):
        prompt = tokens_of(3 + (id * 23) % 58, seed=id)
        request = Request(id, id * 0.005, len(prompt), 12, "default", (None, "wide", "job")[id % 3])
        # Greedy ties may fall either way between two roundings: draws with a fixed number do not.
        prompts[id] = (request, prompt, Sampling(temperature=0.0 if id % 2 else 1.0, top_k=30, seed=id))
    job = JobSetup(
        samples=[sample_of(20 + 7 * i, seed=i) for i in range(8)],
        adapter=replace(
            adapter_of(family, 4, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]), dropout=0.1
        ),
        order=order,
        memory=memory,
        max_tokens=80,
    )
    predictor = LinearCost(forward_s=2.0**-10, backward_s=2.0**-11, optimizer_s=0.0)
    given = {"predictor": predictor, "budget_s": 0.02} if policy == "coserving" else {"forward_tokens": 16}
    return EngineRun(
        model,
        build_policy(policy, **given),
        limits_of(kv_tokens=kv_tokens, block_tokens=16, max_tokens=64, lookahead=lookahead),
        prompts,
        adapters={"wide": adapter_of(family, 8, ["k_proj", "gate_proj", "down_proj"], seed=3)},
        jobs=[job],
        launching=launching,
        watch=watch,
    )


def assert_same(ours: EngineRun, reference: EngineRun) -> None:
    assert ours.policy.plans == reference.policy.plans
    assert ours.tokens == reference.tokens
    for id, rows in reference.logits.items():
        torch.testing.assert_close(torch.stack(ours.logits[id]), torch.stack(rows), atol=2e-3, rtol=2e-3)
    assert len(reference.engine.steps) == 4
    for own, other in zip(ours.engine.steps, reference.engine.steps, strict=True):
        assert own.loss == pytest.approx(other.loss, rel=1e-3)
        assert own.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


def launchings() -> dict[str, Launching]:
    return {
        "eager": Launching(),
        "graphs": Launching(captures=CudaCapture),
        "graphs and streams": Launching(captures=CudaCapture, second=SecondStream()),
    }


@pytest.mark.parametrize("how", ["eager", "graphs"])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_whole_run_equals_the_cpu(family: str, mode: tuple[str, str], lookahead: int, how: str) -> None:
    model = tiny_model(family)
    reference = run(model, mode, lookahead, Launching())
    assert any(plan.preempted for plan in reference.policy.plans)
    assert_same(run(on_cuda(model), mode, lookahead, launchings()[how]), reference)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_finetuning_beside_inference_gives_the_adapter_that_it_gives_after_it(
    mode: tuple[str, str], lookahead: int
) -> None:
    model = on_cuda(tiny_model("llama"))
    after = run(model, mode, lookahead, Launching(), "spatial_stream", kv_tokens=2048)
    assert any(plan.overlap for plan in after.policy.plans)
    beside = run(model, mode, lookahead, launchings()["graphs and streams"], "spatial_stream", kv_tokens=2048)
    assert_same(beside, after)
    for own, other in zip(
        beside.trainers[0].masters.tensors(), after.trainers[0].masters.tensors(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_a_replay_is_the_padded_batch_bit_for_bit(count: int, adapters: bool) -> None:
    """And so it stays while requests, pages and adapters change."""
    model = on_cuda(tiny_model("llama", torch.bfloat16))
    bank = bank_of("llama", ("q_proj", "down_proj"), 4, model.dtype, 2, model.device)
    for seed in range(2):
        put(bank, "llama", adapter_of("llama", 4, ["q_proj", "down_proj"], seed=seed))
    random = np.random.default_rng(count)
    table = random.permutation(12 * 80).astype(np.int32).reshape(12, 80)

    def graphs(captures: Any) -> Graphs:
        pages = model.new_pages(12 * 80, 16)
        for part in pages:
            part.normal_(generator=torch.Generator(model.device).manual_seed(1))
        last = torch.arange(12, dtype=torch.int32, device=model.device)
        return Graphs(
            model=model,
            pages=pages,
            bank=bank,
            last_token=last,
            table=table,
            block_tokens=16,
            captures=captures,
        )

    replayed, plain = graphs(CudaCapture), graphs(lambda: lambda body: body)
    for _ in range(4):
        slots = random.permutation(12)[:count].astype(np.int32)
        used = np.sort(random.integers(-1, 2, count)) if adapters else np.full(count, -1)
        given = Decodes(slots, random.integers(0, 1270, count).astype(np.int32), used.astype(np.int32))
        assert torch.equal(replayed.run(given)[0], plain.run(given)[0])
        for own, other in zip(replayed.pages, plain.pages, strict=True):
            assert torch.equal(own, other)


def test_every_shape_can_be_captured_and_a_moved_bank_is_captured_anew() -> None:
    seen = []

    def watch(engine: Any) -> None:
        seen.append(engine.warm_up())
        wide = adapter_of("llama", 8, ["k_proj"], seed=5)
        before = engine._bank.moved
        while engine._bank.moved == before:
            put(engine._bank, "llama", wide)

    model = tiny_model("llama")
    reference = run(model, MODES[0], 0, Launching())
    assert_same(run(on_cuda(model), MODES[0], 0, launchings()["graphs"], watch=watch), reference)
    assert seen[0] > 2


@pytest.mark.parametrize("policy", ["coserving", "spatial_stream"])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_no_launch_waits_for_the_device(mode: tuple[str, str], policy: str) -> None:
    model = on_cuda(tiny_model("llama", torch.bfloat16))
    launching = launchings()["graphs and streams"]
    run(model, mode, 1, launching, policy, kv_tokens=2048)  # compiles, loads and allocates what there is

    def watch(engine: Any) -> None:
        engine._bank._double()  # now, and not in between
        engine.warm_up()
        launch = engine.launch

        def strict(plan: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        engine.launch = strict

    strictly = run(model, mode, 1, launching, policy, kv_tokens=2048, watch=watch)
    assert len(strictly.engine.steps) == 4


def test_nothing_is_held_after_a_run_that_was_not_before() -> None:
    model = on_cuda(tiny_model("llama", torch.bfloat16))
    used = []
    for _ in range(4):
        run(model, MODES[0], 1, LaunchSettings(streams=2).on(model), kv_tokens=2048)
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[-2]


def test_bfloat16_serves_the_distribution_of_float32() -> None:
    """Sampled texts part at the first tie; up to there logits agree to the type's rounding."""
    exactly = run(on_cuda(tiny_model("llama")), MODES[0], 0, launchings()["graphs"], kv_tokens=2048)
    rounded = run(
        on_cuda(tiny_model("llama", torch.bfloat16)), MODES[0], 0, launchings()["graphs"], kv_tokens=2048
    )
    for id, rows in exactly.logits.items():
        torch.testing.assert_close(rounded.logits[id][0].float(), rows[0], atol=0.25, rtol=0.1)
    for own, other in zip(rounded.engine.steps, exactly.engine.steps, strict=True):
        assert own.loss == pytest.approx(other.loss, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_is_that_of_the_cpu_and_does_not_wait(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    start, grads = ([torch.randn(40, 9, generator=draw) for _ in range(3)] for _ in range(2))
    settings = OptimizerSettings(kind=kind, learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    results = []
    for device in ("cpu", "cuda"):
        masters = [tensor.to(device, copy=True) for tensor in start]
        own = [torch.zeros_like(tensor) for tensor in masters]
        optimizer = MasterOptimizer(settings, masters, own)
        count = torch.tensor(7, device=device)
        norms = []
        for _ in range(5):
            for target, grad in zip(own, grads, strict=True):
                target.copy_(grad)
            torch.cuda.set_sync_debug_mode("error")
            norms.append(optimizer.step(count))
            torch.cuda.set_sync_debug_mode("default")
        results.append([tensor.cpu() for tensor in (*masters, *norms)])
    for own_result, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(own_result, wanted, rtol=1e-5, atol=1e-6)


def test_programs_capture_and_take_two_streams_where_they_may() -> None:
    model = on_cuda(tiny_model("llama"))
    chosen = LaunchSettings(graphs="auto", streams=2).on(model)
    assert chosen.captures is CudaCapture
    assert chosen.second is not None
    assert LaunchSettings(graphs="off", streams=1).on(model) == Launching()
