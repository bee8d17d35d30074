"""The simulator's driver of one pipeline: turns the loop's commands into SimPy events.

The device is a queue of one: an iteration launched while another runs starts when that ends. With a
lookahead of one the loop waits for the older of the two, so that is all the concurrency there is.

An event costs more than the loop's own bookkeeping, and most would be the only one due: then the clock moves
on without it (`Clock.pass_to`). Where something else is due first, or at the same time, SimPy decides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from heapq import heappush
from typing import Any

import simpy

from sim.core.cost import CostModel
from sim.core.loop import Command, Done, Execute, Sleep

_new = tuple.__new__


class Clock(simpy.Environment):
    """An environment whose time can also pass without an event."""

    def pass_to(self, time_s: float) -> bool:
        """Move to `time_s` unless an event is due by then; it would have been the next one to happen."""
        queue = self._queue
        if queue and queue[0][0] <= time_s:
            return False
        self._now = time_s
        return True

    def at(self, time_s: float) -> simpy.Event:
        """An event at `time_s`, which is not past. A timeout's delay and the time now may add up to another number."""
        event = self.event()
        event._ok, event._value = True, None
        heappush(self._queue, (time_s, simpy.events.NORMAL, next(self._eid), event))
        return event


class SimulatedPipeline:
    """A pipeline as a SimPy process; `world` says how long each iteration takes."""

    def __init__(self, env: Clock, loop: Generator[Command, Done, None], world: CostModel) -> None:
        self._env = env
        self._loop = loop
        self._world = world
        self._wake: simpy.Event | None = None
        self.process = env.process(self._run())

    def wake(self) -> None:
        """A request has arrived: if the pipeline sleeps, it looks."""
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env, send, iteration_s = self._env, self._loop.send, self._world.iteration_s
        pass_to = env.pass_to
        ends: deque[float] = deque()
        device_free_s = -math.inf
        now_s = env.now
        reply: Done | None = None
        while True:
            try:
                command = send(reply)  # type: ignore[arg-type]
            except StopIteration:
                return
            if type(command) is Execute:
                start_s = device_free_s if device_free_s > now_s else now_s
                device_free_s = start_s + iteration_s(command[1])
                ends.append(device_free_s)
                continue
            if type(command) is Sleep:
                yield self._sleep(command.until_s)
                now_s = env.now
            else:
                end_s = ends.popleft()
                if end_s > now_s:
                    now_s = end_s
                if not pass_to(now_s):
                    yield env.at(now_s)
            reply = _new(Done, (now_s, (), (), ()))

    def _sleep(self, until_s: float) -> simpy.Event:
        """An event at `until_s` or at the next `wake`, whichever is first."""
        self._wake = wake = self._env.event()
        if until_s < math.inf:
            alarm = self._env.at(max(until_s, self._env.now))
            assert alarm.callbacks is not None
            alarm.callbacks.append(lambda _: None if wake.triggered else _succeed(wake))
        return wake


def _succeed(event: simpy.Event) -> None:
    event.succeed()
