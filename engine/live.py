"""Requests that come while the loop runs, through a pipe from whoever talks to the clients (`engine.front`).

A thread takes messages off the pipe and wakes the loop; another puts the tokens of each iteration on it. The loop's
thread does neither. What the loop records is taken out of the recorder as it comes, counted, and requests that have
ended are a line of a trace: a server runs without end, and holds nothing that grows.
"""

from __future__ import annotations

import csv
import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TextIO

import numpy as np

from engine.driver import Clock, Driver
from engine.live_metrics import LiveMetrics
from engine.messages import LOST, Ask, Enough, Gone, Metrics, Stop, Tokens
from engine.sampling import Sampling
from sim.core.loop import Horizon
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.core.state import PipelineState

METRICS_S = 1.0
TRACE_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "slo", "adapter")
"""Those of a trace of one's own (`workload=csv`)."""
SLO = "default"
"""Class of all requests."""


class LiveArrivals:
    """Requests as they come; implements `Arrivals`. All is called by the loop's thread."""

    def __init__(
        self,
        link: Connection,
        horizon: Horizon,
        recorder: Recorder,
        slo: Slo,
        fail: Callable[[str], None],
        trace: TextIO | None,
    ) -> None:
        """`horizon` is ended when the pipe is. `slo` is that of all requests; those that end go to `trace`, a CSV file
        with its columns, and `fail` gets a line when that cannot be written."""
        self._link = link
        self._horizon = horizon
        self._recorder = recorder
        self._state: PipelineState | None = None
        self._fail = fail
        self._trace = trace
        self._asked: deque[Request] = deque()
        self._asks: dict[int, Ask] = {}
        self._made: list[tuple[int, int | None]] = []
        self._out: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._gone: set[int] = set()
        """Of those that the loop has not seen yet."""
        self.metrics = LiveMetrics(slo)
        """As of the last call of `tell`."""
        self._traced = 0
        self._traced_bytes = 0 if trace is None else trace.tell()
        self._told_s = -METRICS_S

    def start(self, clock: Clock, driver: Driver, state: PipelineState) -> None:
        """Begin to take messages. `clock` has the loop's time, `driver` and `state` are the loop's."""
        self._state = state
        # A counter that came with its first count would lose it.
        self._out.put(Metrics(self.metrics.text()))
        threading.Thread(target=self._receive, args=(clock, driver), daemon=True).start()
        threading.Thread(target=self._send, daemon=True).start()

    def stop(self, drain_s: float) -> None:
        """Tell the other side that the server ends; it hangs up when its clients have their answers, or after
        `drain_s`."""
        self._out.put(Stop(drain_s))

    # As the loop sees it

    def next_s(self) -> float:
        # The loop asks before it idles: clients and metrics get the last that there is.
        self.tell()
        return self._asked[0].arrival_s if self._asked else math.inf

    def due(self, now_s: float) -> Sequence[Request]:
        self._answer()
        if now_s - self._told_s >= METRICS_S:
            self._told_s = now_s
            self.tell()
        requests = []
        while self._asked and self._asked[0].arrival_s <= now_s:
            request = self._asked.popleft()
            if request.id in self._gone:
                self._gone.discard(request.id)
                del self._asks[request.id]
                self._recorder.add_request(request, 0, Outcome.ABORTED)
            else:
                requests.append(request)
        return requests

    def ended(self, request_id: int, now_s: float) -> None:
        self._gone.discard(request_id)
        self._made.append((request_id, None))

    # As the engine sees it

    def prompt(self, request: Request) -> tuple[list[int], Sampling]:
        """A request's tokens and how to sample; asked for once."""
        ask = self._asks.pop(request.id)
        sampling = Sampling(
            temperature=ask.temperature,
            top_k=ask.top_k,
            top_p=ask.top_p,
            seed=ask.seed,
            stop_tokens=ask.stop_tokens,
        )
        return ask.tokens, sampling

    def on_token(self, id: int, token: int) -> None:
        self._made.append((id, token))

    def on_lost(self, id: int) -> None:
        self._made.append((id, LOST))

    # Threads

    def _receive(self, clock: Clock, driver: Driver) -> None:
        try:
            while True:
                message = self._link.recv()
                if type(message) is Ask:
                    id, tokens, adapter = message.id, len(message.tokens), message.adapter
                    self._asks[id] = message
                    self._asked.append(Request(id, clock.now_s(), tokens, message.max_tokens, SLO, adapter))
                    clock.wake()
                elif type(message) is Gone:
                    if message.id in self._asks:
                        self._gone.add(message.id)
                    driver.abort(message.id)
                elif type(message) is Enough:
                    driver.finish(message.id)
        except (EOFError, OSError):
            self._horizon.end(clock.now_s())
            clock.wake()

    def _send(self) -> None:
        with suppress(OSError):  # nobody listens; the other thread ends the run
            while True:
                self._link.send(self._out.get())

    # What comes out

    def tell(self) -> None:
        """Send what there is, and take what was recorded since."""
        self._answer()
        if self._count():
            self._out.put(Metrics(self.metrics.text()))

    def _answer(self) -> None:
        """Send the tokens that the last iteration made."""
        if self._made:
            self._out.put(Tokens(self._made))
            self._made = []

    def _count(self) -> bool:
        """Whether anything was recorded."""
        recorder = self._recorder
        if not (len(recorder.iterations) or len(recorder.requests)):
            return False
        assert self._state is not None
        self.metrics.add(recorder, self._state)
        self._write(recorder.requests.arrays())
        for table in (
            recorder.requests,
            recorder.iterations,
            recorder.segments,
            recorder.ticks,
            recorder.steps,
        ):
            del table.data[:]
        return True

    def _write(self, requests: dict[str, np.ndarray]) -> None:
        """Requests that got tokens, to the trace. A full disk ends the trace, not the server."""
        if self._trace is None:
            return
        rows = []
        for n in np.flatnonzero(requests["generated_tokens"]):
            arrival_s = f"{requests['arrival_s'][n]:.6f}"
            prompt, made = int(requests["prompt_tokens"][n]), int(requests["generated_tokens"][n])
            adapter = self._recorder.adapters.names[int(requests["adapter"][n])]
            rows.append((arrival_s, prompt, made, SLO, adapter))
        try:
            csv.writer(self._trace, lineterminator="\n").writerows(rows)
            self._trace.flush()
        except OSError as error:
            self._fail(f"trace: {error.strerror}; it ends after {self._traced} requests")
            with suppress(OSError):  # what is buffered cannot be written either
                self._trace.close()
            os.truncate(self._trace.name, self._traced_bytes)
            self._trace = None
        else:
            self._traced += len(rows)
            self._traced_bytes = self._trace.tell()
