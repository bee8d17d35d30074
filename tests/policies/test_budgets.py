"""Iterations within the budget: what a slice and a chunk may take, by prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.core.finetune import Forward
from sim.core.loop import Horizon
from sim.core.request import Request
from sim.core.work import Chunk, Work
from tests.policies.scenes import BUDGETED, BUSY, COST, ROOMY, is_inference, long_requests
from tests.support import LinearCost, Run, build_policy, job_of, limits_of, requests_of, run


def minimum_s(result: Run, index: int) -> float:
    """Seconds of iteration `index` with its decodes and one minimum chunk, by prediction; of all its chunks where
    nobody decodes."""
    work = result.log.works[index].inference._replace(overlap=False)
    if not work.decode_count:
        return COST.iteration_s(work._replace(adapters=0))
    chunk = tuple(c._replace(tokens=min(c.tokens, 16)) for c in work.prefill[:1])
    return COST.iteration_s(work._replace(prefill=chunk, adapters=0))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_adapters_are_predicted_from_the_first_chunk_to_the_last_token(name: str, lookahead: int) -> None:
    cost = replace(COST, adapter_s=2.0**-10)
    requests = requests_of(
        90, rate_rps=30, prompt_tokens=(10, 300), output_tokens=(1, 90), adapters=(None, "a", "b", "c")
    )
    limits = limits_of(lookahead=lookahead, kv_tokens=700, max_sequence_tokens=600)
    result = run(
        build_policy(name, predictor=cost),
        requests,
        jobs=[job_of(300)],
        limits=limits,
        world=cost,
        horizon=BUSY,
    )
    assert any(plan.preempted for plan in result.log.plans)
    assert {work.adapters for work in result.log.works} == {0, 1, 2, 3}
    for plan, work in zip(result.log.plans, result.log.works, strict=True):
        assert plan.predicted_s == pytest.approx(cost.iteration_s(work), rel=1e-9)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("order", ["layer_major", "window_major"])
@pytest.mark.parametrize("name", BUDGETED)
def test_the_predicted_time_exceeds_the_budget_only_with_the_least_inference(
    name: str, order: str, lookahead: int
) -> None:
    requests = requests_of(150, rate_rps=30, prompt_tokens=(10, 800), output_tokens=(1, 80), seed=2)
    for budget_s in (0.012, 0.03):
        policy = build_policy(name, predictor=COST, budget_s=budget_s, min_chunk_tokens=16)
        limits = limits_of(lookahead=lookahead, kv_tokens=6000)
        jobs = [job_of(700, order=order)]
        result = run(policy, requests, jobs=jobs, limits=limits, world=COST, horizon=Horizon(duration_s=6.0))
        spent_s = 0.0
        assert any(plan.finetune for plan in result.log.plans)
        for i, (plan, work) in enumerate(zip(result.log.plans, result.log.works, strict=True)):
            predicted_s = plan.predicted_s
            assert predicted_s is not None
            assert predicted_s == pytest.approx(COST.iteration_s(work._replace(adapters=0)), rel=1e-9)
            together_s = predicted_s + (spent_s if name == "temporal_limited" and plan.finetune else 0.0)
            if together_s > budget_s * (1 + 1e-9):
                assert not plan.finetune and predicted_s <= minimum_s(result, i) * (1 + 1e-9)
            spent_s = predicted_s if is_inference(plan) else 0.0


@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_a_prompt_is_not_cut_for_the_sake_of_tokens_that_nobody_waits_for(name: str) -> None:
    """5000 tokens of 0.5 ms, of a bound of 50 ms: alone in chunks as large as the limit, beside a decode not."""
    cost = LinearCost(prefill_s=2.0**-11)
    settings = {"max_burst": 1.0} if name == "coserving_slack" else {}
    policy = build_policy(name, predictor=cost, budget_s=0.05, **settings)
    requests = [Request(0, 0.0, 5000, 4000, slo="chat"), Request(1, 3.0, 5000, 2, slo="chat")]
    works = run(policy, requests, limits=ROOMY, world=cost, horizon=Horizon(duration_s=20.0)).log.works
    chunks = [(work.decode_count, work.prefill[0].tokens) for work in works if work.prefill]
    alone = [tokens for count, tokens in chunks if not count]
    assert sum(alone) == 5000 and set(alone[:-1]) == {ROOMY.max_tokens}
    assert max(tokens for count, tokens in chunks if count) < 100


@pytest.mark.parametrize("budget_s", [0.01, 0.05])
def test_the_slice_is_the_largest_that_fits(budget_s: float) -> None:
    """One token more of the last forward window would break the budget."""
    policy = build_policy("coserving", predictor=COST, budget_s=budget_s, margin=0.0)
    result = run(policy, long_requests(), jobs=[job_of(5000)], limits=ROOMY, world=COST, horizon=BUSY)
    cut = 0
    for plan, work in zip(result.log.plans, result.log.works, strict=True):
        if plan.finetune and type(plan.finetune[-1]) is Forward and not work.backward:
            last = work.forward[-1]
            if last.tokens + last.context < 5000:
                more = work._replace(forward=(*work.forward[:-1], Chunk(last.tokens + 1, last.context)))
                assert COST.iteration_s(more) > budget_s
                cut += 1
    assert cut > 50


def test_the_limited_spatial_policy_overlaps_when_both_are_there_and_predicts_that() -> None:
    class Contention(LinearCost):
        def iteration_s(self, work: Work) -> float:
            return super().iteration_s(work) * (0.75 if work.overlap else 1.0)

    cost = Contention(context_s=COST.context_s)
    requests = requests_of(40, rate_rps=4, prompt_tokens=(10, 200), output_tokens=(1, 60), seed=1)
    policy = build_policy("spatial_limited", predictor=cost)
    result = run(policy, requests, jobs=[job_of(700)], world=cost, horizon=Horizon(duration_s=12.0))
    seen = set()
    for plan, work in zip(result.log.plans, result.log.works, strict=True):
        both = work.decode_count + work.prefill_tokens > 0 and bool(plan.finetune)
        assert plan.overlap == both == work.overlap
        assert plan.predicted_s == pytest.approx(cost.iteration_s(work._replace(adapters=0)), rel=1e-9)
        seen.add(both)
    assert seen == {True, False}


def test_inference_only_is_coserving_without_jobs_and_without_a_tight_budget() -> None:
    requests = requests_of(80, rate_rps=30, prompt_tokens=(5, 400), output_tokens=(1, 60))
    plain = run(build_policy("inference_only"), requests, limits=limits_of(kv_tokens=2000))
    other = run(build_policy("coserving", budget_s=1e9), requests, limits=limits_of(kv_tokens=2000))
    assert plain.recorder.requests.data.tobytes() == other.recorder.requests.data.tobytes()
    assert plain.log.works == other.log.works


@pytest.mark.parametrize(
    "name", ["coserving_static", "inference_only", "temporal", "temporal_dynamic", "spatial"]
)
def test_a_token_budget_above_the_pipelines_limit_is_cut_to_it(name: str) -> None:
    limits = limits_of(max_tokens=64)
    result = run(
        build_policy(name, token_budget=256), requests_of(10, rate_rps=50, prompt_tokens=300), limits=limits
    )
    assert max(w.prefill_tokens + w.decode_count for w in result.log.works) == 64
