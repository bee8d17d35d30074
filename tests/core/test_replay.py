"""A run is its decisions and its times: replayed from its own recorded end times it decides identically."""

from __future__ import annotations

import numpy as np
import pytest

from sim.core.loop import Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Plan
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from tests.support import (
    POLICIES,
    SLOS,
    LinearCost,
    ListArrivals,
    build_policy,
    drive,
    job_of,
    limits_of,
    requests_of,
)


def replay(loop, end_s: list[float]) -> list[Plan]:  # type: ignore[no-untyped-def]
    """Answer every Wait with the next recorded time; no cost model, no clock."""
    plans, ends, reply = [], iter(end_s), None
    while True:
        try:
            command = loop.send(reply)
        except StopIteration:
            return plans
        if isinstance(command, Execute):
            plans.append(command.plan)
            reply = Done(0.0)
        else:
            reply = Done(command.until_s if isinstance(command, Sleep) else next(ends))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", list(POLICIES))
def test_a_replay_of_recorded_times_makes_the_same_plans(name: str, lookahead: int) -> None:
    """The first run's durations carry noise that no model could give back; the replay only knows them."""

    def fresh() -> tuple[Recorder, object]:
        recorder = Recorder()
        jobs = [] if name == "inference_only" else [job_of(50), job_of([300, 20], id="late", start_s=0.2)]
        limits = limits_of(lookahead=lookahead, kv_tokens=600)
        state = PipelineState(limits=limits, slos=SLOS, recorder=recorder, jobs=jobs)
        serves = POLICIES[name].serves
        requests = requests_of(40, rate_rps=25, prompt_tokens=(5, 200), slo="chat") if serves else []
        return recorder, run_loop(state, build_policy(name), ListArrivals(requests), Horizon(duration_s=4.0))

    random, world = np.random.default_rng(5), LinearCost()
    recorder, loop = fresh()
    log = drive(loop, lambda _, work: world.iteration_s(work) * float(random.lognormal(0.0, 0.3)))
    recorded = recorder.iterations.arrays()["end_s"].tolist()
    assert recorded == log.end_s and len(recorded) > 50
    again, loop = fresh()
    assert replay(loop, recorded) == log.plans
    assert again.iterations.data == recorder.iterations.data or np.array_equal(
        np.array(again.iterations.data), np.array(recorder.iterations.data), equal_nan=True
    )
    assert again.requests.data.tobytes() == recorder.requests.data.tobytes()
