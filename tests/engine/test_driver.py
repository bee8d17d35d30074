"""Simulator and engine are one system: with the same durations they decide the same, plan by plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.assemble import assemble_engine
from engine.driver import Driver, EngineArrivals, WallClock
from engine.launching import Launching, SecondStream
from engine.sampling import Sampling
from sim.cluster import PipelineSpec, simulate_cluster
from sim.core.cost import Predictor
from sim.core.finetune import Backward, Forward, Job
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Plan, Policy
from sim.core.request import Request
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.routing import LeastTokens
from tests.engine.golden_log import answered, recorded
from tests.engine.test_streams import Device, Races
from tests.engine.tiny import EngineRun, JobSetup, Watched, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import (
    FINETUNING,
    POLICIES,
    SLOS,
    Contention,
    LinearCost,
    ListArrivals,
    build_policy,
    limits_of,
)

WORLD = LinearCost(forward_s=2.0**-11, backward_s=2.0**-12, context_s=2.0**-16, optimizer_s=2.0**-24)
LENGTHS = (31, 12, 44, 20)


def prompts_of(count: int) -> dict[int, Any]:
    found = {}
    for id in range(count):
        prompt = tokens_of(4 + (id * 13) % 40, seed=id)
        request = Request(id, 0.01 * id, len(prompt), 1 + (id * 5) % 14, "chat")
        found[id] = (request, prompt, Sampling())
    return found


def setup_of(order: str, lengths: Sequence[int] = LENGTHS) -> JobSetup:
    samples = [sample_of(length, seed=n) for n, length in enumerate(lengths)]
    return JobSetup(samples=samples, adapter=adapter_of("llama", 2, ["down_proj"]), order=order)


def equal(a: Recorder, b: Recorder) -> None:
    for name in ("iterations", "requests", "steps", "ticks", "segments"):
        own, other = (np.array(getattr(r, name).data) for r in (a, b))
        assert np.array_equal(own, other, equal_nan=True), name


def simulate(
    policy: Policy,
    world: Predictor,
    predictor: Predictor,
    limits: Limits,
    prompts: dict[int, Any],
    jobs: Sequence[Job],
    horizon: Horizon,
) -> tuple[list[Plan], Recorder]:
    """The simulator's plans and rows."""
    watched, recorder = Watched(policy), Recorder()
    simulate_cluster(
        pipelines=[
            PipelineSpec(policy=watched, world=world, predictor=predictor, limits=limits, jobs=tuple(jobs))
        ],
        arrivals=ListArrivals(request for request, _, _ in prompts.values()),
        router=LeastTokens(),
        slos=SLOS,
        horizon=horizon,
        recorder=recorder,
    )
    return watched.plans, recorder


@pytest.mark.parametrize("order", ["layer_major", "window_major"])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", list(POLICIES))
def test_engine_and_simulator_decide_the_same(name: str, lookahead: int, order: str) -> None:
    limits = limits_of(kv_tokens=128, block_tokens=4, max_sequences=6, max_tokens=24, lookahead=lookahead)
    horizon = Horizon(duration_s=0.7, drain_s=0.5)
    prompts = prompts_of(16) if POLICIES[name].serves else {}
    jobs = [setup_of(order)] if name in FINETUNING else []
    run = EngineRun(
        tiny_model("llama"),
        build_policy(name, predictor=WORLD),
        limits,
        prompts,
        jobs=jobs,
        horizon=horizon,
        world=WORLD,
    )
    simulated = [Job(run.trainers[0].spec, iter(LENGTHS))] if jobs else []
    policy = build_policy(name, predictor=WORLD)
    plans, recorder = simulate(policy, WORLD, WORLD, limits, prompts, simulated, horizon)
    assert len(run.policy.plans) >= 5
    assert run.policy.plans == plans
    equal(run.recorder, recorder)
    rows = run.recorder.requests.arrays()
    for id, generated in zip(rows["request"], rows["generated_tokens"], strict=True):
        assert len(run.tokens[int(id)]) == generated, "every counted token is a real one"


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("order", ["layer_major", "window_major"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_engine_and_simulator_learn_the_same_about_two_streams(
    lookahead: int, order: str, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two streams hide less than predicted, finetuning runs on both at first and on one later. An engine
    with one stream decides as one with two."""
    costs = {"forward_s": 2.0**-11, "backward_s": 2.0**-12, "decode_s": 2.0**-10, "optimizer_s": 2.0**-24}
    predictor, world = Contention(contention=0.5, **costs), Contention(contention=1.2, **costs)
    limits = limits_of(kv_tokens=128, block_tokens=4, max_sequences=6, max_tokens=24, lookahead=lookahead)
    horizon, prompts, lengths = Horizon(duration_s=0.7, drain_s=0.5), prompts_of(16), 5 * LENGTHS

    def policy() -> Policy:
        return build_policy("coserving_slack", predictor=predictor, smoothing=0.5)

    def engine_run(launching: Launching) -> EngineRun:
        return EngineRun(
            tiny_model("llama"),
            policy(),
            limits,
            prompts,
            jobs=[setup_of(order, lengths)],
            horizon=horizon,
            world=world,
            launching=launching,
        )

    if streams == 2:
        device = Device()
        with Races(device).pages(monkeypatch) as races:
            captures = (lambda: lambda body: body) if lookahead else None
            run = engine_run(Launching(captures, SecondStream(device)))
        assert len(races.streams) == 2 and races.found == []
    else:
        run = engine_run(Launching())
    jobs = [Job(run.trainers[0].spec, iter(lengths))]
    plans, recorder = simulate(policy(), world, predictor, limits, prompts, jobs, horizon)
    assert run.policy.plans == plans
    equal(run.recorder, recorder)
    beside = {
        (plan.overlap, type(piece))
        for plan in plans
        if plan.decode or plan.prefills
        for piece in plan.finetune
    }
    assert {(True, Forward), (True, Backward), (False, Forward), (False, Backward)} <= beside


class WallRun:
    """A run of the tiny model on the wall clock."""

    def __init__(
        self, prompts: dict[int, Any], horizon: Horizon, policy: Any, jobs: Any = (), on_token: Any = None
    ) -> None:
        limits = limits_of()
        engine, counted = assemble_engine(
            tiny_model("llama"), limits, [job.of() for job in jobs], on_token=on_token
        )
        self.recorder = Recorder()
        self.log: dict[str, Any] = {}
        state = PipelineState(limits=limits, slos=SLOS, recorder=self.recorder, jobs=counted)
        arrivals = ListArrivals(request for request, _, _ in prompts.values())
        source = EngineArrivals(arrivals, engine, lambda r: prompts[r.id][1:])
        self.loop = recorded(run_loop(state, policy, source, horizon), self.log)
        self.engine = engine
        self.driver = Driver(engine, WallClock())

    def start(self) -> None:
        self.driver.run(self.loop)


@pytest.mark.parametrize("name", ["inference_only", "coserving", "coserving_slack", "temporal_dynamic"])
def test_a_replay_of_the_wall_clocks_times_gives_the_same_plans(name: str) -> None:
    prompts, horizon = prompts_of(8), Horizon(duration_s=60.0)
    jobs = [setup_of("layer_major")] if name in FINETUNING else []
    run = WallRun(prompts, horizon, build_policy(name, predictor=WORLD), jobs)
    run.start()
    rows = run.recorder.requests.arrays()
    assert (rows["outcome"] == Outcome.FINISHED).all() and len(rows["outcome"]) == 8
    assert (rows["first_token_s"] > rows["arrival_s"]).all()
    assert len(run.engine.steps) == 2 * len(jobs)
    ends = run.recorder.iterations.arrays()["end_s"].tolist()
    assert ends == sorted(ends)

    spec = [trainer.spec for trainer in run.engine.trainers.values()]
    counted = [Job(one, iter(LENGTHS)) for one in spec]
    state = PipelineState(limits=limits_of(), slos=SLOS, recorder=Recorder(), jobs=counted)
    arrivals = ListArrivals(request for request, _, _ in prompts.values())
    again = run_loop(state, build_policy(name, predictor=WORLD), arrivals, horizon)
    assert answered(again, run.log["replies"]) == run.log["plans"]
    assert len(run.log["plans"]) == len(ends)


def test_an_aborted_request_stops_and_frees_its_blocks() -> None:
    seen: dict[int, int] = {}

    def on_token(id: int, token: int) -> None:
        seen[id] = seen.get(id, 0) + 1
        if id == 0 and seen[0] == 3:
            run.driver.abort(0)

    prompt = tokens_of(9, seed=1)
    prompts = {id: (Request(id, 0.0, 9, 40), prompt, Sampling()) for id in range(2)}
    run = WallRun(prompts, Horizon(duration_s=20.0), build_policy("inference_only"), on_token=on_token)
    run.start()
    assert seen == {0: 3, 1: 40}
    rows = run.recorder.requests.arrays()
    assert sorted(rows["outcome"].tolist()) == [Outcome.FINISHED, Outcome.ABORTED]
    assert run.engine.tables.free == 256


def test_a_clock_that_sleeps_without_end_comes_back_for_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of one that came just before a wait runs between two waits."""
    clock, waits = WallClock(), list[float]()

    def wait(timeout: float) -> bool:
        waits.append(timeout)
        return len(waits) == 3

    monkeypatch.setattr(clock._woken, "wait", wait)
    clock.sleep(math.inf)
    assert len(waits) == 3 and max(waits) <= 1.0
