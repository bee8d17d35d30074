"""Builders of workloads: one class for each kind of config under `configs/workload`.

`build(seed, slo_names)` does all the work. Arrivals, lengths, SLO classes and adapters are drawn from
streams of their own, so that changing one of them leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, inf
from typing import Any, Protocol

import numpy as np

from sim.errors import nearest
from sim.workload.arrivals import ArrivalProcess
from sim.workload.checks import check_choice, check_number, check_whole
from sim.workload.files import check_file
from sim.workload.lengths import Lengths
from sim.workload.mix import AdapterMix, SloMix
from sim.workload.readers.plain import CsvReader
from sim.workload.source import ClosedLoop
from sim.workload.streams import stream
from sim.workload.table import RequestTable
from sim.workload.workload import Workload

MOST_REQUESTS = 10_000_000
"""More would not fit the memory of a large machine: 500,000 simulated requests take 0.86 GiB."""
LONGEST_S = 10_000_000
"""Sixteen weeks: 200 million iterations of 50 ms."""
MOST_CLIENTS = 100_000
"""Each has random streams of its own, some 10 kB."""
LONG_S = 6 * 3600
"""Of a trace that is simulated to its end: half a million iterations of 50 ms on each pipeline."""
HIGH_RPS = 100.0
"""More than what any dozen devices serve of a model that is worth simulating."""
SHORTEST_RETRY_S = 1e-3
"""Every pause is a moment that the simulation comes to."""
DRAWS = 64
"""Requests that a closed-loop client draws at a time."""


class TraceReader(Protocol):
    """Reads one format of trace."""

    def read(self, file: str | Sequence[str]) -> RequestTable:
        """The requests of the file; ValueError names the file, and in it the row and column."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Requests of an arrival process with lengths from a distribution."""

    name: str
    arrivals: ArrivalProcess
    lengths: Lengths
    duration_s: float
    rate_rps: float
    """Mean rate, as the arrival process has it."""
    max_requests: int | None = None
    adapters: AdapterMix = field(default_factory=AdapterMix)
    slo_mix: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("workload.duration_s", self.duration_s, above=0)
        if self.max_requests is not None:
            check_whole("workload.max_requests", self.max_requests, at_least=1)
        if self.arrivals.rate_rps != self.rate_rps:
            raise ValueError(
                f"workload.arrivals.rate_rps follows workload.rate_rps {self.rate_rps}; "
                f"set that one alone, got {self.arrivals.rate_rps}"
            )

    def build(self, seed: int, slo_names: Sequence[str]) -> Workload:
        _check_count(self.rate_rps, self.duration_s)
        arrival_s = self.arrivals.times_s(self.duration_s, stream(seed, "arrivals"))
        if len(arrival_s) == 0:
            raise ValueError(
                f"workload {self.name}: no request arrives at workload.rate_rps {self.rate_rps:g} "
                f"in workload.duration_s {self.duration_s:g}; raise one of them"
            )
        prompt_tokens, output_tokens = self.lengths.draw(
            len(arrival_s), stream(seed, "prompt_tokens"), stream(seed, "output_tokens")
        )
        table = RequestTable(
            name=self.name,
            duration_s=self.duration_s,
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        table = table.head(self.max_requests) if self.max_requests is not None else table
        return Workload.of(_labelled(table, seed, slo_names, self.slo_mix, self.adapters))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests of a recorded trace, cut and stretched.

    In this order: requests that are too long are left out; the trace is cut at `start_s`; then
    - neither rate_rps nor duration_s: the rest as it was;
    - duration_s alone: that many seconds as they were;
    - rate_rps alone: all the rest, stretched to the rate;
    - both: as many requests as the rate needs for the duration, stretched to fill it exactly.
    A trace too short for what is asked is refused, or starts again when `repeat` is true.
    """

    name: str | None
    """None is the file's, without its suffix."""
    file: str | Sequence[str] | None
    """Path, or several of which the first that exists is read; see `find_file`."""
    reader: TraceReader
    rate_rps: float | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    repeat: bool = False
    max_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_total_tokens: int | None = None
    adapters: AdapterMix = field(default_factory=AdapterMix)
    slo_mix: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.file is not None:
            check_file("workload.file", self.file)
        check_number("workload.start_s", self.start_s, at_least=0)
        for key in ("rate_rps", "duration_s"):
            if getattr(self, key) is not None:
                check_number(f"workload.{key}", getattr(self, key), above=0)
        for key in ("max_requests", "max_prompt_tokens", "max_total_tokens"):
            if getattr(self, key) is not None:
                check_whole(f"workload.{key}", getattr(self, key), at_least=1)
        if not isinstance(self.repeat, bool):
            raise ValueError(f"workload.repeat must be true or false, got {self.repeat!r}")

    def build(self, seed: int, slo_names: Sequence[str]) -> Workload:
        if self.file is None:
            raise ValueError("workload.file must be the path of a trace, such as my.csv; got none")
        table = self.reader.read(self.file)
        table = table if self.name is None else replace(table, name=self.name)
        table = table.filter(max_prompt_tokens=self.max_prompt_tokens, max_total_tokens=self.max_total_tokens)
        if self.start_s >= table.duration_s:
            raise ValueError(
                f"workload.start_s must be below {table.duration_s:g}, the end of {table.name}, got {self.start_s:g}"
            )
        if self.start_s > 0:
            table = table.slice(self.start_s)
        table = self._stretched(table)
        if table.duration_s > LONGEST_S:
            raise ValueError(
                f"workload {table.name}: the trace lasts {table.duration_s:g} s, of which at most {LONGEST_S:,} can "
                f"be run; {self._unit}take a part of it with workload.duration_s, or a higher workload.rate_rps"
            )
        table = table.head(self.max_requests) if self.max_requests is not None else table
        table = replace(table, notes=(*table.notes, *self._pace_notes(table)))
        return Workload.of(_labelled(table, seed, slo_names, self.slo_mix, self.adapters))

    def _pace_notes(self, table: RequestTable) -> list[str]:
        """Of a trace whose own times are so long or so short that they may be in another unit."""
        if self.rate_rps is not None:
            return []
        too_long = self.duration_s is None and table.duration_s > LONG_S
        if not too_long and (table.rate_rps < HIGH_RPS or table.arrival_s[-1] == 0):
            return []
        long = f"{table.duration_s / 3600:,.1f} hours" if too_long else f"{table.duration_s:,.3g} s"
        return [
            f"{table.name}: {len(table):,} requests in {long}, a mean of {table.rate_rps:.3g} per second, are "
            f"simulated ({self._unit}workload.duration_s takes a part, workload.rate_rps another rate)"
        ]

    @property
    def _unit(self) -> str:
        """In which a user's own trace has its times."""
        return "arrival_s is in seconds; " if isinstance(self.reader, CsvReader) else ""

    def _stretched(self, table: RequestTable) -> RequestTable:
        if self.duration_s is None:
            return table if self.rate_rps is None else table.at_rate(self.rate_rps)
        if self.rate_rps is None:
            _check_count(len(table) / table.duration_s, self.duration_s)
            copies = self._copies(self.duration_s / table.duration_s, table)
            return table.repeat(copies).slice(0, self.duration_s)
        _check_count(self.rate_rps, self.duration_s)
        count = max(1, round(self.rate_rps * self.duration_s))
        copies = self._copies(count / len(table), table)
        return table.repeat(copies).head(count).at_rate(count / self.duration_s)

    def _copies(self, needed: float, table: RequestTable) -> int:
        if needed > 1 and not self.repeat:
            have = f"{len(table)} requests in {table.duration_s:.6g} s from start_s {self.start_s:g}"
            asked = {"rate_rps": self.rate_rps, "duration_s": self.duration_s}
            wanted = " and ".join(f"{key} {value:g}" for key, value in asked.items() if value is not None)
            raise ValueError(
                f"workload {table.name}: the trace has {have}, {needed:.3g} times too few for {wanted}; "
                "ask for less, or let it start again at its end with workload.repeat=true"
            )
        return max(1, ceil(needed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Clients that wait for their answers: see `ClosedLoop`.

    Every client has its own streams: its j-th request and pause are the same whatever the policy.
    """

    name: str
    clients: int
    lengths: Lengths
    duration_s: float
    think_s: float = 0.0
    """Mean pause between an answer and the next request."""
    think: str = "exponential"
    ramp_s: float = 0.0
    retry_s: float = 1.0
    max_requests: int | None = None
    adapters: AdapterMix = field(default_factory=AdapterMix)
    slo_mix: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_whole("workload.clients", self.clients, at_least=1, at_most=MOST_CLIENTS)
        check_number("workload.duration_s", self.duration_s, above=0)
        _check_length(self.duration_s)
        check_number("workload.think_s", self.think_s, at_least=0)
        check_choice("workload.think", self.think, ("exponential", "constant"))
        check_number("workload.ramp_s", self.ramp_s, at_least=0, at_most=self.duration_s)
        check_number("workload.retry_s", self.retry_s, at_least=SHORTEST_RETRY_S)
        if self.max_requests is not None:
            check_whole("workload.max_requests", self.max_requests, at_least=1)

    def build(self, seed: int, slo_names: Sequence[str]) -> Workload:
        slos = SloMix.of(self.slo_mix, slo_names)
        stream(seed, "clients")  # a bad seed is refused here and not at the first request
        source = partial(
            ClosedLoop,
            clients=self.clients,
            draws=partial(self._draws, seed, slos),
            duration_s=self.duration_s,
            ramp_s=self.ramp_s,
            retry_s=self.retry_s,
            max_requests=inf if self.max_requests is None else self.max_requests,
        )
        return Workload(name=self.name, duration_s=self.duration_s, table=None, arrivals=source)

    def _draws(
        self, seed: int, slos: SloMix, client: int
    ) -> Iterator[tuple[int, int, str, str | None, float]]:
        purposes = ("prompt_tokens", "output_tokens", "slo", "adapter", "think")
        prompt_rng, output_rng, slo_rng, adapter_rng, think_rng = (stream(seed, p, client) for p in purposes)
        adapters: tuple[str | None, ...] = (None, *self.adapters.names[1:])
        while True:
            prompt_tokens, output_tokens = self.lengths.draw(DRAWS, prompt_rng, output_rng)
            pauses_s = think_rng.exponential(self.think_s, DRAWS) if self.think == "exponential" else None
            yield from zip(
                prompt_tokens.tolist(),
                output_tokens.tolist(),
                [slos.names[code] for code in slos.draw(DRAWS, slo_rng).tolist()],
                [adapters[code] for code in self.adapters.draw(DRAWS, adapter_rng).tolist()],
                [self.think_s] * DRAWS if pauses_s is None else pauses_s.tolist(),
                strict=True,
            )


def _check_count(rate_rps: float, duration_s: float) -> None:
    """Refuse more requests than a run can hold, and a window that no run gets to the end of."""
    if rate_rps * duration_s > MOST_REQUESTS:
        raise ValueError(
            f"workload.rate_rps x workload.duration_s must be at most {MOST_REQUESTS:,} requests, "
            f"got {rate_rps:g} x {duration_s:g} = {rate_rps * duration_s:.3g}"
        )
    _check_length(duration_s)


def _check_length(duration_s: float) -> None:
    if duration_s > LONGEST_S:
        raise ValueError(f"workload.duration_s must be at most {LONGEST_S:,} seconds, got {duration_s:g}")


def _labelled(
    table: RequestTable,
    seed: int,
    slo_names: Sequence[str],
    slo_mix: Mapping[str, float] | None,
    adapters: AdapterMix,
) -> RequestTable:
    """`table` with SLO classes and adapters: its own where a trace states them, else drawn."""
    changes: dict[str, Any] = {}
    if table.slo_names == ("default",) and not table.slo_places:
        mix = SloMix.of(slo_mix, slo_names)
        changes |= {"slo": mix.draw(len(table), stream(seed, "slo")), "slo_names": mix.names}
    elif slo_mix is not None:
        raise ValueError(f"workload.slo_mix: {table.name} states a class for each request; leave slo_mix out")
    else:
        _check_classes(table, slo_names)
    if len(table.adapter_names) == 1:
        codes = adapters.draw(len(table), stream(seed, "adapter"))
        changes |= {"adapter": codes, "adapter_names": adapters.names}
    elif adapters.count > 0:
        raise ValueError(f"workload.adapters: {table.name} states its adapters; leave count at 0")
    return replace(table, **changes)


def _check_classes(table: RequestTable, slo_names: Sequence[str]) -> None:
    used, first = np.unique(table.slo, return_index=True)
    for code in used[np.argsort(first)].tolist():
        name = table.slo_names[code]
        if name not in slo_names:
            place = f"{table.slo_places[code]}, column slo" if table.slo_places else table.name
            empty = " (as an empty cell is read)" if name == "default" else ""
            raise ValueError(
                f"{place}: no SLO class {name!r}{empty}; the slo config has {', '.join(slo_names)}"
                f"{nearest(name, slo_names)}"
            )
