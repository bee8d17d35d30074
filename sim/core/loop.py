"""The loop that the simulator and the engine share. It never reads a clock.

It is a generator: it yields what is to be done, and its driver sends back the time at which that was done.

    Execute(plan, work)  launch this iteration; sends back nothing that matters
    Wait()               sends back Done(time, ...) of the oldest launched iteration
    Sleep(until_s)       nothing to do: sends back Done(time) at `until_s`, or earlier when a request arrives

With a lookahead of 0 every Execute is followed by its Wait. With 1 the next iteration is planned and
launched before the Wait for the running one, so that planning hides behind it; its plan then sees the
arrivals up to the moment at which the running one started.

The simulator turns Execute into a timeout, the engine runs the device and reads the wall clock.
Arrivals are pulled when planning, never pushed: at equal times the order is arrival first, then plan.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from sim.core.arrivals import Arrivals
from sim.core.plan import LATER, Plan, Policy
from sim.core.state import PipelineState
from sim.core.work import Work

_new = tuple.__new__


class Execute(NamedTuple):
    """Launch this iteration."""

    plan: Plan
    work: Work


class Wait(NamedTuple):
    """Tell when the oldest launched iteration has ended."""


class Sleep(NamedTuple):
    """Nothing to do until this time (`inf`: until something arrives)."""

    until_s: float


class Done(NamedTuple):
    """The driver's answer."""

    now_s: float
    ended: tuple[int, ...] = ()
    """Requests whose token of this iteration was a stop token."""
    aborted: tuple[int, ...] = ()
    """Requests whose client has gone."""
    failed: tuple[str, ...] = ()
    """Jobs whose optimizer step of this iteration is worthless: they are given up."""


Command = Execute | Wait | Sleep


@dataclass(slots=True, kw_only=True)
class Horizon:
    """When a run ends: requests arrive until `duration_s`, those that did may take `drain_s` more.

    Finetuning goes on while requests drain, so that the last ones are served under the same conditions;
    rates count what was done by `duration_s`. One without an end can be ended while its loop runs.
    """

    duration_s: float = math.inf
    drain_s: float = math.inf

    def __post_init__(self) -> None:
        if not self.duration_s > 0:
            raise ValueError(f"workload.duration_s must be above 0 seconds, got {self.duration_s}")
        if not self.drain_s >= 0:
            raise ValueError(f"run.drain_s must be at least 0 seconds, got {self.drain_s}")

    def end(self, now_s: float) -> None:
        """Nothing arrives any more, and what still runs is left as it is."""
        self.duration_s, self.drain_s = now_s, 0.0


class PolicyError(RuntimeError):
    """A policy raised something, or its plan is none that can be carried out; its cause says where."""

    def __init__(self, line: str, policy_file: str) -> None:
        """`policy_file` is where the policy's class stands: a user looks for the mistake there."""
        super().__init__(line, policy_file)
        self.line = line
        self.policy_file = policy_file

    def __str__(self) -> str:
        return self.line


class StuckPolicy(PolicyError):
    """A policy that plans nothing although there is work and nothing will change."""


def run_loop(
    state: PipelineState,
    policy: Policy,
    arrivals: Arrivals,
    horizon: Horizon,
) -> Generator[Command, Done, None]:
    """Run one pipeline until its horizon. Modifies `state`, which it closes at the end.

    Raises PolicyError for whatever goes wrong in a policy or with its plan.
    """
    now_s = 0.0
    in_flight = 0
    wait, lookahead = Wait(), state.limits.lookahead
    due, view, apply, commit, decide = arrivals.due, state.view, state.apply, state.commit, policy.plan
    running = state.running
    while True:
        duration_s = horizon.duration_s
        latest_s = now_s if now_s < duration_s else duration_s
        looking = True
        while looking:
            looking = False
            for request in due(latest_s):
                if not state.arrive(request):
                    # Refused the moment it came: by now its client may have asked again.
                    arrivals.ended(request.id, request.arrival_s)
                    looking = True
        # With something running before the horizon, the answer needs no call.
        over = False if running and now_s < duration_s else _over(state, arrivals, horizon, now_s)
        work = None
        if not over:
            seen = view(now_s)
            try:
                plan = decide(seen)
                if type(plan) is not Plan:
                    raise TypeError(f"plan() returned {plan!r}, not a Plan")
                if plan.finetune or plan.prefills or plan.preempted or (plan.decode and state.decode_count):
                    work = apply(plan, now_s)
            except Exception as error:
                raise PolicyError(
                    *_told(policy, now_s, f"{type(error).__name__}: {error}".removesuffix(": "))
                ) from error
        if work is not None:
            yield _new(Execute, (plan, work))
            in_flight += 1
            if in_flight <= lookahead:
                continue
        elif over and in_flight == 0:
            break
        if in_flight:
            now_s, ended, aborted, failed = yield wait
            in_flight -= 1
            gone = commit(now_s, ended, aborted, failed)
        else:
            until_s, changes = _next_event_s(state, arrivals, horizon, now_s)
            if not (changes or plan is LATER) and policy.serves and state.unfinished:
                what = (
                    f"nothing planned with {len(state.running)} running and {len(state.waiting)} waiting requests, "
                    "and nothing else will arrive"
                )
                raise StuckPolicy(*_told(policy, now_s, what))
            done = yield Sleep(until_s)
            now_s = done.now_s
            gone = state.abort(done.aborted)
        for id in gone:
            arrivals.ended(id, now_s)
    state.close()


def _told(policy: Policy, now_s: float, what: str) -> tuple[str, str]:
    """The line and file of a PolicyError. A policy that only passes on what another plans names it as `stands_for`."""
    blamed = type(getattr(policy, "stands_for", policy))
    file = getattr(sys.modules.get(blamed.__module__), "__file__", None)
    return f"policy {blamed.__name__} at {now_s:.6f} s: {what}", file or ""


def _over(state: PipelineState, arrivals: Arrivals, horizon: Horizon, now_s: float) -> bool:
    if now_s >= horizon.duration_s:
        return state.unfinished == 0 or now_s >= horizon.duration_s + horizon.drain_s
    if state.unfinished or state.jobs.active or state.jobs.next_start_s < math.inf:
        return False
    return arrivals.next_s() is None


def _next_event_s(
    state: PipelineState, arrivals: Arrivals, horizon: Horizon, now_s: float
) -> tuple[float, bool]:
    """The next time at which something can change by itself, and whether it is more than a horizon."""
    end_s = horizon.duration_s if now_s < horizon.duration_s else horizon.duration_s + horizon.drain_s
    arrival_s = arrivals.next_s() if now_s < horizon.duration_s else None
    change_s = min(math.inf if arrival_s is None else arrival_s, state.jobs.next_start_s)
    return min(change_s, end_s), change_s < math.inf
