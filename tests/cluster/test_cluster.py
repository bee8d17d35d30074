"""Routers and clusters: exact rules, and clusters that are sums of single pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest

from sim.cluster import PipelineSpec, simulate_cluster
from sim.core.arrivals import Arrivals
from sim.core.loop import Horizon
from sim.core.plan import Plan
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.core.work import Work
from sim.pipeline import Clock
from sim.routing import (
    LEAST_CHUNK_TOKENS,
    AdapterAffinity,
    Consolidate,
    Incoming,
    LeastTokens,
    Load,
    PowerOfTwo,
    RoundRobin,
    Router,
    SloAware,
)
from tests.support import (
    SLOS,
    ClosedLoop,
    LinearCost,
    ListArrivals,
    build_policy,
    job_of,
    limits_of,
    requests_of,
    run,
)

HELLO = Incoming(10, Slo(), None)
ROUTERS = [RoundRobin, LeastTokens, PowerOfTwo, AdapterAffinity, SloAware, Consolidate]


def load_of(
    *prompts: int, predictor: LinearCost | None = None, inbox: int = 0, predicts: bool = True
) -> Load:
    """A pipeline with these prompts waiting and `inbox` requests of 10 tokens routed to it."""
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder())
    if predicts:
        state.predicted_s = state.measured_s = 1.0
    for id, prompt in enumerate(prompts):
        state.arrive(Request(id, 0.0, prompt, 5))
    load = Load(state, predictor or LinearCost())
    for _ in range(inbox):
        load.add(10)
    return load


def cluster(
    requests: Seq[Request] | Arrivals,
    router: Router,
    costs: Seq[LinearCost],
    *,
    lookahead: int = 0,
    jobs: bool = False,
    horizon: Horizon | None = None,
    policy: str = "coserving",
    **settings: object,
) -> Recorder:
    recorder = Recorder()
    specs = [
        PipelineSpec(
            policy=build_policy(policy, predictor=cost, **settings),
            world=cost,
            predictor=cost,
            limits=limits_of(lookahead=lookahead),
            jobs=(job_of([50] * 40),) if jobs else (),
        )
        for cost in costs
    ]
    arrivals = ListArrivals(requests) if isinstance(requests, list) else requests
    simulate_cluster(
        pipelines=specs,
        arrivals=arrivals,  # type: ignore[arg-type]
        router=router,
        slos=SLOS,
        horizon=horizon or Horizon(),
        recorder=recorder,
    )
    return recorder


@pytest.mark.parametrize(("policy", "settings", "least"), [
    ("coserving", {"min_chunk_tokens": 40}, 40),
    ("coserving_slack", {"min_chunk_tokens": 24}, 24),
    ("spatial_limited", {"min_chunk_tokens": 3}, 3),
    ("temporal_limited", {"min_chunk_tokens": 5}, 5),
    ("inference_only", {}, LEAST_CHUNK_TOKENS),
])  # fmt: skip
def test_routers_expect_the_least_chunk_of_each_policy(
    policy: str, settings: dict[str, int], least: int
) -> None:
    seen: list[int] = []

    class Seeing(LeastTokens):
        def choose(self, request: Incoming, pipelines: Seq[Load]) -> int:
            seen.extend(load.min_chunk_tokens for load in pipelines)
            return super().choose(request, pipelines)

    cost = LinearCost()
    cluster(requests_of(1, rate_rps=1), Seeing(), [cost, cost], policy=policy, **settings)
    assert seen == [least, least]


def test_a_larger_least_chunk_brings_the_first_token_earlier_where_no_chunk_fits() -> None:
    loads = [load_of(1, predictor=LinearCost(host_s=0.1)) for _ in range(3)]
    for load, tokens in zip(loads, (1, 64, 16), strict=True):
        load.min_chunk_tokens = tokens
    assert SloAware().choose(Incoming(64, Slo(tpot_s=0.02), None), loads) == 1


def test_round_robin_takes_each_in_turn() -> None:
    loads, router = [load_of(), load_of(500), load_of()], RoundRobin()
    assert [router.choose(HELLO, loads) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_least_tokens_counts_state_and_inbox_and_breaks_ties_by_index() -> None:
    assert LeastTokens().choose(HELLO, [load_of(50), load_of(30, inbox=1), load_of(41)]) == 1
    assert LeastTokens().choose(HELLO, [load_of(50), load_of(30, inbox=2), load_of(50)]) == 0


def test_power_of_two_prefers_the_lighter_of_two_drawn() -> None:
    """The heaviest is never taken; the lightest whenever drawn: 2/3 of three, 1/2 of four."""
    for count, share in ((3, 2 / 3), (4, 1 / 2)):
        loads, router = [load_of(10 + 10 * i) for i in range(count)], PowerOfTwo(seed=1)
        picks = [router.choose(HELLO, loads) for _ in range(3000)]
        assert count - 1 not in picks
        assert picks.count(0) / 3000 == pytest.approx(share, abs=0.03)


def test_an_adapter_stays_on_one_pipeline_until_the_bound() -> None:
    loads, router = [load_of() for _ in range(4)], AdapterAffinity(max_imbalance=2.0)
    request = Incoming(10, Slo(), "poet")
    picks = []
    for sent in range(40):
        home = router.choose(request, loads)
        bound = np.ceil(2.0 * (sent + 1) / 4)
        assert loads[home].requests < bound
        loads[home].inbox_requests += 1
        picks.append(home)
    assert picks.count(picks[0]) >= 20, "the bound lets a pipeline take twice the mean"
    for load in loads:
        load.inbox_requests = 10
    assert {router.choose(request, loads) for _ in range(5)} == {picks[0]}
    assert AdapterAffinity(max_imbalance=1e308).choose(request, loads) == picks[0]


def test_slo_aware_sends_more_to_the_faster_pipeline() -> None:
    costs = [LinearCost(scale=1.0), LinearCost(scale=3.0)]
    rows = cluster(requests_of(200, rate_rps=40, prompt_tokens=200), SloAware(), costs).requests.arrays()
    fast, slow = (rows["pipeline"] == 0).sum(), (rows["pipeline"] == 1).sum()
    assert fast > 1.5 * slow > 0


def test_slo_aware_avoids_a_pipeline_whose_tpot_would_break() -> None:
    """The second has a shorter backlog and decodes too slowly for 20 ms a token."""
    slow = LinearCost(decode_s=0.03, prefill_s=2.0**-20)
    loads = [load_of(200, 200), load_of(predictor=slow)]
    assert SloAware().choose(Incoming(10, Slo(tpot_s=0.02), None), loads) == 0
    assert SloAware().choose(Incoming(10, Slo(), None), loads) == 1


def test_slo_aware_counts_all_requests_of_a_pipeline_as_decoding() -> None:
    """16 short requests wait on the first: decoding together they take 4 + 17 * 2 ms a token, over 20 ms."""
    cost = LinearCost(host_s=0.004, decode_s=0.002, prefill_s=2.0**-20)
    loads = [load_of(*[1] * 16, predictor=cost), load_of(900, predictor=LinearCost(prefill_s=0.01))]
    assert cost.iteration_s(Work(decode_count=17)) > 0.02
    assert SloAware().choose(Incoming(10, Slo(tpot_s=0.02), None), loads) == 1


def test_consolidate_fills_the_first_until_a_bound_is_reached() -> None:
    """Alone a token takes 4 + 2 ms, with eight waiting beside it 4 + 18 ms; 0.95 of 23 ms lies between."""
    cost = LinearCost(host_s=0.004, decode_s=0.002, prefill_s=2.0**-20)
    idle, busy = load_of(predictor=cost), load_of(*[1] * 8, predictor=cost)
    tight = Incoming(10, Slo(tpot_s=0.023), None)
    assert Consolidate().choose(tight, [busy, idle]) == 0
    assert Consolidate(headroom=0.95).choose(tight, [busy, idle]) == 1
    assert Consolidate(headroom=0.95).choose(tight, [idle, load_of(predictor=cost)]) == 0
    late = Incoming(10, Slo(ttft_s=0.02), None)
    assert Consolidate().choose(late, [load_of(900, predictor=LinearCost(prefill_s=0.01)), idle]) == 1


def test_consolidate_leaves_more_where_a_policy_does_not_predict() -> None:
    """As above; 0.7 of 30 ms is less than 22 ms."""
    cost = LinearCost(host_s=0.004, decode_s=0.002, prefill_s=2.0**-20)
    loads = [load_of(*[1] * 8, predictor=cost, predicts=False), load_of(predictor=cost)]
    tight = Incoming(10, Slo(tpot_s=0.03), None)
    assert Consolidate().choose(tight, loads) == 1
    assert Consolidate(unpredicted_headroom=0.75).choose(tight, loads) == 0


def test_a_router_corrects_predictions_by_what_was_measured() -> None:
    """22 ms a token are 44 where iterations have taken twice as long as predicted."""
    cost = LinearCost(host_s=0.004, decode_s=0.002, prefill_s=2.0**-20)
    idle, busy = load_of(predictor=cost), load_of(*[1] * 8, predictor=cost)
    busy.state.predicted_s, busy.state.measured_s = 10.0, 20.0
    for tpot_s, chosen in ((0.043, 1), (0.045, 0)):
        assert Consolidate().choose(Incoming(10, Slo(tpot_s=tpot_s), None), [busy, idle]) == chosen


def test_consolidate_knows_that_a_prompt_has_only_the_time_that_decodes_leave() -> None:
    """Eight decode beside it, 10 ms in all: of 21 ms, 400 tokens take 4 iterations; of 12.5, 16 and 200 ms.
    On the idle one they take 84 and 50 ms."""
    cost = LinearCost(host_s=0.001, decode_s=0.001, prefill_s=0.0001)
    loads = [load_of(*[1] * 8, predictor=cost), load_of(predictor=cost)]
    for load in loads:
        load.min_chunk_tokens = 16
    for ttft_s, tpot_s, chosen in ((0.1, 0.021, 0), (0.2, 0.0125, 1), (0.3, 0.0125, 0)):
        slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
        assert Consolidate(headroom=1.0).choose(Incoming(400, slo, None), loads) == chosen


def in_prefill(prompt: int, done: int, cost: LinearCost) -> Load:
    """A pipeline that has computed `done` tokens of its only prompt."""
    load = load_of(prompt, predictor=cost)
    for _ in range(done // 200):
        load.state.apply(Plan(prefills=((0, 200),)), 0.0)
        load.state.commit(0.0)
    return load


@pytest.mark.parametrize("router", [SloAware, Consolidate])
def test_the_tokens_of_a_long_prompt_attend_to_more(router: type) -> None:
    """As many tokens are to come before the request's on both; 300 of 900, or 900, attend to more than nine or
    three times 100 do. By tokens alone the first, in order, would do as well."""
    slo = Slo(ttft_s=0.04, tpot_s=0.02)
    for pair_s, chosen in ((0.0, 0), (2.0**-23, 1)):
        cost = LinearCost(pair_s=pair_s)
        routed, short = load_of(predictor=cost), load_of(*[100] * 9, predictor=cost)
        routed.add(900)
        for deep, shallow in (
            (load_of(900, predictor=cost), short),
            (routed, short),
            (in_prefill(900, 600, cost), load_of(*[100] * 3, predictor=cost)),
        ):
            assert router().choose(Incoming(5, slo, None), [deep, shallow]) == chosen


@pytest.mark.parametrize(("before", "prompt"), [((), 3000), ((700,) * 4, 700), ((2000,), 100)])
@pytest.mark.parametrize("max_tokens", [256, 4096])
def test_a_first_token_is_expected_when_it_comes(
    max_tokens: int, before: tuple[int, ...], prompt: int
) -> None:
    """Beside a decode and behind other prompts, under a policy that fills iterations up to the TPOT bound."""
    cost = LinearCost(pair_s=2.0**-17, decode_s=2.0**-18)
    limits = limits_of(max_tokens=max_tokens, max_sequences=64, kv_tokens=400_000, max_sequence_tokens=20_000)
    slo = SLOS["chat"]
    prompts = [5, *before, prompt]
    requests = [Request(i, 0.02 * (i > 0), n, 1000 if i == 0 else 2, "chat") for i, n in enumerate(prompts)]
    policy = build_policy("coserving", predictor=cost, budget_s=slo.tpot_s, margin=0.0)
    rows = run(policy, requests, limits=limits, world=cost).table("requests")
    waited_s = float(rows["first_token_s"][rows["request"] == len(before) + 1][0]) - 0.02

    state = PipelineState(limits=limits, slos=SLOS, recorder=Recorder())
    state.predicted_s = state.measured_s = 1.0
    state.arrive(requests[0])
    state.apply(Plan(prefills=((0, 5),)), 0.0)
    state.commit(0.02)
    for request in requests[1:-1]:
        state.arrive(request)
    busy = Load(state, cost, policy.min_chunk_tokens)
    for factor, chosen in ((1.25, 0), (0.8, 1)):
        incoming = Incoming(prompt, Slo(ttft_s=factor * waited_s, tpot_s=slo.tpot_s), None, 0.02)
        assert Consolidate().choose(incoming, [busy, load_of()]) == chosen, (waited_s, factor)


@pytest.mark.parametrize("router", [SloAware, Consolidate])
def test_a_request_s_own_prompt_attends_to_itself(router: type) -> None:
    """Both are busy; the second takes longer for a token and nothing for a pair."""
    deep = LinearCost(host_s=2.0**-20, decode_s=0.0, pair_s=2.0**-19)
    flat = LinearCost(host_s=2.0**-20, decode_s=0.0, prefill_s=2.0**-11)
    loads = [load_of(1, predictor=deep), load_of(1, predictor=flat)]
    for prompt, chosen in ((10, 0), (900, 1)):
        request = Incoming(prompt, Slo(ttft_s=1e-6), None)
        assert router().choose(request, loads) == chosen


def test_a_prompt_that_would_be_alone_is_not_cut() -> None:
    """800 tokens in four iterations of 256 take 1.00 s at 1.2 ms a token; in 50 and more of 16, which is more than
    25 ms leave, 1.3 s at 1 ms."""
    fast, slow = (LinearCost(host_s=0.01, prefill_s=s) for s in (0.001, 0.0012))
    loads = [load_of(1, predictor=fast), load_of(predictor=slow), load_of(1, predictor=slow)]
    for load in loads:
        load.min_chunk_tokens = 16
    request = Incoming(800, Slo(tpot_s=0.025), None)
    assert SloAware().choose(request, loads[:2]) == 1
    assert SloAware().choose(request, loads[::2]) == 0


def test_what_a_pipeline_has_taken_is_no_longer_on_its_way() -> None:
    load = load_of(inbox=3)
    assert (load.inbox_requests, load.inbox_tokens, load.inbox_pairs) == (3, 30, 3 * 55)
    load.clear()
    assert (load.inbox_requests, load.inbox_tokens, load.inbox_pairs) == (0, 0, 0)


def test_a_router_learns_from_requests_that_were_served() -> None:
    """Not from one that can never fit. Two prompts of 40 tokens have 2 x 820 pairs."""
    requests = [Request(0, 0.0, 40, 5), Request(1, 0.0, 5000, 9), Request(2, 0.1, 40, 5)]
    state = run(build_policy("inference_only"), requests).state
    assert (state.ended_prompt_tokens, state.ended_prompt_pairs, state.ended_output_tokens) == (80, 1640, 10)


def test_consolidate_expects_iterations_as_long_as_the_tpot_bound_allows() -> None:
    """Two chunks of 0.1 s take twice the bound of 0.4 s; without a bound, 0.2 s."""
    cost = LinearCost(host_s=0.0, decode_s=0.0, prefill_s=0.1 / 255)
    loads = [load_of(200, predictor=cost), load_of(predictor=cost)]
    for tpot_s, chosen in ((0.4, 1), (math.inf, 0)):
        slo = Slo(ttft_s=0.5, tpot_s=tpot_s)
        assert Consolidate().choose(Incoming(200, slo, None), loads) == chosen


def test_consolidate_goes_on_where_the_request_would_wait_for_another_to_end() -> None:
    """With bounds far away: 16 sequences are there, or 95 % of 4096 tokens that can be cached."""
    idle = load_of()
    assert Consolidate().choose(HELLO, [load_of(*[1] * 15), idle]) == 0
    assert Consolidate().choose(HELLO, [load_of(*[1] * 16), idle]) == 1
    assert Consolidate().choose(HELLO, [load_of(*[1] * 8, inbox=8), idle]) == 1
    cached = [1000, 1000, 1000]
    for prompt, chosen in ((891, 0), (892, 1)):
        request = Incoming(prompt, Slo(), None)
        assert Consolidate(headroom=0.95).choose(request, [load_of(*cached), idle]) == chosen


def test_consolidate_prefers_room_where_every_bound_is_broken() -> None:
    """The first has the shorter backlog and no sequence left."""
    hopeless = Incoming(10, Slo(ttft_s=1e-6), None)
    assert Consolidate().choose(hopeless, [load_of(*[1] * 16), load_of(900)]) == 1
    assert Consolidate().choose(hopeless, [load_of(900), load_of(*[1] * 15)]) == 1
    assert Consolidate().choose(hopeless, [load_of(*[1] * 16), load_of(*[50] * 16)]) == 0


def test_a_first_token_waits_for_the_iteration_that_runs() -> None:
    """Launched at 2 s and predicted to take 0.5 s, beside a pipeline whose prefill takes 0.3 s."""
    running = load_of(20)
    running.state.apply(Plan(prefills=((0, 10),), predicted_s=0.5), 2.0)
    slow = load_of(predictor=LinearCost(prefill_s=0.03))
    for arrival_s, chosen in ((2.1, 1), (2.3, 0), (9.0, 0)):
        request = Incoming(10, Slo(ttft_s=1.0), None, arrival_s)
        assert SloAware().choose(request, [running, slow]) == chosen


def test_consolidate_counts_the_prompts_that_take_the_places_of_ended_requests() -> None:
    """Nine decodes of 1 ms take 10 ms; with 10 prompt tokens of 0.1 ms for each token, 19 ms."""
    cost = LinearCost(host_s=0.001, decode_s=0.001, prefill_s=0.0001)
    busy, idle = load_of(*[1] * 8, predictor=cost), load_of(predictor=cost)
    request = Incoming(10, Slo(tpot_s=0.02), None)
    assert Consolidate().choose(request, [busy, idle]) == 0
    busy.state.ended_prompt_tokens, busy.state.ended_output_tokens = 1000, 100
    assert Consolidate(headroom=0.96).choose(request, [busy, idle]) == 0
    assert Consolidate(headroom=0.94).choose(request, [busy, idle]) == 1


@pytest.mark.parametrize(("e2e_s", "consolidate", "slo_aware"), [(math.inf, 0, 0), (2.3, 0, 0), (2.1, 1, 1)])
def test_an_answer_must_end_in_time_where_it_goes_to(e2e_s: float, consolidate: int, slo_aware: int) -> None:
    """Its class has had answers of 100 tokens, of 4 + 9 * 2 ms each beside eight others and of 4 + 2 ms alone; there
    its first token is late, but not by a second."""
    cost = LinearCost(host_s=0.004, decode_s=0.002, prefill_s=2.0**-20)
    busy = Load(run(build_policy("inference_only"), [Request(0, 0.0, 10, 100, "report")]).state, cost)
    busy.state.predicted_s = busy.state.measured_s = 1.0
    for id in range(1, 9):
        busy.state.arrive(Request(id, 1.0, 1, 5))
    idle = load_of(predictor=replace(cost, prefill_s=0.01))
    request = Incoming(10, Slo(name="report", e2e_s=e2e_s), None, arrival_s=busy.state.free_s)
    assert Consolidate().choose(request, [busy, idle]) == consolidate
    assert SloAware().choose(request, [busy, idle]) == slo_aware
    assert Consolidate().choose(request._replace(slo=Slo(name="batch", e2e_s=e2e_s)), [busy, idle]) == 0


def test_consolidate_knows_that_long_prompts_cost_more_for_a_token_than_short_ones() -> None:
    """As above, with 10 prompt tokens of 0.1 ms and 1000 pairs of 1 us, or 500 of 0.5 us, for each of nine tokens: a
    chunk of 247 attends to 124 in the mean at least."""
    cost = LinearCost(host_s=0.001, decode_s=0.001, prefill_s=0.0001, pair_s=1e-6)
    for prompt, longest_ms in ((2000, 109), (200, 30.2)):
        busy, idle = load_of(*[1] * 8, predictor=cost), load_of(predictor=cost)
        state = busy.state
        state.ended_prompt_tokens, state.ended_output_tokens = 10 * prompt, prompt
        state.ended_prompt_pairs = 10 * prompt * (prompt + 1) / 2
        for factor, chosen in ((1.01, 0), (0.99, 1)):
            request = Incoming(1, Slo(tpot_s=factor * 1e-3 * longest_ms), None)
            assert Consolidate().choose(request, [busy, idle]) == chosen, (prompt, factor)


@pytest.mark.parametrize("jobs", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_round_robin_cluster_is_as_many_single_pipelines(lookahead: int, jobs: bool) -> None:
    """Stamps are multiples of 1/1024 s and costs sums of powers of two, so times are exact."""
    requests = [
        r._replace(arrival_s=round(r.arrival_s * 1024) / 1024)
        for r in requests_of(90, rate_rps=30, prompt_tokens=(5, 300), slo="chat")
    ]
    costs = [LinearCost()] * 3
    together = cluster(requests, RoundRobin(), costs, lookahead=lookahead, jobs=jobs)
    for index in range(3):
        alone = cluster(requests[index::3], RoundRobin(), costs[:1], lookahead=lookahead, jobs=jobs)
        for name in ("iterations", "requests", "segments", "ticks", "steps"):
            whole, part = getattr(together, name).arrays(), getattr(alone, name).arrays()
            own = whole["pipeline"] == index
            for column, values in part.items():
                if column != "pipeline":
                    assert np.array_equal(whole[column][own], values, equal_nan=True), (name, column)


@pytest.mark.parametrize("pipelines", [1, 2])
def test_a_request_that_finds_its_pipeline_idle_begins_when_it_comes(pipelines: int) -> None:
    """To the last bit: 0.4662423316993428 and what is left to 1.5132296960910836 add up to another number."""
    times_s = (0.1, 0.4662423316993428, 1.5132296960910836, 3.1)
    requests = [Request(id, time_s, 5, 1, "chat") for id, time_s in enumerate(times_s)]
    rows = cluster(requests, RoundRobin(), [LinearCost()] * pipelines).requests.arrays()
    assert rows["scheduled_s"].tolist() == [*times_s]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_request_is_served_once_by_one_pipeline(router: type, lookahead: int) -> None:
    requests = requests_of(80, rate_rps=40, prompt_tokens=(5, 1100), slo="chat", adapters=(None, "a", "b"))
    rows = cluster(requests, router(), [LinearCost()] * 3, lookahead=lookahead).requests.arrays()
    assert sorted(rows["request"].tolist()) == list(range(80))
    rejected = {r.id for r in requests if r.prompt_tokens >= 1024}
    assert {int(i) for i in rows["request"][rows["outcome"] == Outcome.REJECTED]} == rejected
    used = set(rows["pipeline"].tolist())
    assert len(rejected) > 0 and {0.0, 1.0} <= used <= {0.0, 1.0, 2.0}
    assert router is Consolidate or len(used) == 3


def test_finetune_only_pipelines_reject_every_request() -> None:
    recorder = cluster(
        requests_of(20, rate_rps=10), RoundRobin(), [LinearCost()] * 2, jobs=True, policy="finetune_only"
    )
    rows = recorder.requests.arrays()
    assert rows["outcome"].tolist() == [float(Outcome.REJECTED)] * 20
    assert recorder.iterations.arrays()["decode_count"].sum() == 0
    assert recorder.steps.arrays()["tokens"].sum() == 2 * 40 * 50


@pytest.mark.parametrize("pipelines", [1, 3])
@pytest.mark.parametrize("clients", [1, 5])
def test_a_closed_loop_on_a_cluster_ends_when_its_clients_do(pipelines: int, clients: int) -> None:
    """Without a horizon too: sleeping pipelines must hear that nothing will ever come."""
    source = ClosedLoop(clients=clients, total=20, think_s=0.25)
    rows = cluster(source, RoundRobin(), [LinearCost()] * pipelines).requests.arrays()  # type: ignore[arg-type]
    assert sorted(rows["request"].tolist()) == list(range(20))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("pipelines", [1, 3])
def test_a_clock_that_moves_without_events_changes_nothing(
    pipelines: int, lookahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables() -> list[bytes]:
        source = ClosedLoop(clients=9, total=60, think_s=0.3)
        recorder = cluster(
            source,  # type: ignore[arg-type]
            LeastTokens(),
            [LinearCost()] * pipelines,
            lookahead=lookahead,
            jobs=True,
            horizon=Horizon(duration_s=20.0, drain_s=1.0),
        )
        assert len(recorder.iterations) > 50
        return [t.data.tobytes() for t in (recorder.iterations, recorder.requests, recorder.steps)]

    moved = tables()
    monkeypatch.setattr(Clock, "pass_to", lambda self, time_s: False)
    assert tables() == moved
