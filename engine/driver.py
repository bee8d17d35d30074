"""The engine's driver of the shared loop: turns its commands into device work and a clock.

On the wall clock an iteration ends when the device has done it. On a virtual clock the same work is done, but
time passes as a cost model says; with that of a simulated run the decisions are the same, one by one, which
is how simulator and engine are held together.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from typing import Protocol

from engine.engine import Engine
from engine.sampling import Sampling
from sim.core.arrivals import Arrivals
from sim.core.loop import Command, Done, Execute, Sleep
from sim.core.request import Request
from sim.core.work import Work

Prompt = Callable[[Request], tuple[Seq[int], Sampling]]
"""A request's prompt tokens and how to sample."""


NAP_S = 0.5
"""Longest wait at a time."""


class Clock(Protocol):
    """Time as the driver sees it."""

    def now_s(self) -> float: ...

    def launched(self, work: Work) -> None:
        """An iteration has been started."""
        ...

    def done(self) -> None:
        """The oldest iteration has ended on the device."""
        ...

    def sleep(self, until_s: float) -> None:
        """Return at `until_s` or, after a `wake`, earlier."""
        ...

    def wake(self) -> None:
        """From any thread: end a `sleep`, or the next one."""
        ...


class WallClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._woken = threading.Event()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def launched(self, work: Work) -> None:
        """The device is under way."""

    def done(self) -> None:
        """Time has passed by itself."""

    def sleep(self, until_s: float) -> None:
        # A signal that comes just before a wait does not end it, and its handler runs when that has ended.
        while not self._woken.wait(min(NAP_S, max(0.0, until_s - self.now_s()))) and self.now_s() < until_s:
            pass
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()


class EngineArrivals:
    """A source of requests whose prompts the engine gets as they arrive, and whose ends it is told."""

    def __init__(self, arrivals: Arrivals, engine: Engine, prompt: Prompt) -> None:
        self._arrivals = arrivals
        self._engine = engine
        self._prompt = prompt
        self._live: set[int] = set()

    def next_s(self) -> float | None:
        return self._arrivals.next_s()

    def due(self, now_s: float) -> Seq[Request]:
        requests = self._arrivals.due(now_s)
        for request in requests:
            self._engine.arrive(request, *self._prompt(request))
            self._live.add(request.id)
        return requests

    def ended(self, request_id: int, now_s: float) -> None:
        self._live.discard(request_id)
        self._engine.ended(request_id)
        self._arrivals.ended(request_id, now_s)

    def abandon(self) -> None:
        """After a loop that left requests unfinished: the engine is as empty as before it."""
        for request_id in self._live:
            self._engine.ended(request_id)
        self._live.clear()


class GivenArrivals:
    """Requests that are all there from the start; by default none. Implements `Arrivals`."""

    def __init__(self, requests: Seq[Request] = ()) -> None:
        self._requests = list(requests)

    def next_s(self) -> float | None:
        return 0.0 if self._requests else None

    def due(self, now_s: float) -> Seq[Request]:
        requests, self._requests = self._requests, []
        return requests

    def ended(self, request_id: int, now_s: float) -> None:
        """Nothing follows from it."""


class Driver:
    """Runs one loop on one engine. `abort` and `finish` may be called from any thread."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._aborted: deque[int] = deque()
        self._finished: deque[int] = deque()

    def abort(self, id: int) -> None:
        """A client has gone."""
        self._aborted.append(id)
        self._clock.wake()

    def finish(self, id: int) -> None:
        """A client has all that it wants of a running request."""
        self._finished.append(id)

    def run(self, loop: Generator[Command, Done, None]) -> None:
        """Drive the loop to its end."""
        engine, clock = self._engine, self._clock
        try:
            command = next(loop)
            while True:
                if type(command) is Execute:
                    engine.launch(command.plan)
                    clock.launched(command.work)
                    reply = Done(clock.now_s())
                elif type(command) is Sleep:
                    clock.sleep(command.until_s)
                    reply = Done(clock.now_s(), (), _taken(self._aborted))
                else:
                    ended, failed = engine.collect()
                    clock.done()
                    ended += _taken(self._finished)
                    reply = Done(clock.now_s(), ended, _taken(self._aborted), failed)
                command = loop.send(reply)
        except StopIteration:
            return


def _taken(ids: deque[int]) -> tuple[int, ...]:
    """All of them, taken out."""
    taken = []
    while ids:
        taken.append(ids.popleft())
    return tuple(taken)
