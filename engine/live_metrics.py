"""What a server says of itself while it runs: counters, gauges and histograms for Prometheus, and a line at its end.

A server runs without end, so latencies are counted in steps of a fixed width and nothing of a request is kept. What
they mean, and when a request met its SLO, is said by `sim.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sim.core.request import Slo
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState
from sim.metrics import attained, latencies

OUTCOMES = {outcome: f"coserve_requests_{outcome.name.lower()}_total" for outcome in Outcome}
ATTAINED = "coserve_requests_attained_total"
"""Requests that finished within every bound of the SLO."""
COUNTERS = (
    *OUTCOMES.values(),
    ATTAINED,
    "coserve_prompt_tokens_total",
    "coserve_generated_tokens_total",
    "coserve_finetune_forward_tokens_total",
    "coserve_finetune_trained_tokens_total",
    "coserve_finetune_steps_total",
    "coserve_finetune_jobs_failed_total",
    "coserve_iterations_total",
)
GAUGES = ("coserve_running", "coserve_waiting", "coserve_kv_blocks_used")
HISTOGRAMS = {
    "ttft": "coserve_time_to_first_token_seconds",
    "tpot": "coserve_time_per_output_token_seconds",
    "e2e": "coserve_e2e_request_latency_seconds",
}
"""Latency of finished requests -> its name."""

PER_DECADE, COARSE = 100, 20
EDGES_S = 10.0 ** (np.arange(-4 * PER_DECADE, 4 * PER_DECADE + 1) / PER_DECADE)
"""From 0.1 ms to 10,000 s in steps of 2.3 %; every COARSE-th is a bucket of Prometheus."""


class Histogram:
    """Counts of seconds between EDGES_S, each edge included below."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(EDGES_S) + 1, dtype=np.int64)
        self._sum_s = 0.0

    def add(self, seconds: NDArray[np.float64]) -> None:
        """Those that are NaN never came."""
        seconds = seconds[~np.isnan(seconds)]
        self._counts += np.bincount(np.searchsorted(EDGES_S, seconds), minlength=len(self._counts))
        self._sum_s += float(seconds.sum())

    def percentile_s(self, share: float) -> float:
        """Upper edge of the step in which the smallest `share` of them end; NaN without any."""
        below = self._counts.cumsum()
        if not below[-1]:
            return float("nan")
        step = int(np.searchsorted(below, share * below[-1]))
        return float(EDGES_S[min(step, len(EDGES_S) - 1)])

    def lines(self, name: str) -> Iterator[str]:
        below = self._counts.cumsum()
        yield f"# TYPE {name} histogram"
        for n in range(0, len(EDGES_S), COARSE):
            yield f'{name}_bucket{{le="{EDGES_S[n]:.4g}"}} {below[n]}'
        yield f'{name}_bucket{{le="+Inf"}} {below[-1]}'
        yield f"{name}_sum {self._sum_s:.9g}"
        yield f"{name}_count {below[-1]}"


class LiveMetrics:
    """All of them, since the start."""

    def __init__(self, slo: Slo) -> None:
        """`slo` is that of all requests."""
        self._slo = slo
        self.counts: dict[str, int] = dict.fromkeys((*COUNTERS, *GAUGES), 0)
        """Name of a counter or gauge -> value."""
        self.latency = {key: Histogram() for key in HISTOGRAMS}

    def add(self, recorder: Recorder, state: PipelineState) -> None:
        """What was recorded since the last call, and what is there now."""
        requests, iterations, steps = (
            table.arrays() for table in (recorder.requests, recorder.iterations, recorder.steps)
        )
        latency_s = latencies(requests)
        counts = self.counts
        for outcome, name in OUTCOMES.items():
            counts[name] += int((requests["outcome"] == outcome).sum())
        # All are of one class, whose code is 0.
        counts[ATTAINED] += int(attained(requests, latency_s, [self._slo]).sum())
        finished = requests["outcome"] == Outcome.FINISHED
        for key, histogram in self.latency.items():
            histogram.add(latency_s[key][finished])
        counts["coserve_prompt_tokens_total"] += int(iterations["prefill_tokens"].sum())
        counts["coserve_generated_tokens_total"] += int(iterations["sampled_tokens"].sum())
        counts["coserve_finetune_forward_tokens_total"] += int(iterations["forward_tokens"].sum())
        counts["coserve_finetune_trained_tokens_total"] += int(steps["tokens"].sum())
        counts["coserve_finetune_steps_total"] += int((steps["failed"] == 0).sum())
        counts["coserve_finetune_jobs_failed_total"] += int(steps["failed"].sum())
        counts["coserve_iterations_total"] += len(iterations["end_s"])
        kv = state.kv
        now = len(state.running), state.waiting.count, kv.total - kv.free
        counts.update(zip(GAUGES, now, strict=True))

    def text(self) -> str:
        """As Prometheus reads them."""
        lines = []
        for name, value in self.counts.items():
            lines += [f"# TYPE {name} {'gauge' if name in GAUGES else 'counter'}", f"{name} {value}"]
        for key, name in HISTOGRAMS.items():
            lines += self.latency[key].lines(name)
        return "\n".join([*lines, ""])

    def describe(self) -> str | None:
        """How those that ended were served, for people; None if none did."""
        ended = sum(self.counts[name] for name in OUTCOMES.values())
        if not ended:
            return None
        parts = []
        for key in ("ttft", "tpot"):
            half_s, most_s = (self.latency[key].percentile_s(share) for share in (0.5, 0.99))
            if half_s == half_s:
                parts.append(f"{key.upper()} p50 {1e3 * half_s:.3g} ms, p99 {1e3 * most_s:.3g} ms")
        # Rounded down, as in tables: 100.0 is all.
        share = self.counts[ATTAINED] * 1000 // ended / 10
        return "; ".join([f"{share:.1f} % of the requests met the SLO", *parts])
