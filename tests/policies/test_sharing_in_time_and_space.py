"""Policies without a prediction: static, temporal, spatial, and whole pipelines for each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.core.finetune import Backward, Forward, Step
from sim.core.loop import Horizon
from sim.core.request import Request
from sim.policies.separate import Separate
from sim.policies.temporal_dynamic import TemporalDynamic
from tests.policies.scenes import BUSY, COST, ROOMY, is_inference, long_requests
from tests.support import LAYERS, ConstantCost, build_policy, job_of, limits_of, run


@pytest.mark.parametrize("lengths", ["fixed", "drawn"])
@pytest.mark.parametrize("backward_layers", [1, 2])
def test_the_static_policy_gives_its_closed_form(lengths: str, backward_layers: int) -> None:
    """FLEXLLM.md: L / [(ceil(L / (256 - c)) + layers / K) * t], here with c = 8 decodes at every iteration,
    the mean of the brackets over a distribution, and one iteration more for each optimizer step."""
    random = np.random.default_rng(7)
    drawn = random.integers(300, 3000, 100_000).tolist() if lengths == "drawn" else [1800] * 100_000
    seconds, accumulation, layers = 0.005, 8, 32
    result = run(
        build_policy("coserving_static", backward_layers=backward_layers),
        [Request(i, 0.0, 1, 1_000_000) for i in range(8)],
        jobs=[job_of(drawn, accumulation=accumulation, layers=layers)],
        limits=limits_of(kv_tokens=10_000_000, max_sequence_tokens=1_000_000),
        world=ConstantCost(seconds=seconds),
        horizon=Horizon(duration_s=100.0, drain_s=0.0),
    )
    used = drawn[:500]
    iterations = np.mean([math.ceil(n / (256 - 8)) + layers / backward_layers for n in used])
    closed_form_tok_s = np.mean(used) / (iterations * seconds)
    steps = result.table("steps")
    trained_tok_s = steps["tokens"].sum() / steps["end_s"].max()
    assert trained_tok_s == pytest.approx(closed_form_tok_s, rel=0.02)


@pytest.mark.parametrize("interval", [1, 3, 64])
def test_temporal_finetunes_after_every_n_inference_iterations(interval: int) -> None:
    policy = build_policy("temporal", interval=interval)
    result = run(
        policy, long_requests(), jobs=[job_of(30)], limits=ROOMY, horizon=Horizon(duration_s=3.0, drain_s=0)
    )
    kinds = [is_inference(plan) for plan in result.log.plans]
    assert all((not plan.finetune) == is_inference(plan) for plan in result.log.plans)
    finetuning = [i for i, kind in enumerate(kinds) if not kind]
    assert len(finetuning) > 3 and finetuning[0] == interval
    assert set(np.diff(finetuning)) == {interval + 1}
    slices = [p for p in result.log.plans[finetuning[0]].finetune if type(p) is not Step]
    assert slices == [Forward("job", 30), Backward("job", 30 * LAYERS)]


def test_the_dynamic_interval_grows_with_queue_and_rate() -> None:
    def mean_gap(requests: list[Request], slots: int) -> float:
        policy = TemporalDynamic(min_interval=4, max_interval=64, queue_step=4, rate_step_rps=2, window_s=1.0)
        limits = limits_of(kv_tokens=400_000, max_sequences=slots, max_sequence_tokens=20_000)
        horizon = Horizon(duration_s=10.0, drain_s=0.0)
        result = run(policy, requests, jobs=[job_of(10)], limits=limits, horizon=horizon)
        return float(np.diff([i for i, plan in enumerate(result.log.plans) if plan.finetune][-30:]).mean())

    quiet = mean_gap(long_requests(4), 4)
    queued = mean_gap(long_requests(20), 4)
    arriving = mean_gap([*long_requests(4), *(Request(9 + i, i / 20, 1, 1) for i in range(200))], 16)
    # The averaged rate decays but is never 0, so the interval stays a little over 4 iterations.
    assert 5 <= quiet <= 6
    assert queued == pytest.approx(4 * (1 + 16 / 4) + 1, abs=1)
    assert arriving > 5 * quiet


def test_the_spatial_stream_spends_the_time_that_inference_takes_in_natural_slices() -> None:
    result = run(
        build_policy("spatial", predictor=COST, slice_s=0.05),
        long_requests(),
        jobs=[job_of(5000)],
        limits=ROOMY,
        horizon=BUSY,
    )
    busy = [work for work in result.log.works if work.decode_count or work.prefill]
    shared = [work for work in busy if work.overlap]
    earned_s = sum(COST.iteration_s(work) for work in busy if not work.overlap)
    spent_s = sum(COST.iteration_s(work.finetuning) for work in shared)
    assert len(shared) > 50
    assert 0.95 * earned_s < spent_s <= earned_s
    slices_s = [COST.iteration_s(work.finetuning) for work in shared]
    assert 0.04 < float(np.median(slices_s)) < 0.06


@pytest.mark.parametrize(
    ("share", "pipelines", "serving"), [(0.5, 4, 2), (0.25, 4, 1), (0.75, 8, 6), (0.1, 10, 1)]
)
def test_separate_assigns_whole_pipelines(share: float, pipelines: int, serving: int) -> None:
    assigned = Separate(inference_share=share).assign(pipelines)
    assert [policy.serves for policy in assigned] == [True] * serving + [False] * (pipelines - serving)


@pytest.mark.parametrize(("share", "pipelines"), [(0.5, 3), (0.5, 1), (0.3, 4), (0.01, 4)])
def test_separate_refuses_impossible_shares(share: float, pipelines: int) -> None:
    with pytest.raises(ValueError, match="cannot serve"):
        Separate(inference_share=share).assign(pipelines)


@pytest.mark.parametrize("pipelines", [2, 3, 7, 8])
def test_all_shares_that_separate_calls_possible_are(pipelines: int) -> None:
    with pytest.raises(ValueError, match="possible with") as refused:
        Separate(inference_share=0.01).assign(pipelines)
    shares = str(refused.value).partition("policy.inference_share=")[2].split(", ")
    serving = [
        sum(p.serves for p in Separate(inference_share=float(share)).assign(pipelines)) for share in shares
    ]
    assert serving == list(range(1, pipelines))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_separate_refuses_shares_outside_of_zero_and_one(share: float) -> None:
    with pytest.raises(ValueError, match="inference_share"):
        Separate(inference_share=share)
