"""The loop against queueing theory: M/D/1 waiting times, and Little's law on every run."""

from __future__ import annotations

import numpy as np
import pytest

from sim.core.request import Request
from tests.support import (
    POLICIES,
    SERVING,
    ConstantCost,
    Run,
    build_policy,
    job_of,
    limits_of,
    requests_of,
    run,
)

SERVICE_S = 0.5


def test_one_slot_with_constant_service_waits_as_an_m_d_1_queue() -> None:
    """Poisson arrivals at rate r and one server that takes D seconds: the mean wait is
    r D^2 / (2 (1 - r D)) (Pollaczek-Khinchine). At a load of 0.5, 60,000 requests put the standard error of
    the mean below 1.5 %. The same waits follow request by request from Lindley's recursion."""
    load = 0.5
    requests = requests_of(60_000, rate_rps=load / SERVICE_S, prompt_tokens=1, output_tokens=1, seed=1)
    limits = limits_of(max_sequences=1)
    result = run(
        build_policy("inference_only"), requests, limits=limits, world=ConstantCost(seconds=SERVICE_S)
    )
    rows = result.table("requests")
    waits_s = rows["scheduled_s"] - rows["arrival_s"]

    lindley_s = np.zeros(len(requests))
    gaps_s = np.diff([r.arrival_s for r in requests])
    for i, gap_s in enumerate(gaps_s):
        lindley_s[i + 1] = max(0.0, lindley_s[i] + SERVICE_S - gap_s)
    assert waits_s == pytest.approx(lindley_s, abs=1e-6)
    theory_s = load * SERVICE_S / (2 * (1 - load))
    assert waits_s.mean() == pytest.approx(theory_s, rel=0.03)


def number_in_system_area(result: Run) -> float:
    """Integral over time of the requests in the system, from events in order of time."""
    rows = result.table("requests")
    events = [(t, 1) for t in rows["arrival_s"].tolist()] + [(t, -1) for t in rows["last_token_s"].tolist()]
    area, inside, before_s = 0.0, 0, 0.0
    for time_s, change in sorted(events):
        area += inside * (time_s - before_s)
        inside, before_s = inside + change, time_s
    assert inside == 0
    return area


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", SERVING)
def test_littles_law_and_the_recorded_concurrency(name: str, lookahead: int) -> None:
    """Over a drained run the time integral of the number in the system is the sum of times in the system;
    what the iterations table says was running and waiting never exceeds it."""
    requests = requests_of(60, rate_rps=8, prompt_tokens=(5, 90), output_tokens=(1, 40), seed=3)
    jobs = [] if name == "inference_only" else [job_of([60, 90, 30])]
    result = run(build_policy(name), requests, jobs=jobs, limits=limits_of(lookahead=lookahead))
    rows, iterations = result.table("requests"), result.table("iterations")
    times_s = rows["last_token_s"] - rows["arrival_s"]
    area = number_in_system_area(result)
    assert area == pytest.approx(times_s.sum(), rel=1e-12)
    inside = iterations["running"] + iterations["waiting"]
    busy_area = (inside * (iterations["end_s"] - iterations["start_s"])).sum()
    # Planning sees arrivals at the start of an iteration only; with a lookahead, one iteration earlier.
    longest_s = (iterations["end_s"] - iterations["start_s"]).max()
    assert busy_area == pytest.approx(area, abs=(1 + lookahead) * longest_s * len(requests))


def test_iterations_of_a_pipeline_never_overlap() -> None:
    for lookahead in (0, 1):
        requests = requests_of(50, rate_rps=20, seed=4)
        rows = run(
            build_policy("coserving"),
            requests,
            jobs=[job_of([80] * 5)],
            limits=limits_of(lookahead=lookahead),
        ).table("iterations")
        assert (rows["start_s"][1:] >= rows["end_s"][:-1]).all()
        assert (rows["end_s"] > rows["start_s"]).all()


@pytest.mark.parametrize("name", list(POLICIES))
def test_same_input_same_bytes(name: str) -> None:
    def once() -> list[bytes]:
        requests: list[Request] = []
        if POLICIES[name].serves:
            requests = requests_of(
                40, rate_rps=20, prompt_tokens=(5, 200), adapters=(None, "job"), slo="chat"
            )
        jobs = [] if name == "inference_only" else [job_of([70, 200, 33], accumulation=2)]
        recorder = run(build_policy(name), requests, jobs=jobs).recorder
        tables = (recorder.iterations, recorder.requests, recorder.segments, recorder.ticks, recorder.steps)
        return [table.data.tobytes() for table in tables]

    assert once() == once()
