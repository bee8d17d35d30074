"""What finetuning holds in a simulated pipeline is the compile plan's, and leaves the rest to the K/V cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from sim.assemble import CONFIGS, Assembly, assemble
from sim.compile.compiler import Analysis
from sim.compile.peft import PeftSpec
from sim.core.specs import LoraSpec, ModelShape
from sim.core.work import Work
from sim.cost.memory import free_bytes, kv_bytes_per_token
from sim.finetune_plans import AUTO_SHARE, plans_of
from sim.workload.finetune import DrawnSamples, Finetune, FinetuneJob
from sim.workload.lengths import Fixed
from tests.cost.test_cost_memory import device, model

LLAMA, A100 = model("llama_3_1_8b"), device("a100_80gb")
DOWN = LoraSpec()
JOB, WINDOWS = "finetune.jobs.sky_t1", "finetune.jobs.sky_t1.order=window_major"


def assembled(*overrides: str) -> Assembly:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return assemble(compose("config", overrides=["workload.duration_s=10", *overrides]))


@pytest.mark.parametrize(("order", "mode"), [("layer_major", "stash"), ("window_major", "recompute")])
@pytest.mark.parametrize("name", ["llama_3_1_8b", "qwen2_5_14b"])
def test_kv_cache_and_plan_fill_the_memory(name: str, order: str, mode: str) -> None:
    shape = model(name)
    run = assembled(f"model={name}", f"{JOB}.order={order}", f"{JOB}.memory={mode}")
    analysis = Analysis(shape, PeftSpec.from_lora(DOWN), seq_tokens=8192, device=A100, tp=shape.tp)
    plan = analysis.plan(mode, order=order)
    limits = run.pipelines[0].limits
    free = free_bytes(
        device=A100,
        model=shape,
        tp=shape.tp,
        batch_tokens=limits.max_tokens,
        batch_sequences=limits.max_sequences,
    )
    each = kv_bytes_per_token(shape, shape.tp)
    left = free - plan.total_bytes() - plan.adapter_bytes - limits.kv_tokens * each
    assert 0 <= left < each


@pytest.mark.parametrize(
    ("kv_tokens", "order", "mode", "again"),
    [
        (100_000, "layer_major", "stash", False),
        (400_000, "layer_major", "stash", True),
        (390_000, "window_major", "stash", True),
        (420_000, "window_major", "recompute", True),
    ],
)
def test_auto_takes_what_the_kv_cache_leaves(kv_tokens: int, order: str, mode: str, again: bool) -> None:
    cache = f"cluster.limits.kv_tokens={kv_tokens}"
    run = assembled(cache, f"{JOB}.memory=auto", f"{JOB}.order={order}")
    assert {job.spec.memory for pipeline in run.pipelines for job in pipeline.jobs} == {mode}
    plain = assembled(cache, f"{JOB}.memory=stash", f"{JOB}.order={order}")
    work_s = [r.pipelines[0].predictor.largest_backward for r in (plain, run)]
    view = plain.pipelines[0].jobs[0].view()._replace(forward_tokens=8192, sample_tokens=8192)
    slices = [largest(Work(), view, 0.2)[0] for largest in work_s]
    if mode == "stash":
        assert (slices[0] > slices[1]) == again, "what runs again is charged"


def test_auto_leaves_half_to_a_kv_cache_that_says_nothing() -> None:
    free = 40e9
    jobs = {
        name: _job(memory) for name, memory in (("asks", "auto"), ("asks too", "auto"), ("own", "recompute"))
    }
    plans = plans_of(Finetune(jobs=jobs, lora=DOWN), LLAMA, A100, 1, free, None)
    assert plans.held_bytes <= AUTO_SHARE * free
    assert plans.plans["asks"] == plans.plans["asks too"]
    assert plans.plans["own"].mode == "recompute"
    roomy = plans_of(Finetune(jobs=jobs, lora=DOWN), LLAMA, A100, 1, 10 * free, None)
    assert roomy.again_gemm == roomy.again_attention == 0
    assert plans.again_gemm > 0
    with pytest.raises(ValueError, match=r"leaves no room for finetuning|needs at least"):
        plans_of(Finetune(jobs=jobs, lora=DOWN), LLAMA, A100, 1, free, 0.95 * free)


def test_only_a_lack_of_memory_is_the_job_s_own_error() -> None:
    finetune = Finetune(jobs={"asks": _job("auto")}, lora=DOWN)
    with pytest.raises(ValueError, match=r"^finetune\.jobs\.asks\.memory=auto: .* needs at least"):
        plans_of(finetune, LLAMA, A100, 1, 1e6, None)
    for changes, says in (
        ({"architecture": "Hopper"}, r"^device\.architecture of a100_80gb is 'Hopper'"),
        ({"extras": {"gemm_flopss": 1.0}}, r"^device\.extras\.gemm_flopss of a100_80gb is not known"),
    ):
        with pytest.raises(ValueError, match=says):
            plans_of(finetune, LLAMA, replace(A100, **changes), 1, 40e9, None)


def _job(memory: str) -> FinetuneJob:
    data = DrawnSamples(samples=8, length=Fixed(tokens=1000))
    return FinetuneJob(data=data, cutoff_len=4096, order="window_major", memory=memory)


def test_jobs_take_turns_with_what_is_there_only_while_a_slice_runs() -> None:
    job = _job("recompute")
    one, two = (
        plans_of(Finetune(jobs=dict.fromkeys(names, job), lora=DOWN), LLAMA, A100, 1, 60e9, None)
        for names in (("a",), ("a", "b"))
    )
    plan = one.plans["a"]
    assert two.held_bytes == 2 * one.held_bytes - plan.passing_bytes


def test_the_engine_runs_the_plan_that_the_simulator_charges() -> None:
    """Same shape, adapter and sample: the same plan, but for the seconds of placements on the device."""
    pytest.importorskip("torch")
    import torch

    from engine.assemble import plan_jobs
    from tests.engine.tiny import CONFIGS as TINY
    from tests.engine.tiny import JobSetup, adapter_of, sample_of, tiny_model
    from tests.support import limits_of

    shape: ModelShape = TINY["llama"].shape
    lora = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    for order, memory in (("layer_major", "stash"), ("window_major", "recompute"), ("window_major", "auto")):
        setup = JobSetup(
            samples=[sample_of(9, 0)],
            adapter=adapter_of("llama", 4, lora.targets),
            order=order,
            memory=memory,
            max_tokens=64,
        )
        limits = limits_of(block_tokens=16, kv_tokens=320)
        engine_side = plan_jobs(tiny_model("llama", torch.bfloat16), limits, [setup.of()], 500_000.0)
        jobs = {"job": FinetuneJob(data=_job("stash").data, cutoff_len=64, order=order, memory=memory)}
        kv_bytes = 320 * kv_bytes_per_token(shape, 1)
        simulated = plans_of(Finetune(jobs=jobs, lora=lora), shape, A100, 1, 500_000.0, float(kv_bytes))
        made, charged = (replace(p, bypasses=()) for p in (*engine_side, simulated.plans["job"]))
        assert made == charged
