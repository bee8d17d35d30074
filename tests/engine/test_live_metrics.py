"""What a server says of itself, against the same rows summed up as those of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.live_metrics import COUNTERS, EDGES_S, GAUGES, HISTOGRAMS, Histogram, LiveMetrics
from sim.core.request import Request, Slo
from sim.core.rows import ITERATION_COLUMNS, STEP_COLUMNS, Outcome, Recorder
from sim.metrics import summarize

SLO = Slo(ttft_s=0.5, tpot_s=0.05, e2e_s=10.0)
STATE: Any = SimpleNamespace(
    running={1: None, 2: None}, waiting=SimpleNamespace(count=3), kv=SimpleNamespace(total=50, free=40)
)


def recorded(count: int = 400) -> Recorder:
    random = np.random.default_rng(3)
    recorder = Recorder()
    for id in range(count):
        tokens = int(random.integers(1, 40))
        arrival_s, ttft_s, tpot_s = id / 7, float(random.exponential(0.2)), float(random.exponential(0.03))
        ended = random.random() < 0.8
        recorder.add_request(
            Request(id, arrival_s, 5, tokens),
            0,
            Outcome.FINISHED if ended else Outcome(int(random.integers(1, len(Outcome)))),
            scheduled_s=arrival_s,
            first_token_s=arrival_s + ttft_s,
            last_token_s=arrival_s + ttft_s + (tokens - 1) * tpot_s if ended else None,
            generated_tokens=tokens,
        )
    return recorder


def values_of(text: str) -> dict[str, float]:
    lines = [line.rsplit(maxsplit=1) for line in text.splitlines() if not line.startswith("#")]
    assert len({name for name, _ in lines}) == len(lines)
    return {name: float(value) for name, value in lines}


def test_latencies_and_attainment_are_those_of_a_run() -> None:
    recorder = recorded()
    wanted = summarize(recorder, slos={"default": SLO}, duration_s=60.0)
    metrics = LiveMetrics(SLO)
    metrics.add(recorder, STATE)
    values = values_of(metrics.text())
    assert values["coserve_requests_attained_total"] / 400 == wanted["attainment"]
    assert 0.1 < wanted["attainment"] < 0.9  # type: ignore[operator]
    for key, name in HISTOGRAMS.items():
        own = metrics.latency[key]
        for share, percentile in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
            assert own.percentile_s(share) == pytest.approx(wanted[f"{key}_{percentile}_s"], rel=0.06), key
        mean_s = values[f"{name}_sum"] / values[f"{name}_count"]
        assert mean_s == pytest.approx(wanted[f"{key}_mean_s"], rel=1e-6)
    assert values["coserve_e2e_request_latency_seconds_count"] == wanted["finished"]
    assert metrics.describe() is not None and f"{100 * wanted['attainment']:.1f} %" in metrics.describe()  # type: ignore[operator]


def test_parts_add_up() -> None:
    whole, parts = LiveMetrics(SLO), LiveMetrics(SLO)
    recorder = recorded()
    whole.add(recorder, STATE)
    rows = list(recorder.requests.arrays().values())
    for part in (slice(0, 150), slice(150, 400)):
        one = Recorder()
        one.slos.code("default")
        for row in zip(*(column[part] for column in rows), strict=True):
            one.requests.append(row)
        parts.add(one, STATE)
    assert parts.text() == whole.text()


def test_everything_that_was_recorded_is_counted() -> None:
    recorder = Recorder()
    for tokens in (3, 4):
        row = {"prefill_tokens": tokens, "sampled_tokens": tokens + 1, "forward_tokens": tokens + 2}
        recorder.iterations.append([row.get(name, 0) for name in ITERATION_COLUMNS])
    for failed in (0, 0, 1):
        row = {"tokens": 10 * (1 - failed), "failed": failed}
        recorder.steps.append([row.get(name, 0) for name in STEP_COLUMNS])
    for outcome, count in ((Outcome.FINISHED, 4), (Outcome.REJECTED, 3), (Outcome.ABORTED, 2)):
        for _ in range(count):
            recorder.add_request(Request(1, 0.0, 3, 9), 0, outcome)
    recorder.add_request(Request(1, 0.0, 3, 9), 0, Outcome.UNFINISHED)
    metrics = LiveMetrics(SLO)
    metrics.add(recorder, STATE)
    found = (4, 3, 2, 1, 0, 7, 9, 11, 20, 2, 1, 2, 2, 3, 10)
    assert metrics.counts == dict(zip((*COUNTERS, *GAUGES), found, strict=True))


def test_prometheus_is_told_the_kind_of_each_and_buckets_that_only_grow() -> None:
    metrics = LiveMetrics(SLO)
    assert metrics.describe() is None
    metrics.add(recorded(), STATE)
    text = metrics.text()
    kinds = dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE"))
    assert kinds["coserve_running"] == "gauge" and kinds["coserve_iterations_total"] == "counter"
    for name in HISTOGRAMS.values():
        assert kinds[name] == "histogram"
        buckets = [value for key, value in values_of(text).items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == values_of(text)[f"{name}_count"]
    assert text.endswith("\n") and "\n\n" not in text


def test_a_second_on_an_edge_is_within_it_and_what_is_beyond_all_is_counted() -> None:
    histogram = Histogram()
    assert np.isnan(histogram.percentile_s(0.5))
    histogram.add(np.array([0.0, 1.0, 1.01, 1e9, np.nan]))
    values = values_of("\n".join(histogram.lines("s")))
    assert values['s_bucket{le="1"}'] == 2 and values['s_bucket{le="1.585"}'] == 3
    assert values['s_bucket{le="1e+04"}'] == 3 and values['s_bucket{le="+Inf"}'] == values["s_count"] == 4
    assert histogram.percentile_s(0.25) == EDGES_S[0] and histogram.percentile_s(1.0) == EDGES_S[-1]
    assert histogram.percentile_s(0.5) == pytest.approx(1.0)
