"""A static split of one device: pipelines that take turns, each within its share of the device's time.

What separate clusters are on one GPU. A share is never more than that: while one pipeline idles, the others get
no more, as a second GPU would not help the first. Time is counted where it is used. A pipeline's clock advances
by the time of each of its iterations over its share, and it may start the next one only when the device's clock
has come so far. Waiting for the other's iteration is made up for later, idling is not.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Protocol

from sim.core.loop import Command, Done, Execute, Sleep
from sim.core.plan import Plan, Policy, View
from sim.core.work import Work


class Device(Protocol):
    """The part of an engine that carries out plans."""

    def launch(self, plan: Plan) -> None: ...

    def collect(self) -> tuple[int, ...]: ...


class SharedClock(Protocol):
    """As `engine.driver.Clock`, for all pipelines of the device."""

    def now_s(self) -> float: ...

    def launched(self, work: Work) -> None: ...

    def done(self) -> None: ...

    def sleep(self, until_s: float) -> None: ...


class Gate:
    """A policy that plans only when its pipeline has the device, so that plans are never stale."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.serves, self.finetunes = policy.serves, policy.finetunes
        self.open = False
        """Set by the driver; one plan closes it."""

    def plan(self, view: View) -> Plan:
        if not self.open:
            return Plan()
        self.open = False
        return self._policy.plan(view)


class Part:
    """One pipeline of a split."""

    def __init__(
        self, device: Device, gate: Gate, share: float, loop: Generator[Command, Done, None]
    ) -> None:
        """`loop` plans by `gate` and never ahead (a lookahead of 0)."""
        if not 0 < share <= 1:
            raise ValueError(f"a share of the device must be in (0, 1], got {share}")
        self.device = device
        self.gate = gate
        self.share = share
        self.loop = loop
        self.clock_s = 0.0
        """Device time used over the share, since it last was idle."""
        self.used_s = 0.0
        """Device time used in all."""
        self.idle = False
        """It had the device last and had nothing to do."""
        self.until_s = 0.0
        """When it has something to do again, if it is idle."""

    @property
    def wake_s(self) -> float:
        """When it wants the device, and may have it."""
        return self.until_s if self.idle else self.clock_s


def run_split(parts: Sequence[Part], clock: SharedClock) -> None:
    """Run all loops to their end. The parts must be those of one device: shares of 1 in all.

    They need finite horizons, since a pipeline that waits for its share sleeps.
    """
    total = sum(part.share for part in parts)
    if total > 1 + 1e-9:
        raise ValueError(f"the shares of a device must add up to at most 1, got {total}")
    running = [part for part in parts if _start(part)]
    while running:
        now_s = clock.now_s()
        part = min(running, key=lambda one: (max(one.wake_s, now_s), one.clock_s))
        if part.wake_s > now_s:
            clock.sleep(part.wake_s)
            continue
        if not _turn(part, clock, now_s):
            running.remove(part)


def _start(part: Part) -> bool:
    """Up to the first sleep of a pipeline, which its closed gate brings; False if there was none."""
    command = next(part.loop, None)
    assert command is None or type(command) is Sleep
    return command is not None


def _turn(part: Part, clock: SharedClock, now_s: float) -> bool:
    """One iteration of a pipeline that may have the device; False when its loop has ended."""
    if part.idle:
        part.clock_s = max(part.clock_s, part.until_s)
    part.gate.open = True
    command = _send(part, Done(now_s))
    if type(command) is Execute:
        part.device.launch(command.plan)
        clock.launched(command.work)
        _send(part, Done(clock.now_s()))
        ended = part.device.collect()
        clock.done()
        end_s = clock.now_s()
        part.used_s += end_s - now_s
        part.clock_s += (end_s - now_s) / part.share
        part.idle = False
        part.gate.open = False
        return _send(part, Done(end_s, ended)) is not None
    if command is None:
        return False
    assert type(command) is Sleep
    part.gate.open = False
    part.idle = True
    # At the same instant again only when something has changed by itself: an arrival is planned at once.
    part.until_s = max(command.until_s, math.nextafter(now_s, math.inf))
    return True


def _send(part: Part, done: Done) -> Command | None:
    try:
        return part.loop.send(done)
    except StopIteration:
        return None
