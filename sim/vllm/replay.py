"""Simulates a recorded engine: the shared loop on its arrivals, with its limits and its card's times.

Between the loop and the device stands the host: planning and preparing a batch takes `host_s`, and the device
starts it when both are ready. With asynchronous scheduling (a lookahead of 1) that hides behind the iteration
that runs, except when the engine was idle; without it every iteration pays.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.core.loop import Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.cost.operators import OperatorCost
from sim.vllm.policy import Vllm
from sim.vllm.run import EngineSettings, MeasuredRequests
from sim.vllm.state import CachedState

HOST_SEQUENCE_S = 5.5e-3 / 256
"""Host time of an iteration per running sequence: a gap of 5 to 6 ms between decodes of 256 sequences was
reported in vLLM's issue 10634, before scheduling became asynchronous."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the simulated engine did; request columns in the order given, seconds."""

    queued_s: Floats
    """When the engine looked and found the request there, as vLLM stamps it."""
    first_token_s: Floats
    last_token_s: Floats
    preemptions: int
    iterations: dict[str, Floats]
    """Columns of `sim.core.rows.ITERATION_COLUMNS`."""


def replay(engine: EngineSettings, requests: MeasuredRequests, cost: OperatorCost) -> Replay:
    """Serve `requests`, of which only arrivals and lengths are looked at."""
    limits = Limits(
        kv_tokens=(engine.kv_blocks - 1) * engine.block_tokens,
        block_tokens=engine.block_tokens,
        max_sequences=engine.max_sequences,
        max_tokens=engine.max_tokens,
        max_sequence_tokens=engine.max_sequence_tokens,
        lookahead=1 if engine.async_scheduling else 0,
    )
    recorder, arrivals = Recorder(), _Stamped(requests)
    slos = {"default": Slo()}
    state = CachedState(limits=limits, slos=slos, recorder=recorder, reuse=engine.prefix_caching)
    policy = Vllm(reserve_full_prompt=engine.reserve_full_prompt)
    loop = run_loop(state, policy, arrivals, Horizon())
    now_s, device_free_s = 0.0, -math.inf
    ends: deque[float] = deque()
    reply: Done | None = None
    while True:
        try:
            command = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            break
        if type(command) is Execute:
            ready_s = now_s + HOST_SEQUENCE_S * len(state.running)
            device_free_s = max(device_free_s, ready_s) + cost.iteration_s(command.work, state.spread)
            ends.append(device_free_s)
        elif type(command) is Sleep:
            now_s = max(now_s, command.until_s)
        else:
            now_s = max(now_s, ends.popleft())
        reply = Done(now_s)
    return _result(recorder, arrivals)


def _result(recorder: Recorder, arrivals: _Stamped) -> Replay:
    rows = recorder.requests.arrays()
    unserved = rows["request"][rows["outcome"] != Outcome.FINISHED]
    if unserved.size:
        raise ValueError(
            f"request {int(unserved[0])} cannot be served by this engine: its prompt is too long"
        )
    order = np.argsort(rows["request"])
    return Replay(
        queued_s=np.array(arrivals.queued_s),
        first_token_s=rows["first_token_s"][order],
        last_token_s=rows["last_token_s"][order],
        preemptions=int(rows["preemptions"].sum()),
        iterations=recorder.iterations.arrays(),
    )


class _Stamped:
    """Open-loop arrivals that note when the engine took each in. Implements `Arrivals`."""

    def __init__(self, requests: MeasuredRequests) -> None:
        columns = (requests.arrival_s, requests.prompt_tokens, requests.output_tokens)
        self.queued_s = [math.nan] * len(requests.arrival_s)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        made = [Request(id, *row) for id, row in enumerate(rows)]
        self._coming = deque(sorted(made, key=lambda r: (r.arrival_s, r.id)))

    def next_s(self) -> float | None:
        return self._coming[0].arrival_s if self._coming else None

    def due(self, now_s: float) -> Sequence[Request]:
        taken = []
        while self._coming and self._coming[0].arrival_s <= now_s:
            request = self._coming.popleft()
            self.queued_s[request.id] = now_s
            taken.append(request)
        return taken

    def ended(self, request_id: int, now_s: float) -> None:
        """Nothing: arrivals do not depend on what was served."""
