"""Where requests come from, as the loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sim.core.request import Request


class Arrivals(Protocol):
    """A source of requests in order of arrival. It never blocks and never reads a clock."""

    def next_s(self) -> float | None:
        """Time of the next arrival; `inf` when it depends on requests still running; None when no
        more will ever come."""
        ...

    def due(self, now_s: float) -> Sequence[Request]:
        """Remove and return the requests with `arrival_s <= now_s`, in order of (arrival, id)."""
        ...

    def ended(self, request_id: int, now_s: float) -> None:
        """A request finished, was aborted, or was rejected in the moment it arrived: closed-loop clients think of
        their next. After a rejection the loop asks `due` again, for those that came by now."""
        ...
