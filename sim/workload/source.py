"""The two sources of requests: a table of arrivals, and clients that wait for their answers.

Both make a `Request` only when it is due, so that half a million of them never exist at once, and
answer `due` with one comparison when nothing is: the loop asks before every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from sim.core.request import Request
from sim.workload.table import RequestTable

BLOCK_ROWS = 1024
"""Rows turned from numpy into Python numbers at a time: 20 times cheaper than one by one."""


class TableArrivals:
    """Open loop: the requests of a table, whatever happens to them. Implements `Arrivals`."""

    def __init__(self, table: RequestTable) -> None:
        self._requests = _requests(table)
        self._head: Request | None = None
        self._head_s = math.inf
        self._advance()

    def next_s(self) -> float | None:
        return None if self._head is None else self._head_s

    def due(self, now_s: float) -> Sequence[Request]:
        if now_s < self._head_s:
            return ()
        taken = []
        while self._head is not None and self._head_s <= now_s:
            taken.append(self._head)
            self._advance()
        return taken

    def ended(self, request_id: int, now_s: float) -> None:
        """Nothing: arrivals of an open loop do not depend on what was served."""

    def _advance(self) -> None:
        self._head = next(self._requests, None)
        self._head_s = math.inf if self._head is None else self._head.arrival_s


class Draws(Protocol):
    """What a client draws for each of its requests, in order."""

    def __call__(self, client: int) -> Iterator[tuple[int, int, str, str | None, float]]:
        """Endless (prompt_tokens, output_tokens, slo, adapter, think_s); the last is the pause
        after the request."""
        ...


class ClosedLoop:
    """`clients` that each send a request, wait until it ended, think, and send the next.

    Implements `Arrivals`. Clients send until `duration_s`; their first requests are spread evenly over
    [0, ramp_s]. A request that ended in the very instant it arrived was refused: its client waits at least
    `retry_s`, or a client without think time would never let time pass.
    """

    def __init__(
        self,
        *,
        clients: int,
        draws: Draws,
        duration_s: float,
        ramp_s: float,
        retry_s: float,
        max_requests: float,
    ) -> None:
        self._duration_s = duration_s
        self._retry_s = retry_s
        self._left = max_requests
        self._draws = [draws(client) for client in range(clients)]
        self._waking = [(ramp_s * client / clients, client) for client in range(clients)]
        heapify(self._waking)
        self._in_flight: dict[int, tuple[int, float, float]] = {}
        """Request -> its client, arrival_s and the think time after it."""
        self._next_id = 0

    def next_s(self) -> float | None:
        if self._waking:
            return self._waking[0][0]
        return math.inf if self._in_flight and self._left > 0 else None

    def due(self, now_s: float) -> Sequence[Request]:
        if not self._waking or now_s < self._waking[0][0]:
            return ()
        taken = []
        while self._waking and self._waking[0][0] <= now_s:
            taken.append(self._send(*heappop(self._waking)))
            if self._left <= 0:
                self._waking.clear()
        return taken

    def ended(self, request_id: int, now_s: float) -> None:
        client, arrival_s, think_s = self._in_flight.pop(request_id)
        wake_s = now_s + (think_s if now_s > arrival_s else max(think_s, self._retry_s))
        if wake_s < self._duration_s and self._left > 0:
            heappush(self._waking, (wake_s, client))

    def _send(self, arrival_s: float, client: int) -> Request:
        prompt_tokens, output_tokens, slo, adapter, think_s = next(self._draws[client])
        request = Request(self._next_id, arrival_s, prompt_tokens, output_tokens, slo, adapter)
        self._in_flight[request.id] = (client, arrival_s, think_s)
        self._next_id += 1
        self._left -= 1
        return request


def _requests(table: RequestTable) -> Iterator[Request]:
    slos = table.slo_names
    adapters: tuple[str | None, ...] = (None, *table.adapter_names[1:])
    for start in range(0, len(table), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        columns = zip(
            range(start, len(table)),
            table.arrival_s[rows].tolist(),
            table.prompt_tokens[rows].tolist(),
            table.output_tokens[rows].tolist(),
            table.slo[rows].tolist(),
            table.adapter[rows].tolist(),
            strict=False,
        )
        for request, arrival_s, prompt_tokens, output_tokens, slo, adapter in columns:
            yield Request(request, arrival_s, prompt_tokens, output_tokens, slos[slo], adapters[adapter])
