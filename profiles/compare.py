"""Measured against predicted: the numbers of `coserve validate`.

A statistic is compared with its own counterpart (the measured p95 with the predicted p95), not request by
request: which of two requests is preempted hangs on a block more or less, and then their times change places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.vllm.replay import Replay
from sim.vllm.run import MeasuredRequests, RunFolder

Floats = NDArray[np.float64]

PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}
SERIES = ("prompt_tok_s", "gen_tok_s", "running", "waiting")


class Figure(NamedTuple):
    """One statistic of one latency, or the throughput."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the measured one."""
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else math.inf
        return self.predicted / self.measured - 1


class Latencies(NamedTuple):
    """Seconds, each of shape (requests,); TPOT only of requests with two tokens or more."""

    ttft_s: Floats
    tpot_s: Floats
    latency_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened in each tick, shape (ticks,) each: tokens per second, and requests at its end."""

    end_s: Floats
    measured: dict[str, Floats]
    predicted: dict[str, Floats]


def latencies(
    queued_s: Floats, first_token_s: Floats, last_token_s: Floats, output_tokens: NDArray[np.int64]
) -> Latencies:
    """From when the engine took the request in, which is what its own stamps count from."""
    several = output_tokens > 1
    tpot_s = (last_token_s - first_token_s)[several] / (output_tokens[several] - 1)
    return Latencies(first_token_s - queued_s, tpot_s, last_token_s - queued_s)


def measured_latencies(requests: MeasuredRequests) -> Latencies:
    return latencies(requests.queued_s, requests.first_token_s, requests.last_token_s, requests.output_tokens)


def predicted_latencies(requests: MeasuredRequests, replay: Replay) -> Latencies:
    return latencies(replay.queued_s, replay.first_token_s, replay.last_token_s, requests.output_tokens)


def figures(requests: MeasuredRequests, replay: Replay) -> list[Figure]:
    """Mean and percentiles of TTFT, TPOT and latency, in seconds; last the output tokens per second."""
    pairs = zip(measured_latencies(requests), predicted_latencies(requests, replay), strict=True)
    found = []
    for name, (measured, predicted) in zip(("TTFT", "TPOT", "latency"), pairs, strict=True):
        if not measured.size:
            continue
        found.append(Figure(f"{name} mean", float(measured.mean()), float(predicted.mean())))
        for label, percent in PERCENTILES.items():
            both = (float(np.percentile(values, percent)) for values in (measured, predicted))
            found.append(Figure(f"{name} {label}", *both))
    tokens = float(requests.output_tokens.sum())
    ends = (float(requests.last_token_s.max()), float(replay.last_token_s.max()))
    found.append(Figure("output tok/s", tokens / ends[0], tokens / ends[1]))
    return found


def timeline(run: RunFolder, replay: Replay) -> Timeline:
    """The engine's logger against the same counts of the replay.

    The logger's clock is not recorded: its first busy tick is taken as the one with the first measured token,
    so the two may be apart by up to a tick. A tick in which nothing happened has no row. Prompt tokens count
    when the prompt's first token comes, as vLLM counts them.
    """
    ticks, rows, tick_s = run.ticks, replay.iterations, run.tick_s
    assert ticks is not None
    end_s = _on_engine_clock(run, ticks)
    prompt_tokens = run.requests.prompt_tokens.astype(np.float64)
    prompts = _sums(replay.first_token_s, prompt_tokens, end_s, tick_s)
    firsts = _sums(replay.first_token_s, np.ones(len(replay.first_token_s)), end_s, tick_s)
    decodes = _sums(rows["end_s"], rows["decode_count"], end_s, tick_s)
    last = np.searchsorted(rows["end_s"], end_s, side="right") - 1
    idle = (last < 0) | (last == len(rows["end_s"]) - 1)
    running, waiting = (np.where(idle, 0.0, rows[key][last]) for key in ("running", "waiting"))
    return Timeline(
        end_s=end_s,
        measured={
            "prompt_tok_s": ticks["prompt_throughput"],
            "gen_tok_s": ticks["gen_throughput"],
            "running": ticks["running"],
            "waiting": ticks["waiting"],
        },
        predicted={
            "prompt_tok_s": prompts / tick_s,
            "gen_tok_s": (decodes + firsts) / tick_s,
            "running": running,
            "waiting": waiting,
        },
    )


def _on_engine_clock(run: RunFolder, ticks: dict[str, Floats]) -> Floats:
    """Ends of the ticks, counted from the engine's first request."""
    busy = (ticks["gen_throughput"] > 0) | (ticks["prompt_throughput"] > 0)
    first_busy_s = float(ticks["t"][int(np.argmax(busy))])
    first_token_tick = math.floor(float(run.requests.first_token_s.min()) / run.tick_s)
    end_s: Floats = ticks["t"] - first_busy_s + (first_token_tick + 1) * run.tick_s
    return end_s


def _sums(at_s: Floats, amounts: Floats, end_s: Floats, tick_s: float) -> Floats:
    """What fell into each tick [end - tick, end)."""
    order = np.argsort(at_s, kind="stable")
    total = np.concatenate(([0.0], np.cumsum(amounts[order])))
    edges = (np.searchsorted(at_s[order], edge, side="left") for edge in (end_s, end_s - tick_s))
    upper, lower = (total[edge] for edge in edges)
    sums: Floats = upper - lower
    return sums


def windows(line: Timeline, most: int = 20) -> list[tuple[float, dict[str, tuple[float, float]]]]:
    """Means over at most `most` equal windows: (end of the window in s, series -> (measured, predicted))."""
    ticks = len(line.end_s)
    per_window = -(-ticks // most)
    found = []
    for start in range(0, ticks, per_window):
        span = slice(start, min(start + per_window, ticks))
        means = {
            name: (float(line.measured[name][span].mean()), float(line.predicted[name][span].mean()))
            for name in SERIES
        }
        found.append((float(line.end_s[span][-1]), means))
    return found
