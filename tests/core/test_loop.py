"""What the loop does at equal times, when idle, with a lookahead, at early ends and at its horizon."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat

import pytest

from sim.core.loop import Done, Horizon, PolicyError, Sleep, StuckPolicy, Wait, run_loop
from sim.core.plan import Plan, View
from sim.core.request import Request
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.workload import source
from tests.reference import reachable
from tests.support import (
    SERVING,
    SLOS,
    Answer,
    ClosedLoop,
    ConstantCost,
    LinearCost,
    ListArrivals,
    build_policy,
    drive,
    job_of,
    limits_of,
    requests_of,
    run,
    token_times,
)

ONE_S = ConstantCost(seconds=1.0)


class Watching:
    """Keeps the views of another policy, in short."""

    serves = True

    def __init__(self, name: str = "inference_only") -> None:
        self._policy = build_policy(name)
        self.seen: list[tuple[float, int, int, int]] = []

    def plan(self, view: View) -> Plan:
        self.seen.append((view.now_s, view.arrived, view.decode_count, view.running))
        return self._policy.plan(view)


def test_all_arrivals_of_a_moment_are_seen_before_the_plan_at_that_moment() -> None:
    policy = Watching()
    requests = [Request(0, 0.0, 4, 3), Request(1, 1.0, 4, 3), Request(2, 1.0, 4, 3)]
    run(policy, requests, world=ONE_S)
    assert [(now_s, arrived) for now_s, arrived, *_ in policy.seen][:2] == [(0.0, 1), (1.0, 3)]


def test_an_idle_pipeline_sleeps_exactly_until_the_next_arrival_or_job() -> None:
    result = run(
        build_policy("coserving"),
        [Request(0, 7.25, 4, 1)],
        jobs=[job_of([5], start_s=3.5)],
        world=LinearCost(),
    )
    assert result.log.sleeps == [3.5, 7.25]
    assert result.request(0)["scheduled_s"] == 7.25


def test_with_a_lookahead_the_plan_counts_the_running_iteration_as_done() -> None:
    """Request 0 (3 outputs): prefill, tick 1, tick 2. The plan for tick 1 is made while the prefill runs,
    and at the next view it does not decode any more although it still holds its slot."""
    policy = Watching()
    result = run(policy, [Request(0, 0.0, 4, 3)], limits=limits_of(lookahead=1), world=ONE_S)
    assert policy.seen[:4] == [(0.0, 1, 0, 0), (0.0, 1, 1, 1), (1.0, 1, 1, 1), (2.0, 1, 0, 1)]
    assert token_times(result.recorder)[0] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_scheduled_is_the_start_of_the_first_chunk(lookahead: int, chunks: int) -> None:
    limits = limits_of(lookahead=lookahead, max_tokens=16)
    result = run(
        build_policy("inference_only"), [Request(0, 0.5, 16 * chunks, 2)], limits=limits, world=ONE_S
    )
    row = result.request(0)
    assert (row["scheduled_s"], row["first_token_s"]) == (0.5, 0.5 + chunks)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("iteration", range(5))
def test_a_stop_token_at_any_iteration_ends_the_request_there(lookahead: int, iteration: int) -> None:
    """Also at its last token by length, and at the one before, when the last is already launched."""

    def answer(index: int) -> Answer:
        return Answer(ended=(0,)) if index == iteration else Answer()

    limits = limits_of(lookahead=lookahead)
    result = run(
        build_policy("inference_only"), [Request(0, 0.0, 4, 5)], limits=limits, world=ONE_S, answer=answer
    )
    row = result.request(0)
    assert row["outcome"] == Outcome.FINISHED
    assert row["generated_tokens"] == iteration + 1
    assert row["last_token_s"] == iteration + 1.0
    assert token_times(result.recorder)[0] == [float(i + 1) for i in range(iteration + 1)]
    assert result.state.kv.free == result.state.kv.total


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_stop_token_of_a_sequence_preempted_meanwhile_ends_it(lookahead: int) -> None:
    """Two sequences of 3 blocks' growth in 4 blocks: the later is preempted; its token of the iteration that
    ran when this was planned is a stop token."""
    limits = limits_of(kv_tokens=64, lookahead=lookahead)
    requests = [Request(0, 0.0, 30, 20), Request(1, 0.0, 30, 20)]
    plain = run(build_policy("inference_only"), requests, limits=limits, world=ONE_S)
    (first,) = [i for i, plan in enumerate(plain.log.plans) if plan.preempted][:1]

    def answer(index: int) -> Answer:
        return Answer(ended=(1,)) if index == first - 1 else Answer()

    result = run(build_policy("inference_only"), requests, limits=limits, world=ONE_S, answer=answer)
    row = result.request(1)
    assert (row["outcome"], row["generated_tokens"]) == (Outcome.FINISHED, first)
    assert token_times(result.recorder)[1] == [float(i + 1) for i in range(first)]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("iteration", range(8))
def test_an_abort_at_any_iteration_keeps_the_tokens_that_came(lookahead: int, iteration: int) -> None:
    """Request 1 waits for the one slot, prefills in two chunks, decodes and ends."""

    def answer(index: int) -> Answer:
        return Answer(aborted=(1, 99)) if index == iteration else Answer()

    limits = limits_of(lookahead=lookahead, max_sequences=1, max_tokens=16)
    requests = [Request(0, 0.0, 4, 2), Request(1, 0.0, 30, 3), Request(2, 0.0, 4, 2)]
    full = token_times(run(build_policy("inference_only"), requests, limits=limits, world=ONE_S).recorder)
    result = run(build_policy("inference_only"), requests, limits=limits, world=ONE_S, answer=answer)
    end_s = result.log.end_s[iteration]
    came = [t for t in full[1] if t <= end_s]
    row = result.request(1)
    assert row["outcome"] == (Outcome.FINISHED if len(came) == 3 else Outcome.ABORTED)
    assert token_times(result.recorder).get(1, []) == came
    assert row["generated_tokens"] == len(came)
    assert result.request(2)["outcome"] == Outcome.FINISHED
    assert result.state.kv.free == result.state.kv.total


def test_a_policy_that_does_nothing_is_stuck_and_said_to_be() -> None:
    class Lazy:
        serves = True

        def plan(self, view: View) -> Plan:
            return Plan()

    for horizon in (Horizon(), Horizon(duration_s=10.0)):
        with pytest.raises(StuckPolicy, match=r"Lazy at 0\.000000 s: .* 1 waiting"):
            run(Lazy(), [Request(0, 0.0, 4, 3)], horizon=horizon)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda view: {}["key"], "KeyError: 'key'"),
        (lambda view: None, r"TypeError: plan\(\) returned None"),
        (lambda view: 42, r"TypeError: plan\(\) returned 42, not a Plan"),
        (lambda view: Plan(prefills=((99, 4),)), "IllegalPlan: sequence 99 is neither prefilling"),
    ],
)
def test_whatever_goes_wrong_in_a_policy_is_told_with_its_name_and_the_time(
    answer: Callable[[View], Plan], cause: str
) -> None:
    class Broken:
        serves = True

        def plan(self, view: View) -> Plan:
            return answer(view) if len(view.waiting) else Plan()

    with pytest.raises(PolicyError, match=f"Broken at 2.000000 s: {cause}") as told:
        run(Broken(), [Request(0, 2.0, 4, 3)])
    assert told.value.__cause__ is not None


@pytest.mark.parametrize("lookahead", [0, 1])
def test_at_the_horizon_requests_drain_and_what_is_left_is_unfinished(lookahead: int) -> None:
    """100 s of work arrive by 10 s; 5 s more are given."""
    requests = [Request(i, float(i), 4, 50) for i in range(10)]
    horizon = Horizon(duration_s=10.0, drain_s=5.0)
    limits = limits_of(max_sequences=1, lookahead=lookahead)
    result = run(build_policy("inference_only"), requests, limits=limits, world=ONE_S, horizon=horizon)
    assert 15.0 <= result.log.end_s[-1] <= 15.0 + 1 + lookahead
    assert set(result.outcomes().values()) == {Outcome.UNFINISHED}
    assert result.request(0)["generated_tokens"] == len(result.log.plans)
    assert result.request(9)["generated_tokens"] == 0 and math.isnan(result.request(9)["first_token_s"])


def test_finetuning_goes_on_while_requests_drain_and_stops_then() -> None:
    result = run(
        build_policy("coserving_static"),
        [Request(0, 9.5, 4, 10)],
        jobs=[job_of(100)],
        world=ONE_S,
        horizon=Horizon(duration_s=10.0),
    )
    assert result.log.end_s[-1] == 20.0
    assert all(plan.finetune for plan in result.log.plans)


def test_requests_after_the_horizon_do_not_arrive() -> None:
    """`Horizon`: requests arrive until `duration_s`. A source that goes on must not keep the run alive."""
    requests = [Request(i, 0.5 * i, 4, 10) for i in range(200)]
    result = run(
        build_policy("inference_only"), requests, world=ONE_S, horizon=Horizon(duration_s=10.0, drain_s=50.0)
    )
    assert result.table("requests")["arrival_s"].max() <= 10.0
    assert result.log.end_s[-1] < 25.0


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_closed_loop_clients_send_all_their_requests(name: str, lookahead: int) -> None:
    for think_s in (0.0, 0.7):
        recorder = Recorder()
        state = PipelineState(limits=limits_of(lookahead=lookahead), slos=SLOS, recorder=recorder)
        clients = ClosedLoop(clients=3, total=20, think_s=think_s)
        loop = run_loop(state, build_policy(name), clients, Horizon())
        drive(loop, lambda _, work: LinearCost().iteration_s(work))
        assert clients.sent == 20 and recorder.requests.arrays()["outcome"].tolist() == [0.0] * 20


@pytest.mark.parametrize("late_s", [0.0, 0.01])
@pytest.mark.parametrize("beside", [0, 1])
def test_a_client_that_is_refused_asks_again_after_its_pause_whatever_runs_beside_it(
    beside: int, late_s: float
) -> None:
    """A prompt that can never fit ends when it arrives, not when an iteration does or a late clock looks."""
    recorder = Recorder()
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=recorder)
    clients = source.ClosedLoop(
        clients=1 + beside,
        draws=lambda client: repeat((4 if client else 10**6, 100, "default", None, 0.0)),
        duration_s=5.0,
        ramp_s=0.0,
        retry_s=0.375,
        max_requests=math.inf,
    )
    loop = run_loop(state, build_policy("inference_only"), clients, Horizon(duration_s=5.0, drain_s=0.0))
    now_s, reply = 0.0, None
    with suppress(StopIteration):
        while True:
            command = loop.send(reply)  # type: ignore[arg-type]
            if isinstance(command, Sleep):
                now_s = command.until_s + late_s
            elif isinstance(command, Wait):
                now_s += 1.0
            reply = Done(now_s)
    rows = recorder.requests.arrays()
    refused_s = rows["arrival_s"][rows["outcome"] == Outcome.REJECTED]
    assert refused_s.tolist() == [0.375 * n for n in range(14)]


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_a_request_without_prompt_or_output_is_refused_not_hung(lengths: tuple[int, int]) -> None:
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder())
    with pytest.raises(ValueError, match="at least 1"):
        state.arrive(Request(0, 0.0, *lengths))


def test_an_iteration_without_inference_uses_no_adapters() -> None:
    """`Work.adapters`: distinct adapters among the inference tokens."""
    requests = [Request(0, 0.0, 4, 30, "default", "a")]
    result = run(build_policy("temporal", interval=2), requests, jobs=[job_of([50] * 4)], horizon=Horizon())
    alone = [w for w in result.log.works if not w.prefill and not w.decode_count]
    assert alone and all(work.adapters == 0 for work in alone)


def test_a_request_whose_last_token_is_on_its_way_uses_no_adapter_any_more() -> None:
    """With a lookahead it is still here while the next iteration is planned; one beside it goes on."""
    requests = [Request(0, 0.0, 4, 3, "default", "a"), Request(1, 0.0, 4, 9)]
    result = run(build_policy("inference_only"), requests, limits=limits_of(lookahead=1))
    assert [work.adapters for work in result.log.works] == [1] * 3 + [0] * 6


def test_policies_cannot_see_how_long_an_answer_will_be() -> None:
    """Nothing that ordinary attributes of a view lead to has `output_tokens` or the request itself."""

    class Looking(Watching):
        def plan(self, view: View) -> Plan:
            for one in reachable(tuple(view)):
                assert not isinstance(one, Request | PipelineState)
                assert not hasattr(one, "output_tokens")
            return super().plan(view)

    policy = Looking()
    run(policy, requests_of(20, rate_rps=50), jobs=[], limits=limits_of(kv_tokens=400))
    assert len(policy.seen) > 20


def test_the_end_of_a_run_releases_every_block() -> None:
    result = run(
        build_policy("inference_only"),
        [Request(0, 0.0, 100, 50), Request(1, 1.0, 300, 50)],
        limits=limits_of(max_tokens=16),
        world=ONE_S,
        horizon=Horizon(duration_s=9.0, drain_s=0.0),
    )
    assert result.state.kv.free == result.state.kv.total


def test_arrivals_are_told_of_every_end_once() -> None:
    arrivals = ListArrivals([*requests_of(10, rate_rps=50), Request(10, 0.1, 5000, 1)])
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder())
    drive(
        run_loop(state, build_policy("inference_only"), arrivals, Horizon()),
        lambda *_: 0.01,
        answer=lambda index: Answer(aborted=(3,)) if index == 40 else Answer(),
    )
    assert sorted(arrivals.ended_ids) == list(range(11))


def test_a_pipeline_is_free_when_what_was_launched_is_expected_to_end() -> None:
    """By its prediction, or where there is none as long as the last one took."""
    state = PipelineState(limits=limits_of(lookahead=1), slos=SLOS, recorder=Recorder())
    assert state.free_s == -math.inf
    state.arrive(Request(0, 0.0, 20, 9))
    state.apply(Plan(prefills=((0, 10),), predicted_s=0.5), 2.0)
    assert state.free_s == 2.5
    state.apply(Plan(prefills=((0, 10),)), 2.125)
    assert state.free_s == 2.5
    state.commit(2.75)
    assert state.free_s == 2.75 + 0.75
    assert (state.predicted_s, state.measured_s) == (0.5, 0.75)
    state.commit(3.0)
    assert state.free_s == 3.0
    assert (state.predicted_s, state.measured_s) == (0.5, 0.75)
