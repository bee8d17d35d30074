"""`Workload`: what a run is fed with, ready for any number of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim.core.arrivals import Arrivals
from sim.workload.source import TableArrivals
from sim.workload.table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests for `duration_s` seconds. `arrivals()` gives a fresh source each time it is called."""

    name: str
    duration_s: float
    table: RequestTable | None
    """The requests of an open loop; None when arrivals depend on answers."""
    arrivals: Callable[[], Arrivals]
    notes: tuple[str, ...] = ()
    """What was left out of a trace, for people."""

    @property
    def rate_rps(self) -> float | None:
        """Mean arrival rate; None when arrivals depend on answers."""
        return None if self.table is None else self.table.rate_rps

    @classmethod
    def of(cls, table: RequestTable) -> Workload:
        return cls(
            name=table.name,
            duration_s=table.duration_s,
            table=table,
            arrivals=lambda: TableArrivals(table),
            notes=table.notes,
        )
