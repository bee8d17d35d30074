"""Sources hand out every request once, when it is due, in order."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.core.request import Request
from sim.workload.config import Closed
from sim.workload.lengths import Fixed, Independent, Lognormal
from sim.workload.mix import AdapterMix
from sim.workload.source import BLOCK_ROWS, ClosedLoop, TableArrivals
from sim.workload.table import RequestTable

LENGTHS = Independent(
    prompt=Lognormal(quantiles={"p50": 100, "p90": 400}, max_tokens=4000), output=Fixed(tokens=7)
)


def random_table(count: int, seed: int = 0) -> RequestTable:
    rng = np.random.default_rng(seed)
    return RequestTable(
        duration_s=100.0,
        arrival_s=np.sort(rng.integers(0, 200, count) / 2),
        prompt_tokens=rng.integers(1, 99, count),
        output_tokens=rng.integers(1, 99, count),
        slo=rng.integers(0, 2, count),
        slo_names=("a", "b"),
        adapter=rng.integers(0, 3, count),
        adapter_names=("", "x", "y"),
    )


@settings(max_examples=30)
@given(st.integers(1, 3 * BLOCK_ROWS), st.lists(st.floats(0, 120), max_size=20))
def test_due_hands_out_each_request_once_in_order_and_no_earlier(count: int, times_s: list[float]) -> None:
    table = random_table(count)
    expected = [
        Request(i, float(t), int(p), int(o), ("a", "b")[s], (None, "x", "y")[a])
        for i, (t, p, o, s, a) in enumerate(
            zip(
                table.arrival_s,
                table.prompt_tokens,
                table.output_tokens,
                table.slo,
                table.adapter,
                strict=True,
            )
        )
    ]
    source, taken = TableArrivals(table), []
    for now_s in [*sorted(times_s), 100.0]:
        new = list(source.due(now_s))
        assert all(r.arrival_s <= now_s for r in new)
        taken += new
        left = [r.arrival_s for r in expected[len(taken) :]]
        assert source.next_s() == (left[0] if left else None)
        assert all(t > now_s for t in left)
    assert taken == expected


def test_nothing_due_is_one_shared_empty_tuple() -> None:
    source = TableArrivals(random_table(3))
    first_s = source.next_s()
    assert first_s is not None
    assert source.due(first_s - 1e-9) is source.due(first_s - 1e-9) == ()
    source.ended(0, 1.0)
    assert len(source.due(math.inf)) == 3
    assert len(source.due(math.inf)) == 0


def test_half_a_million_requests_never_exist_at_once() -> None:
    count = 500_000
    ones = np.ones(count, np.int64)
    table = RequestTable(duration_s=count, arrival_s=np.arange(count), prompt_tokens=ones, output_tokens=ones)
    source = TableArrivals(table)
    tracemalloc.start()
    seen = sum(len(source.due(float(now_s))) for now_s in range(0, count // 50, 10))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count // 50 - 9
    assert peak_bytes < 2**20


def run_closed(source: ClosedLoop, service_s: float, end_s: float) -> tuple[list[Request], list[float], int]:
    """Serve every request in `service_s`, all at once; (requests, end times, most in flight)."""
    in_flight: list[tuple[float, int]] = []
    requests, ends_s, most, now_s = [], [], 0, 0.0
    while now_s <= end_s:
        for request in source.due(now_s):
            requests.append(request)
            in_flight.append((request.arrival_s + service_s, request.id))
        most = max(most, len(in_flight))
        in_flight.sort()
        upcoming = source.next_s()
        candidates = [t for t in (upcoming, in_flight[0][0] if in_flight else None) if t is not None]
        if not candidates or min(candidates) == math.inf:
            break
        now_s = min(candidates)
        while in_flight and in_flight[0][0] <= now_s:
            end, request_id = in_flight.pop(0)
            source.ended(request_id, end)
            ends_s.append(end)
    return requests, ends_s, most


def closed(**more: object) -> Closed:
    return Closed(**({"name": "closed", "clients": 5, "lengths": LENGTHS, "duration_s": 100.0} | more))


def test_a_closed_loop_has_one_request_per_client_and_cycles_in_service_plus_think() -> None:
    source = closed(think_s=2.0, think="constant").build(0, ["default"]).arrivals()
    requests, _, most = run_closed(source, 3.0, 1000)
    assert most == 5
    # Cycles start at 0, 5, ..., 95.
    assert len(requests) == 5 * 20
    assert [r.id for r in requests] == list(range(100))
    assert max(r.arrival_s for r in requests) == 95.0
    assert source.next_s() is None


def test_closed_loop_throughput_is_clients_over_mean_cycle() -> None:
    """Interactive response time law: X = N / (R + Z), here with random think times of mean Z."""
    source = closed(clients=40, think_s=2.0, duration_s=2000.0).build(1, ["default"]).arrivals()
    requests, _, most = run_closed(source, 3.0, 3000)
    # A client's cycles are independent with sd 2 s around 5 s; their count in T has sd
    # sqrt(T * 4 / 5**3) = 8 (renewal theory), of 40 clients 50: 4 of them in 16,000.
    assert abs(len(requests) - 40 * 2000 / 5) < 4 * 50 + 40
    assert most <= 40


def test_a_closed_loop_says_inf_while_all_wait_and_none_after_the_end() -> None:
    source = closed(clients=2, duration_s=10.0).build(0, ["default"]).arrivals()
    first = source.due(0.0)
    assert [r.id for r in first] == [0, 1]
    assert source.next_s() == math.inf
    assert source.due(5.0) == ()
    source.ended(0, 6.0)
    assert source.next_s() == 6.0
    source.ended(1, 11.0)
    assert [r.arrival_s for r in source.due(12.0)] == [6.0]
    source.ended(2, 12.0)
    assert source.next_s() is None


def test_a_refused_request_lets_time_pass_before_the_next() -> None:
    source = closed(clients=1, think_s=0.0, retry_s=0.5, duration_s=2.0).build(0, ["default"]).arrivals()
    sent, now_s = 0, 0.0
    while (upcoming := source.next_s()) is not None:
        now_s = upcoming
        for request in source.due(now_s):
            sent += 1
            source.ended(request.id, now_s)
        assert sent < 10
    assert sent == 4


def test_what_a_client_asks_does_not_depend_on_how_fast_it_is_served() -> None:
    build = closed(think_s=1.0, adapters=AdapterMix(count=3)).build(7, ["a", "b"])
    fast, slow = (run_closed(build.arrivals(), service_s, 1000)[0] for service_s in (0.1, 4.0))
    # Requests of one client, recognised by draws in its own order, are a prefix of one another's.
    assert {r.prompt_tokens for r in slow} <= {r.prompt_tokens for r in fast}
    assert sorted(r.prompt_tokens for r in slow[:5]) == sorted(r.prompt_tokens for r in fast[:5])
    assert len(fast) > 2 * len(slow)


def test_ramp_and_max_requests_of_a_closed_loop() -> None:
    source = closed(ramp_s=10.0, max_requests=7).build(0, ["default"]).arrivals()
    requests, _, _ = run_closed(source, 1000.0, 50)
    assert [r.arrival_s for r in requests] == [0, 2, 4, 6, 8]
    source = closed(ramp_s=10.0, max_requests=7).build(0, ["default"]).arrivals()
    assert len(run_closed(source, 1.0, 1000)[0]) == 7
    assert source.next_s() is None


@pytest.mark.parametrize(
    "bad",
    [{"clients": 0}, {"clients": 2.5}, {"think_s": -1}, {"think": "long"}, {"ramp_s": 101}, {"retry_s": 0}],
)
def test_a_closed_loop_refuses_impossible_settings(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"workload.{next(iter(bad))} must be"):
        closed(**bad)
