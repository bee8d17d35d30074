"""An engine whose iterations take what a cost model says: its decisions are then the simulator's."""

from __future__ import annotations

import math
from collections import deque
from functools import partial

import pytest

import engine.bench_loaded
import engine.measure
import engine.pipelines
from sim.core.cost import CostModel
from sim.core.work import Work
from tests.support import LinearCost


class VirtualClock:
    """Iterations take what `world` says; the device runs one at a time, as in the simulator."""

    def __init__(self, world: CostModel) -> None:
        self._world = world
        self._now_s = 0.0
        self._free_s = -math.inf
        self._ends_s: deque[float] = deque()

    def now_s(self) -> float:
        return self._now_s

    def launched(self, work: Work) -> None:
        self._free_s = max(self._free_s, self._now_s) + self._world.iteration_s(work)
        self._ends_s.append(self._free_s)

    def done(self) -> None:
        self._now_s += max(0.0, self._ends_s.popleft() - self._now_s)

    def sleep(self, until_s: float) -> None:
        if until_s == math.inf:
            raise RuntimeError("nothing will happen by itself any more on a virtual clock")
        self._now_s += max(0.0, until_s - self._now_s)

    def wake(self) -> None:
        """Nobody sleeps in real time."""


def bench_on_a_virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `coserve bench` runs, and its peak, take as many iterations on every machine, however busy that is. The
    predictor is measured on the machine: policies that ask it decide the same only within bounds that never bind."""
    new_clock = partial(VirtualClock, LinearCost(host_s=2.0**-6))
    monkeypatch.setattr(engine.pipelines, "WallClock", new_clock)
    monkeypatch.setattr(engine.measure, "WallClock", new_clock)
    monkeypatch.setattr(engine.bench_loaded, "Split", partial(engine.bench_loaded.Split, new_clock=new_clock))
