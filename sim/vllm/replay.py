"""Simulates a recorded engine: the shared loop on its arrivals, with its limits and its card's times.

With data parallelism there are several engines, each with a loop of its own. A request goes to the one with
the least 4 x waiting + running as it arrives, the next in turn among equals (vllm/v1/engine/core_client.py,
DPLBAsyncMPClient; its counts are up to 0.1 s old there and fresh here).

Between the loop and the device stands the host: planning and preparing a batch takes `host_s`, and the device
starts it when both are ready. With asynchronous scheduling (a lookahead of 1) that hides behind the iteration
that runs, except when the engine was idle; without it every iteration pays.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.core.loop import Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.cost.operators import OperatorCost
from sim.errors import keys_as
from sim.vllm.blocks import alike
from sim.vllm.policy import Vllm
from sim.vllm.run import MeasuredRequests
from sim.vllm.settings import EngineSettings
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
    found_tokens: int
    """Prompt tokens that a request found in blocks when it was admitted first."""
    iterations: dict[str, Floats]
    """Columns of `sim.core.rows.ITERATION_COLUMNS`."""


def replay(engine: EngineSettings, requests: MeasuredRequests, cost: OperatorCost) -> Replay:
    """Serve `requests`, of which only arrivals, lengths and prompts are looked at."""
    columns = (requests.arrival_s, requests.prompt_tokens, requests.output_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    made = [Request(id, *row) for id, row in enumerate(rows)]
    coming = deque(sorted(made, key=lambda r: (r.arrival_s, r.id)))
    queued_s = [math.nan] * len(coming)
    alike_blocks = alike(requests.prompts, engine.block_tokens) if requests.prompts is not None else {}
    engines = [
        _Engine(engine, cost, _Stamped(coming, queued_s), alike_blocks) for _ in range(engine.replicas)
    ]
    turn = 0
    while coming:
        request = coming[0]
        for one in engines:
            one.advance(request.arrival_s)
        order = [(turn + i) % len(engines) for i in range(len(engines))]
        chosen = min(order, key=lambda index: engines[index].score)
        turn = (chosen + 1) % len(engines)
        engines[chosen].arrivals.pending.append(coming.popleft())
    for one in engines:
        one.advance(math.inf)
    return _result(engines, queued_s)


class _Engine:
    """One engine core and its device, run up to a given time."""

    def __init__(
        self,
        engine: EngineSettings,
        cost: OperatorCost,
        arrivals: _Stamped,
        prompts: Mapping[int, Sequence[int]],
    ) -> None:
        with keys_as({"cluster.limits.": "the run's engine: "}):
            limits = Limits(
                kv_tokens=(engine.kv_blocks - 1) * engine.block_tokens,
                block_tokens=engine.block_tokens,
                max_sequences=engine.max_sequences,
                max_tokens=engine.max_tokens,
                max_sequence_tokens=engine.max_sequence_tokens,
                lookahead=1 if engine.async_scheduling else 0,
            )
        self.recorder, self.arrivals = Recorder(), arrivals
        slos = {"default": Slo()}
        self.state = CachedState(
            limits=limits, slos=slos, recorder=self.recorder, prompts=prompts, caching=engine.prefix_caching
        )
        policy = Vllm(
            self.state.pool,
            reserve_full_prompt=engine.reserve_full_prompt,
            most_prompt_tokens=engine.most_prompt_tokens,
        )
        self._cost = cost
        self._loop = run_loop(self.state, policy, arrivals, Horizon())
        self._reply: Done | None = None
        self._now_s, self._device_free_s = 0.0, -math.inf
        self._ends: deque[float] = deque()
        self._over = False

    @property
    def score(self) -> int:
        """What the front end balances."""
        waiting = len(self.state.waiting) + len(self.arrivals.pending)
        return 4 * waiting + len(self.state.running)

    def advance(self, until_s: float) -> None:
        """Go on until the engine next looks for arrivals at `until_s` or later, or has nothing left to do."""
        while not self._over and self._now_s < until_s:
            try:
                command = self._loop.send(self._reply)  # type: ignore[arg-type]
            except StopIteration:
                self._over = True
                return
            if type(command) is Execute:
                ready_s = self._now_s + HOST_SEQUENCE_S * len(self.state.running)
                took_s = self._cost.iteration_s(command.work, self.state.spread)
                self._device_free_s = max(self._device_free_s, ready_s) + took_s
                self._ends.append(self._device_free_s)
            elif type(command) is Sleep:
                self._now_s = max(self._now_s, command.until_s)
            else:
                self._now_s = max(self._now_s, self._ends.popleft())
            self._reply = Done(self._now_s)


def _result(engines: Sequence[_Engine], queued_s: list[float]) -> Replay:
    tables = [one.recorder.requests.arrays() for one in engines]
    rows = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    unserved = rows["request"][rows["outcome"] != Outcome.FINISHED]
    if unserved.size:
        raise ValueError(
            f"request {int(unserved[0])} cannot be served by this engine: its prompt is too long"
        )
    order = np.argsort(rows["request"])
    return Replay(
        queued_s=np.array(queued_s),
        first_token_s=rows["first_token_s"][order],
        last_token_s=rows["last_token_s"][order],
        preemptions=int(rows["preemptions"].sum()),
        found_tokens=sum(one.state.found_tokens for one in engines),
        iterations=_merged([one.recorder.iterations.arrays() for one in engines]),
    )


def _merged(engines: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    """Iterations of all engines by their ends; `running` and `waiting` are those of all engines then."""
    if len(engines) == 1:
        return engines[0]
    rows = {name: np.concatenate([own[name] for own in engines]) for name in engines[0]}
    order = np.argsort(rows["end_s"], kind="stable")
    rows = {name: values[order] for name, values in rows.items()}
    for name in ("running", "waiting"):
        total = np.zeros(len(order))
        for own in engines:
            last = np.searchsorted(own["end_s"], rows["end_s"], side="right")
            total += np.concatenate(([0.0], own[name]))[last]
        rows[name] = total
    return rows


class _Stamped:
    """Open-loop arrivals of one engine that note when it took each in. Implements `Arrivals`."""

    def __init__(self, coming: deque[Request], queued_s: list[float]) -> None:
        """`coming`: of all engines, not yet given to one; `queued_s` by request, filled in here."""
        self._coming = coming
        self._queued_s = queued_s
        self.pending: deque[Request] = deque()

    def next_s(self) -> float | None:
        """An idle engine wakes for each arrival, since it may be given it."""
        first = self.pending or self._coming
        return first[0].arrival_s if first else None

    def due(self, now_s: float) -> Sequence[Request]:
        taken = []
        while self.pending and self.pending[0].arrival_s <= now_s:
            request = self.pending.popleft()
            self._queued_s[request.id] = now_s
            taken.append(request)
        return taken

    def ended(self, request_id: int, now_s: float) -> None:
        """Nothing: arrivals do not depend on what was served."""
