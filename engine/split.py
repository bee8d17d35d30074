"""A static split of one device: pipelines that take turns, each within its share of the device's time.

What separate clusters are on one GPU. A share is never more than that: while one pipeline idles, the others get
no more, as a second GPU would not help the first. Time is counted where it is used. A pipeline's clock advances
by the time of each of its iterations over its share, and it may start the next one only when the device's clock
has come so far. Waiting for the other's iteration is made up for later, idling is not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import Protocol

from sim.core.loop import Command, Done, Execute, Sleep
from sim.core.plan import LATER, Plan, Policy, View
from sim.core.state import PipelineState
from sim.core.work import Work


class Device(Protocol):
    """The part of an engine that carries out plans."""

    def launch(self, plan: Plan) -> None: ...

    def collect(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Requests that ended, jobs that failed."""
        ...


class SharedClock(Protocol):
    """As `engine.driver.Clock`, for all pipelines of the device."""

    def now_s(self) -> float: ...

    def launched(self, work: Work) -> None: ...

    def done(self) -> None: ...

    def sleep(self, until_s: float) -> None: ...


class Gate:
    """A policy that plans only when its pipeline has the device, so that plans are never stale."""

    def __init__(self, policy: Policy) -> None:
        self.stands_for = policy
        self.serves, self.finetunes = policy.serves, policy.finetunes
        self.open = False
        """Set by the driver; one plan closes it."""

    def plan(self, view: View) -> Plan:
        if not self.open:
            return LATER
        self.open = False
        return self.stands_for.plan(view)


class Part:
    """One pipeline of a split."""

    def __init__(
        self,
        device: Device,
        state: PipelineState,
        gate: Gate,
        share: float,
        loop: Generator[Command, Done, None],
    ) -> None:
        """`loop` runs `state` by `gate` and never plans ahead (a lookahead of 0)."""
        if not 0 < share <= 1:
            raise ValueError(f"a share of the device must be in (0, 1], got {share}")
        self.device = device
        self.state = state
        self.gate = gate
        self.share = share
        self.loop = loop
        self.clock_s = 0.0
        """Device time used over the share, since it last was idle."""
        self.used_s = 0.0
        """Device time used in all."""
        self.launched_s: float | None = None
        """When its iteration was launched that has not been collected."""
        self.idle = False
        """It had the device last and had nothing to do."""
        self.until_s = 0.0
        """When it has something to do again, if it is idle."""

    @property
    def wake_s(self) -> float:
        """When it wants the device, and may have it."""
        return self.until_s if self.idle else self.clock_s


class SplitDriver:
    """Runs all loops to their end.

    While one pipeline's iteration runs, that of another may be launched behind it: what a lookahead hides
    of planning and launching is hidden here as well. The loops need finite horizons, since a pipeline that
    waits for its share sleeps.
    """

    def __init__(self, parts: Sequence[Part], clock: SharedClock) -> None:
        total = sum(part.share for part in parts)
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of a device must add up to at most 1, got {total}")
        self._clock = clock
        self._waiting = [part for part in parts if _start(part)]
        self._in_flight: deque[Part] = deque()
        self._end_s = 0.0
        """When the device finished the last iteration."""

    def run(self) -> None:
        while self._waiting or self._in_flight:
            part = self._next()
            if part is not None and len(self._in_flight) < 2:
                self._turn(part)
            elif self._in_flight:
                self._collect()
            else:
                self._clock.sleep(min(part.wake_s for part in self._waiting))

    def _next(self) -> Part | None:
        """Of the pipelines that may have the device now, the one that is furthest behind its share."""
        now_s = self._clock.now_s()
        ready = [part for part in self._waiting if part.wake_s <= now_s]
        return min(ready, key=lambda part: part.clock_s, default=None)

    def _turn(self, part: Part) -> None:
        """Let it plan; what it plans is launched, and without a plan it is idle."""
        now_s = self._clock.now_s()
        if part.idle:
            part.clock_s = max(part.clock_s, part.until_s)
        part.gate.open = True
        command = _send(part, Done(now_s))
        part.gate.open = False
        if command is None:
            self._waiting.remove(part)
        elif type(command) is Execute:
            part.device.launch(command.plan)
            self._clock.launched(command.work)
            part.launched_s = now_s
            part.idle = False
            self._waiting.remove(part)
            self._in_flight.append(part)
            _send(part, Done(self._clock.now_s()))
        else:
            assert type(command) is Sleep
            part.idle = True
            # Not at the same instant again: what has arrived by then has been seen.
            part.until_s = max(command.until_s, math.nextafter(now_s, math.inf))

    def _collect(self) -> None:
        """Wait for the oldest iteration and charge its pipeline for it."""
        part = self._in_flight.popleft()
        ended, failed = part.device.collect()
        self._clock.done()
        end_s = self._clock.now_s()
        assert part.launched_s is not None
        part.state.busy_until(self._end_s)
        used_s = end_s - max(part.launched_s, self._end_s)
        part.used_s += used_s
        part.clock_s += used_s / part.share
        part.launched_s, self._end_s = None, end_s
        if _send(part, Done(end_s, ended, (), failed)) is not None:
            self._waiting.append(part)


def _start(part: Part) -> bool:
    """Up to the first sleep of a pipeline, which its closed gate brings; False if there was none."""
    command = next(part.loop, None)
    assert command is None or type(command) is Sleep
    return command is not None


def _send(part: Part, done: Done) -> Command | None:
    try:
        return part.loop.send(done)
    except StopIteration:
        return None
