"""The rule of each policy, on scenarios small enough to know the answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.core.finetune import Backward, Forward, Step
from sim.core.loop import Horizon
from sim.core.plan import Plan, View
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from sim.core.work import Chunk, LayerChunk, Work
from sim.policies.separate import Separate
from sim.policies.slices import add_slices
from sim.policies.temporal_dynamic import TemporalDynamic
from tests.support import (
    LAYERS,
    ConstantCost,
    Contention,
    LinearCost,
    Run,
    build_policy,
    job_of,
    limits_of,
    requests_of,
    run,
    token_times,
)

COST = LinearCost(context_s=2.0**-22)
BUDGETED = ["coserving", "spatial_limited", "temporal_limited"]
BUSY = Horizon(duration_s=20.0, drain_s=0.0)


def long_requests(count: int = 8) -> list[Request]:
    """Decode throughout a 20 s run."""
    return [Request(i, 0.0, 16, 10_000) for i in range(count)]


ROOMY = limits_of(kv_tokens=400_000, max_sequence_tokens=20_000)
PLACES = limits_of(kv_tokens=20_000, max_sequences=64)


def is_inference(plan: Plan) -> bool:
    return plan.decode or bool(plan.prefills)


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


def attainment(name: str, predictor: LinearCost, lookahead: int = 0) -> tuple[float, float]:
    """(share of requests of TPOT bound 50 ms that keep it, trained tokens per second)."""
    requests = requests_of(60, rate_rps=3, prompt_tokens=64, output_tokens=150, slo="chat", seed=6)
    policy = build_policy(name, predictor=predictor, budget_s=0.05)
    limits = replace(PLACES, lookahead=lookahead)
    result = run(
        policy, requests, jobs=[job_of(900)], limits=limits, world=COST, horizon=Horizon(duration_s=25.0)
    )
    times = token_times(result.recorder).values()
    kept = [(times_s[-1] - times_s[0]) / (len(times_s) - 1) <= 0.05 for times_s in times]
    return float(np.mean(kept)), float(result.table("steps")["tokens"].sum() / 25.0)


def test_a_predictor_twice_too_optimistic_costs_coserving_more_than_coserving_slack() -> None:
    """The one knows only that answers are late, the other how wrong the predictor is."""
    optimistic = LinearCost(context_s=COST.context_s, scale=0.5)
    assert attainment("coserving", COST)[0] == 1.0
    assert 0.5 < attainment("coserving", optimistic)[0] < 0.9
    recovered, trained_tok_s = attainment("coserving_slack", optimistic)
    assert recovered > 0.95 and trained_tok_s > 1000


@pytest.mark.parametrize("factor", [0.4, 2.5])
@pytest.mark.parametrize("part", ["host_s", "prefill_s", "decode_s", "forward_s", "backward_s"])
def test_coserving_slack_corrects_a_predictor_that_is_wrong_in_one_part(part: str, factor: float) -> None:
    """By one ratio for all, which changes with what iterations hold."""
    kept, trained_tok_s = attainment("coserving_slack", replace(COST, **{part: factor * getattr(COST, part)}))
    assert kept > 0.95 and trained_tok_s > 0.85 * attainment("coserving_slack", COST)[1]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_coserving_slack_with_the_true_predictor_keeps_every_tpot(lookahead: int) -> None:
    kept, trained_tok_s = attainment("coserving_slack", COST, lookahead)
    assert kept == 1.0 and trained_tok_s > 1000


def test_the_slack_margin_follows_the_scatter_of_the_world() -> None:
    """A world that is right on average and up to 30 % off each time: the averages are those of a plain loop
    over the rows, one ratio for each number of streams, and what may be planned is the budget over
    ratio x (1 + 3 deviations)."""
    random = np.random.default_rng(5)

    class Scattered(Contention):
        def iteration_s(self, work: Work) -> float:
            return super().iteration_s(work) * float(random.uniform(0.7, 1.3))

    class Watched:
        serves = finetunes = True

        def __init__(self) -> None:
            self.policy = build_policy("coserving_slack", predictor=Contention(contention=0.9))
            self.views: list[View] = []

        def plan(self, view: View) -> Plan:
            self.views.append(view)
            return self.policy.plan(view)

    world, watched = Scattered(contention=0.9), Watched()
    result = run(watched, long_requests(), jobs=[job_of(3000)], limits=ROOMY, world=world, horizon=BUSY)
    rows, weight = result.table("iterations"), 0.05
    took_s = rows["end_s"] - rows["start_s"]
    one, two, deviation = 1.0, None, 0.0
    for i, plan in enumerate(result.log.plans):
        assert plan.memory[:2] == pytest.approx((one, deviation), rel=1e-6)
        assert plan.memory.beside == (None if two is None else pytest.approx(two, rel=1e-6))
        assert plan.predicted_s is not None
        seen = took_s[i] / plan.predicted_s
        if plan.overlap and two is None:
            two = one
        used = two if plan.overlap and two is not None else one
        deviation += weight * (abs(seen / used - 1) - deviation)
        used += weight * (seen - used)
        if plan.overlap:
            one, two = one - weight**2 * max(0.0, one - used), used
        else:
            one, two = used, None if two is None else two - weight**2 * max(0.0, two - used)
    assert {plan.overlap for plan in result.log.plans} == {False, True}
    assert 0.1 < deviation < 0.25

    memory = result.log.plans[-1].memory
    view = next(v for v in watched.views[50:] if v.jobs[0].forward_left > 1000)._replace(last=None)
    exact = watched.policy.plan(view._replace(memory=memory._replace(ratio=1.0, beside=1.0, deviation=0.0)))
    careful = watched.policy.plan(
        view._replace(memory=memory._replace(ratio=1.25, beside=1.25, deviation=0.1))
    )
    assert exact.predicted_s is not None and careful.predicted_s is not None
    assert careful.predicted_s * 1.25 * 1.3 == pytest.approx(exact.predicted_s, rel=0.01)


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


def test_the_slack_iterations_of_a_pipeline_grow_with_its_quiet() -> None:
    """Without requests: 0.3 of a TTFT of 0.5 s, then a twentieth of the time since the last one, up to half of it."""
    policy = build_policy("coserving_slack", predictor=COST, quiet_share=0.05)
    requests = [Request(0, 0.0, 16, 4), Request(1, 15.0, 16, 4)]
    result = run(policy, requests, jobs=[job_of(300_000)], world=COST, horizon=Horizon(duration_s=30.0))
    rows = result.table("requests")
    quiet_from_s = np.concatenate([[0.0], np.sort(rows["last_token_s"])])
    checked = 0
    for plan, work, end_s in zip(result.log.plans, result.log.works, result.log.end_s, strict=True):
        assert plan.predicted_s is not None
        start_s = end_s - plan.predicted_s
        if work.decode_count or work.prefill:
            continue
        quiet_s = start_s - quiet_from_s[quiet_from_s <= start_s + 1e-9].max()
        # Quiet begins with the last plan that saw a request, up to 0.2 s before its last token.
        assert plan.predicted_s == pytest.approx(max(0.15, min(0.05 * quiet_s, 0.25)), rel=0.01, abs=0.01)
        checked += 1
    waited_s = rows["first_token_s"] - rows["arrival_s"]
    assert checked > 60 and waited_s.max() < 0.25 + 0.15


def test_an_idle_slack_iteration_is_no_shorter_than_one_with_requests() -> None:
    """A hundredth of a TTFT of 0.5 s is less than the budget of 50 ms."""
    policy = build_policy("coserving_slack", predictor=COST, idle_share=0.01)
    result = run(policy, jobs=[job_of(300_000)], world=COST, horizon=Horizon(duration_s=2.0))
    assert [plan.predicted_s for plan in result.log.plans[:20]] == pytest.approx([0.05] * 20, abs=2.0**-14)


def slack_beside(believed: Contention, world: LinearCost, duration_s: float = 20.0) -> Run:
    """Eight decodes beside a job, with the budget as the longest iteration."""
    policy = build_policy("coserving_slack", predictor=believed, max_burst=1.0)
    horizon = Horizon(duration_s=duration_s, drain_s=0.0)
    return run(policy, long_requests(), jobs=[job_of(300)], limits=ROOMY, world=world, horizon=horizon)


@pytest.mark.parametrize(
    ("contention", "read_s", "beside"),
    [(0.5, 0.0, {Forward, Backward}), (0.5, 2.0**-6, {Backward}), (1.0, 0.0, set())],
)
def test_slack_finetunes_beside_inference_where_two_streams_do_more(
    contention: float, read_s: float, beside: set[type]
) -> None:
    """The eight decodes take 16 ms, of which half may hide."""
    cost = Contention(contention=contention, read_s=read_s)
    result = slack_beside(cost, cost)
    seen = set()
    for plan, work in zip(result.log.plans, result.log.works, strict=True):
        assert work.overlap == plan.overlap
        assert plan.predicted_s == pytest.approx(cost.iteration_s(work._replace(adapters=0)), rel=1e-9)
        kinds = {type(piece) for piece in plan.finetune}
        if work.decode_count and len(kinds) == 1:
            assert plan.overlap == (kinds <= beside)
            seen |= kinds
    assert seen >= {Forward, Backward}

    def trained_tok_s(result: Run) -> float:
        steps = result.table("steps")
        return float(steps["tokens"].sum() / steps["end_s"].max())

    alone = Contention(contention=1.0)
    gain = trained_tok_s(result) / trained_tok_s(slack_beside(alone, alone))
    assert gain > 1 + 0.05 * len(beside) or not beside


def test_slack_finetunes_beside_a_prompt_where_nothing_decodes() -> None:
    cost = Contention(contention=0.5)
    policy = build_policy("coserving_slack", predictor=cost)
    result = run(
        policy, [Request(0, 0.0, 1000, 1)], jobs=[job_of(3000)], limits=ROOMY, world=cost, horizon=BUSY
    )
    works = [work for work in result.log.works if work.prefill]
    assert len(works) == 4
    assert all(work.forward and work.overlap and not work.decode_count for work in works)


@pytest.mark.parametrize(("believed", "true"), [(0.5, 1.5), (0.95, 0.5)])
def test_slack_learns_what_two_streams_hide(believed: float, true: float) -> None:
    """A predictor that is wrong about contention alone is put right, for two streams and for them alone."""
    belief, world = Contention(contention=believed), Contention(contention=true)
    result = slack_beside(belief, world)
    beside = [plan.overlap for plan in result.log.plans]
    assert all(beside[5:10])
    late = range(len(beside) // 2, len(beside))
    assert np.mean([beside[i] for i in late]) == pytest.approx(float(true < believed), abs=0.2)
    errors, with_margin_s = [], []
    for i in late:
        plan, took_s = result.log.plans[i], world.iteration_s(result.log.works[i])
        assert plan.predicted_s is not None
        expected_s = plan.predicted_s * (plan.memory.beside if plan.overlap else plan.memory.ratio)
        errors.append(abs(took_s / expected_s - 1))
        with_margin_s.append(took_s * (1 + 3 * plan.memory.deviation))
    assert np.median(errors) < 0.02
    assert np.median(with_margin_s) == pytest.approx(0.05, rel=0.02), "the budget is used up on either"


def test_slack_forgets_one_bad_iteration_on_two_streams() -> None:
    class Stalled(Contention):
        """The hundredth iteration takes twenty times as long."""

        def iteration_s(self, work: Work) -> float:
            took.append(work.overlap)
            return super().iteration_s(work) * (20.0 if len(took) == 100 else 1.0)

    took: list[bool] = []
    slack_beside(Contention(contention=0.5), Stalled(contention=0.5), duration_s=60.0)
    assert np.mean(took[:100]) > 0.9 and np.mean(took[-100:]) > 0.9
    assert not any(took[100:150])


@pytest.mark.parametrize(("factor", "true"), [(1.5, 1.5), (1.5, 1.25), (1.25, 1.25), (1.3, 1.0)])
def test_slack_tries_one_stream_again_after_many_iterations_on_two(factor: float, true: float) -> None:
    """A predictor that is too slow as well: what was seen on two streams alone would never tell of one."""

    class Slow(Contention):
        def iteration_s(self, work: Work) -> float:
            return factor * super().iteration_s(work)

    result = slack_beside(Slow(contention=0.5), Contention(contention=true), duration_s=60.0)
    beside = [plan.overlap for plan in result.log.plans]
    assert all(beside[10:400]) and np.mean(beside[410:]) < 0.5


def plan_of(
    name: str,
    requests: list[Request],
    slos: dict[str, Slo],
    under_way: Plan,
    now_s: float,
    **limits: Any,
) -> Plan:
    """What the policy plans at `now_s` once `under_way` has been done, with a budget of 50 ms."""
    cost = LinearCost(prefill_s=2.0**-16)
    state = PipelineState(limits=limits_of(**limits), slos=slos, recorder=Recorder(), jobs=[job_of(8000)])
    for request in requests:
        assert state.arrive(request)
    if under_way.prefills:
        state.apply(under_way, 0.0)
        state.commit(0.0)
    settings = {} if name == "coserving_slack" else {"margin": 0.0}
    return build_policy(name, predictor=cost, budget_s=0.05, **settings).plan(state.view(now_s))


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("admission", "first", "last", "under_way", "now_s", "budget_s"),
    [
        # Prompt tokens and bound on the first token of each, all here at 0 s; half of the time left, over iterations
        # of 256. First-come first-served, one of the tighter class that came now would be behind both.
        pytest.param("fcfs", (600, math.inf), (700, math.inf), {}, 0.0, 0.05, id="no-hurry"),
        pytest.param("fcfs", (600, math.inf), (700, 0.24), {}, 0.0, 0.24 / 2 / 6, id="last"),
        pytest.param("fcfs", (600, 0.24), (700, math.inf), {}, 0.0, 0.24 / 2 / 6, id="one-to-come"),
        pytest.param("fcfs", (600, 0.12), (700, 0.24), {}, 0.0, 0.12 / 2 / 6, id="one-to-come-tighter"),
        pytest.param("shortest", (600, 0.12), (700, 0.24), {}, 0.0, 0.12 / 2 / 6, id="one-to-come-shortest"),
        pytest.param("fcfs", (600, 0.24), (700, 0.24), {}, 0.1, 0.14 / 2 / 6, id="last-waited"),
        pytest.param("fcfs", (600, 0.24), (700, 0.24), {}, 0.3, 0.24 / 2 / 6, id="both-lost"),
        pytest.param("fcfs", (600, math.inf), (700, 0.2), {0: 200}, 0.0, 0.2 / 2 / 5, id="one-under-way"),
        pytest.param(
            "fcfs", (400, math.inf), (500, 0.12), {0: 100, 1: 100}, 0.0, 0.12 / 2 / 3, id="two-under-way"
        ),
        pytest.param("fcfs", (56, math.inf), (256, 0.08), {0: 56}, 0.0, 0.08 / 2 / 2, id="beside-a-decode"),
        # By deadline it would pass the other.
        pytest.param("deadline", (600, 0.12), (700, math.inf), {}, 0.0, 0.12 / 2 / 3, id="first"),
        pytest.param("deadline", (600, 0.22), (700, math.inf), {}, 0.1, 0.12 / 2 / 3, id="first-waited"),
        pytest.param("deadline", (600, 0.15), (700, 0.24), {}, 0.0, 0.24 / 2 / 6, id="both-last-tighter"),
        pytest.param("deadline", (600, 0.12), (700, 0.48), {}, 0.0, 0.12 / 2 / 3, id="both-first-tighter"),
        pytest.param("deadline", (600, 0.1), (700, math.inf), {}, 0.2, 0.05, id="first-lost"),
        pytest.param("deadline", (600, 0.1), (700, 0.44), {}, 0.2, 0.24 / 2 / 6, id="first-lost-last-not"),
        pytest.param("deadline", (600, 0.1), (700, 0.1), {}, 0.2, 0.05, id="last-lost"),
        pytest.param(
            "deadline", (600, 0.08), (700, math.inf), {0: 200}, 0.0, 0.08 / 2 / 2, id="first-under-way"
        ),
    ],
)
@pytest.mark.parametrize("bound", ["ttft_s", "e2e_s"])
def test_finetuning_leaves_prompts_the_time_that_their_first_tokens_need(
    name: str,
    bound: str,
    admission: str,
    first: tuple[int, float],
    last: tuple[int, float],
    under_way: dict[int, int],
    now_s: float,
    budget_s: float,
) -> None:
    """Finetuning fills the iteration up to the budget by hand, to the last token of its window."""
    requests = [Request(id, 0.0, tokens, 10, str(id)) for id, (tokens, _) in enumerate((first, last))]
    slos = {str(id): Slo(**{bound: bound_s}) for id, (_, bound_s) in enumerate((first, last))}
    plan = plan_of(name, requests, slos, Plan(prefills=tuple(under_way.items())), now_s, admission=admission)
    assert plan.prefills and [type(piece) for piece in plan.finetune] == [Forward]
    assert plan.predicted_s is not None
    assert budget_s - 2.0**-14 < plan.predicted_s <= budget_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(("bound_s", "budget_s"), [(math.inf, 0.05), (0.2, 0.05), (0.06, 0.03)])
def test_an_iteration_ends_in_half_of_the_time_that_a_prompt_to_come_has(
    name: str, bound_s: float, budget_s: float
) -> None:
    """Nobody waits; one answer is under way, of the class of those that come."""
    slos = {"chat": Slo(ttft_s=bound_s, tpot_s=0.05)}
    plan = plan_of(name, [Request(0, 0.0, 16, 20, "chat")], slos, Plan(prefills=((0, 16),)), 0.0)
    assert plan.decode and plan.predicted_s is not None
    assert budget_s - 2.0**-14 < plan.predicted_s <= budget_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("running", "waiting", "ttft_s", "trains"),
    [
        pytest.param(16, 0, 1.0, True, id="nobody-waits"),
        pytest.param(16, 1, 1.0, False, id="no-sequence-left"),
        pytest.param(16, 1, math.inf, True, id="no-hurry"),
        pytest.param(16, 1, 0.01, False, id="lost-as-for-the-next"),
        pytest.param(8, 3, 1.0, True, id="all-fit"),
        pytest.param(8, 4, 1.0, False, id="not-the-blocks-of-all"),
    ],
)
def test_finetuning_gives_way_where_only_answers_that_end_make_place(
    name: str, running: int, waiting: int, ttft_s: float, trains: bool
) -> None:
    """16 sequences or 4,096 tokens are all that fit; those that wait have 1,000 each."""
    requests = [Request(i, 0.0, 16, 20, "chat") for i in range(running)]
    requests += [Request(running + i, 0.0, 1000, 20, "late") for i in range(waiting)]
    under_way = Plan(prefills=tuple((i, 16) for i in range(running)))
    slos = {"chat": Slo(tpot_s=0.05), "late": Slo(ttft_s=ttft_s)}
    assert bool(plan_of(name, requests, slos, under_way, 0.02).finetune) == trains


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("answers", "kv_tokens", "trains"), [(1, 400, True), (1, 384, False), (8, 480, True), (8, 464, False)]
)
def test_finetuning_gives_way_where_answers_have_no_room_to_grow(
    name: str, answers: int, kv_tokens: int, trains: bool
) -> None:
    """An answer holds blocks for 32 tokens and takes 16 more now; 64 are to be left for each or, where that is less,
    a fifth of all room."""
    tokens = 320 if answers == 1 else 32
    requests = [Request(i, 0.0, tokens, 300, "chat") for i in range(answers)]
    under_way = Plan(prefills=tuple((i, tokens) for i in range(answers)))
    plan = plan_of(name, requests, {"chat": Slo()}, under_way, 0.0, kv_tokens=kv_tokens, max_tokens=320)
    assert plan.decode and bool(plan.finetune) == trains


@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_first_tokens_come_in_time_that_finetuning_would_make_late(name: str) -> None:
    """Bursts of 32 prompts of 200 tokens: 25 iterations, 0.5 s of them alone and 1.25 s in iterations of 50 ms."""
    requests = [Request(i, 2.0 * (i // 32), 200, 2, "chat") for i in range(128)]
    policy = build_policy(name, predictor=COST, first_token_share=0.9)
    result = run(
        policy, requests, jobs=[job_of(900)], limits=PLACES, world=COST, horizon=Horizon(duration_s=8.0)
    )
    rows = result.table("requests")
    assert len(rows["request"]) == 128
    assert (rows["first_token_s"] - rows["arrival_s"]).max() < 1.0
    if name != "temporal_limited":
        beside = [plan.finetune for plan in result.log.plans if plan.prefills]
        assert np.mean([len(slices) > 0 for slices in beside]) > 0.9


@pytest.mark.parametrize("name", [*BUDGETED, "coserving_slack"])
def test_answers_end_in_time_that_finetuning_would_make_late(name: str) -> None:
    """Decodes alone take 5 ms, so that an answer of 200 tokens takes 1 s, and 8 s in iterations of 40 ms."""
    requests = [Request(i, 0.5 * i, 16, 200 if i % 4 else 50, "chat") for i in range(80)]
    result = run(
        build_policy(name, predictor=COST, budget_s=0.05),
        requests,
        jobs=[job_of(900)],
        limits=PLACES,
        world=COST,
        horizon=Horizon(duration_s=50.0),
        slos={"chat": Slo(name="chat", e2e_s=4.0)},
    )
    rows = result.table("requests")
    late = rows["request"][~(rows["last_token_s"] - rows["arrival_s"] <= 4.0)]
    assert len(rows["request"]) == 80 and len(late) > 0 and late.max() < 16, "until lengths are known"
    assert np.mean([len(plan.finetune) > 0 for plan in result.log.plans]) > 0.4


LATE = Slo(name="late", ttft_s=0.5)
SLOW = Slo(name="slow", tpot_s=0.1)
"""Both are missed where every iteration ends a second after the last."""


def plan_after(
    name: str,
    cost: LinearCost,
    slos: tuple[Slo, ...],
    busy: bool,
    waited_s: tuple[float, ...] = (),
    **settings: Any,
) -> Plan:
    """What the policy plans with a budget of 50 ms once a request of two tokens of each of `slos` has ended, an
    iteration a second; where it is `busy`, beside one that decodes; and with prompts that have waited so
    long, each for a first token in 2 s."""
    classes = {slo.name: slo for slo in (*slos, Slo(name="here", tpot_s=0.05), Slo(name="waits", ttft_s=2.0))}
    state = PipelineState(limits=limits_of(), slos=classes, recorder=Recorder(), jobs=[job_of(8000)])
    for id, slo in enumerate(slos):
        assert state.arrive(Request(id, 2.0 * id, 16, 2, slo.name))
        for plan, end_s in ((Plan(prefills=((id, 16),)), 2.0 * id + 1), (Plan(decode=True), 2.0 * id + 2)):
            state.apply(plan, end_s - 1)
            state.commit(end_s)
    now_s = 2.0 * len(slos)
    if busy:
        assert state.arrive(Request(len(slos), now_s, 16, 20, "here"))
        state.apply(Plan(prefills=((len(slos), 16),)), now_s)
        state.commit(now_s)
    for id, ago_s in enumerate(waited_s, len(slos) + 1):
        assert state.arrive(Request(id, now_s - ago_s, 600, 20, "waits"))
    return build_policy(name, predictor=cost, budget_s=0.05, **settings).plan(state.view(now_s))


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("slos", "share"),
    [
        pytest.param((SLOW,), 1.0, id="one"),
        pytest.param((SLOW, LATE), 0.4, id="both"),
        pytest.param((SLOW, SLOW), 0.416, id="answers"),
        pytest.param((LATE, LATE), 0.416, id="first-tokens"),
        pytest.param((SLOW, SLOW, Slo(name="other", tpot_s=0.1)), 0.416, id="the-worst-class"),
        pytest.param((Slo(name="whole", e2e_s=1.5),) * 2, 0.416, id="ends"),
        pytest.param((Slo(name="whole", e2e_s=0.5),), 0.4, id="an-end-before-the-first-token"),
        pytest.param((SLOW, SLOW, SLOW), 0.0, id="too-many"),
        pytest.param((Slo(name="slow", tpot_s=1.5, ttft_s=1.5, e2e_s=2.5),), 1.0, id="in-time"),
    ],
)
def test_finetuning_gives_way_where_requests_came_late(
    name: str, slos: tuple[Slo, ...], share: float
) -> None:
    """By 2.5 to 5 % of the last requests, of which the newest weighs 2 %."""
    settings = {} if name == "coserving_slack" else {"margin": 0.0}
    plan = plan_after(name, LinearCost(prefill_s=2.0**-16), slos, True, **settings)
    assert plan.decode and plan.predicted_s is not None
    if share:
        assert 0.05 * share - 2.0**-14 < plan.predicted_s <= 0.05 * share * (1 + 1e-9)
    else:
        assert not plan.finetune
    alone = plan_after(name, LinearCost(prefill_s=2.0**-16), slos, False, **settings)
    assert alone.predicted_s is not None and alone.predicted_s > 0.05 - 2.0**-13, "where nobody is here"


@pytest.mark.parametrize("name", ["coserving", "spatial_limited", "temporal_limited", "coserving_slack"])
@pytest.mark.parametrize(
    ("slos", "waited_s", "first"),
    [
        pytest.param((LATE,) * 3, (1.1, 0.0), True, id="late-and-waiting"),
        pytest.param((LATE,) * 3, (0.9, 0.9), False, id="fresh"),
        pytest.param((LATE,) * 3, (3.0, 0.0), True, id="too-late"),
        pytest.param((LATE,) * 3, (1.1,), True, id="one-that-would-be-in-time"),
        pytest.param((LATE,) * 3, (1.9,), False, id="one-that-would-be-late"),
        pytest.param((LATE,) * 3, (0.9,), False, id="one-that-is-fresh"),
        pytest.param((LATE,), (1.1, 0.0), False, id="few"),
        pytest.param((SLOW,) * 3, (1.1, 0.0), False, id="answers"),
        pytest.param((LATE, LATE, SLOW, SLOW), (1.1, 0.0), False, id="answers-as-many"),
        pytest.param((SLOW, SLOW, LATE, LATE, LATE), (1.1, 0.0), True, id="answers-less"),
    ],
)
def test_prompts_that_wait_fill_an_iteration_where_first_tokens_came_late(
    name: str, slos: tuple[Slo, ...], waited_s: tuple[float, ...], first: bool
) -> None:
    """48 of 256 tokens keep a bound of 50 ms, beside an answer; the newest request weighs 2 %."""
    plan = plan_after(name, LinearCost(prefill_s=2.0**-10), slos, True, waited_s, min_chunk_tokens=16)
    tokens = sum(count for _, count in plan.prefills)
    assert plan.decode
    assert (tokens == 255 and not plan.finetune) if first else 16 <= tokens <= 48


def test_slack_idles_less_after_late_requests_until_it_has_been_quiet() -> None:
    """0.3 of a TTFT of 1 s, or the budget of an iteration where more would come late again."""
    for slos, idle_s in (((), 0.3), ((SLOW,) * 2, 0.3 * 0.416), ((SLOW,) * 9, 0.05)):
        plan = plan_after("coserving_slack", COST, slos, False, ttft_s=1.0)
        assert plan.predicted_s is not None
        assert idle_s - 2.0**-13 < plan.predicted_s <= idle_s * (1 + 1e-9)


def test_a_long_prompt_waits_until_time_for_its_least_chunk_has_been_banked() -> None:
    """64 tokens after 2,000 take 64 ms and more, of a bound of 50 ms; decoding alone takes 5 ms."""
    cost = LinearCost(pair_s=2.0**-21)
    requests = [Request(i, 0.0, 16, 500, slo="chat") for i in range(8)] + [
        Request(8, 2.0, 4000, 2, slo="chat")
    ]
    policy = build_policy("coserving_slack", predictor=cost)
    result = run(policy, requests, jobs=[job_of(900)], limits=ROOMY, world=cost, horizon=BUSY)
    chunks = [i for i, plan in enumerate(result.log.plans) if 8 in dict(plan.prefills)]
    between = result.log.plans[chunks[0] : chunks[-1]]
    waits = [plan for plan in between if not plan.prefills]
    assert len(waits) > 10 and not any(plan.finetune for plan in waits)
    for times_s in token_times(result.recorder).values():
        since_s = np.array(times_s[1:]) - times_s[0]
        assert (since_s <= 0.05 * np.arange(1, len(times_s)) * (1 + 1e-9)).all()


def test_slack_sizes_prompt_chunks_by_what_iterations_really_take() -> None:
    """A world twice as slow as predicted: chunks of a prompt beside decodes take the budget, not twice that."""
    believed = LinearCost(prefill_s=2.0**-11)
    policy = build_policy(
        "coserving_slack", predictor=believed, budget_s=0.05, max_burst=1.0, min_chunk_tokens=16
    )
    requests = [*long_requests(), Request(8, 10.0, 5000, 2)]
    world = LinearCost(prefill_s=2.0**-11, scale=2.0)
    result = run(policy, requests, limits=ROOMY, world=world, horizon=Horizon(duration_s=20.0, drain_s=0.0))
    done, took_s = 0, []
    for work in result.log.works[1:]:
        done += work.prefill_tokens
        if work.prefill and done < 5000:
            took_s.append(world.iteration_s(work._replace(adapters=0)))
    assert len(took_s) > 50 and done == 5000
    assert min(took_s) > 0.048 and max(took_s) <= 0.05 * (1 + 1e-9)


def test_slack_counts_each_iteration_once() -> None:
    """With a lookahead the first two plans after a pause follow the same iteration. In a world twice as slow,
    the ratio after n iterations is 2 - 0.95^n."""

    class Watched:
        serves = True

        def __init__(self) -> None:
            self.policy = build_policy("coserving_slack", predictor=COST)
            self.last: dict[int, int | None] = {}
            self.plans: list[Plan] = []

        def plan(self, view: View) -> Plan:
            plan = self.policy.plan(view)
            self.plans.append(plan)
            self.last[id(plan)] = None if view.last is None else view.last.iteration
            return plan

    watched, world = Watched(), LinearCost(context_s=COST.context_s, scale=2.0)
    requests = [Request(i, float(i), 16, 4) for i in range(20)]
    result = run(watched, requests, limits=limits_of(lookahead=1), world=world)
    seen, again = set(), 0
    for plan in result.log.plans:
        last = watched.last[id(plan)]
        if last is not None:
            again += last in seen
            seen.add(last)
        assert plan.memory.ratio == pytest.approx(2 - 0.95 ** len(seen), rel=1e-9)
    assert again > 10 and len(seen) > 40


def test_slices_of_several_jobs_each_follow_from_where_their_own_job_stands() -> None:
    plain = job_of(100, id="plain")
    again = job_of(50, id="again", order="window_major", memory="recompute")
    plain.advance(Forward("plain", 40))
    again.advance(Forward("again", 50))
    again.advance(Backward("again", 30 * LAYERS))
    slices = (
        Forward("plain", 20),
        Backward("again", 10 * LAYERS),
        Forward("plain", 40),
        Backward("plain", 130),
        Backward("again", 5 * LAYERS),
    )
    decodes = Work(decode_count=3, decode_context_tokens=70, sampled_tokens=3)
    assert add_slices(decodes, (plain.view(), again.view()), slices) == decodes._replace(
        forward=(Chunk(20, 40), Chunk(40, 60)),
        backward=(
            LayerChunk(LAYERS, 10, 10),
            LayerChunk(1, 100, 0),
            LayerChunk(1, 30, 70),
            LayerChunk(LAYERS, 5, 5),
        ),
        recompute=(Chunk(10, 10), Chunk(5, 5)),
    )


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


def test_inference_only_is_coserving_without_jobs_and_without_a_tight_budget() -> None:
    requests = requests_of(80, rate_rps=30, prompt_tokens=(5, 400), output_tokens=(1, 60))
    plain = run(build_policy("inference_only"), requests, limits=limits_of(kv_tokens=2000))
    other = run(build_policy("coserving", budget_s=1e9), requests, limits=limits_of(kv_tokens=2000))
    assert plain.recorder.requests.data.tobytes() == other.recorder.requests.data.tobytes()
    assert plain.log.works == other.log.works


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("coserving", 3000),
        ("coserving_slack", 3000),
        ("coserving_static", 100),
        ("temporal", 100),
        ("spatial", 3000),
        ("finetune_only", 100),
    ],
)
def test_two_jobs_share_the_work_by_weight(name: str, length: int) -> None:
    """Samples longer than an iteration's budget where there is one: a job gets at most one an iteration."""
    heavy, light = job_of(length, id="heavy", weight=3.0), job_of(length, id="light", weight=1.0)
    horizon = Horizon(duration_s=120.0 if length == 3000 else 20.0, drain_s=0.0)
    requests = [] if name == "finetune_only" else long_requests()
    result = run(build_policy(name), requests, jobs=[heavy, light], limits=ROOMY, horizon=horizon)
    steps, names = result.table("steps"), result.recorder.jobs.names
    trained = {name: steps["tokens"][steps["job"] == code].sum() for code, name in enumerate(names)}
    assert trained["heavy"] / trained["light"] == pytest.approx(3.0, rel=0.05)


def test_a_job_that_starts_late_gets_half_from_then_on() -> None:
    early, late = job_of(100, id="early"), job_of(100, id="late", start_s=10.0)
    result = run(build_policy("coserving"), long_requests(), jobs=[early, late], limits=ROOMY, horizon=BUSY)
    steps, names = result.table("steps"), result.recorder.jobs.names
    after = steps["end_s"] > 10.0
    own = {name: steps["tokens"][after & (steps["job"] == code)].sum() for code, name in enumerate(names)}
    assert own["early"] == pytest.approx(own["late"], rel=0.05)


@pytest.mark.parametrize("order", ["layer_major", "window_major"])
def test_finite_data_ends_with_a_partial_accumulation(order: str) -> None:
    job = job_of([10, 20, 30, 40, 50], accumulation=2, order=order)
    result = run(build_policy("coserving"), jobs=[job])
    steps = result.table("steps")
    assert steps["samples"].tolist() == [2, 2, 1] and steps["tokens"].tolist() == [30, 70, 50]
    assert job.finished


@pytest.mark.parametrize(
    "name", ["coserving_static", "inference_only", "temporal", "temporal_dynamic", "spatial"]
)
def test_a_token_budget_above_the_pipelines_limit_is_cut_to_it(name: str) -> None:
    limits = limits_of(max_tokens=64)
    result = run(
        build_policy(name, token_budget=256), requests_of(10, rate_rps=50, prompt_tokens=300), limits=limits
    )
    assert max(w.prefill_tokens + w.decode_count for w in result.log.works) == 64


def test_running_requests_keep_the_adapter_version_that_they_started_with() -> None:
    """Also when a step is published meanwhile, and after a preemption."""
    versions: dict[int, set[int]] = {}

    class Watching:
        serves = True
        inner = build_policy("coserving")

        def plan(self, view: View) -> Plan:
            state = view.victims.__self__  # type: ignore[attr-defined]
            for sequence in state.running.values():
                versions.setdefault(sequence.id, set()).add(sequence.adapter_version)
            return self.inner.plan(view)

    requests = requests_of(60, rate_rps=20, prompt_tokens=60, output_tokens=60, adapters=("job",))
    result = run(
        Watching(),
        requests,
        jobs=[job_of(60)],
        limits=limits_of(kv_tokens=700),
        horizon=Horizon(duration_s=9.0),
    )
    assert result.table("requests")["preemptions"].sum() > 3
    assert all(len(seen) == 1 for seen in versions.values())
    assert len(set.union(*versions.values())) > 3
