"""`RequestTable`: requests as columns, 30 bytes each, and the operations on traces.

Requests arrive in a half-open window [0, duration_s), so that slices put together are the whole and
the mean rate is simply requests / duration_s. A trace says when its requests came and not when it was
switched off; `window_s` closes the window one mean gap after the last request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.workload.checks import check_number, check_whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """Requests in order of arrival; every column has shape (requests,). Operations return new tables."""

    name: str = "requests"
    duration_s: float
    """Requests arrive in [0, duration_s)."""
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    slo: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    """Codes into `slo_names`; empty when made: all 0."""
    slo_names: tuple[str, ...] = ("default",)
    slo_places: tuple[str, ...] = ()
    """Where a trace states each of them first, `my.csv: row 3`; empty for one that states none."""
    adapter: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Codes into `adapter_names`; empty when made: all 0, the base model."""
    adapter_names: tuple[str, ...] = ("",)
    notes: tuple[str, ...] = ()
    """What was left out or changed on the way here, for people."""

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        if count == 0:
            raise ValueError(f"{self.name}: there are no requests in it")
        for key, dtype in COLUMNS.items():
            values = getattr(self, key)
            if key in ("slo", "adapter") and len(values) == 0:
                values = np.zeros(count, dtype)
            column = np.asarray(values, dtype).view()
            if column.shape != (count,):
                raise ValueError(f"{self.name}: {key} must have shape ({count},), got {column.shape}")
            column.flags.writeable = False
            object.__setattr__(self, key, column)
        check_number(f"{self.name}: duration_s", self.duration_s, above=0)
        self._check_values()

    def _check_values(self) -> None:
        arrival_s = self.arrival_s
        inside = (arrival_s >= 0) & (arrival_s < self.duration_s)
        if not inside.all():
            row = int(np.argmin(inside))
            raise ValueError(
                f"{self.name}: arrival_s must be at least 0 and below duration_s {self.duration_s:g}, "
                f"got {arrival_s[row]} for request {row}"
            )
        if (np.diff(arrival_s) < 0).any():
            row = int(np.argmax(np.diff(arrival_s) < 0)) + 1
            raise ValueError(f"{self.name}: arrival_s must not decrease, but does at request {row}")
        for key in ("prompt_tokens", "output_tokens"):
            low = getattr(self, key) < 1
            if low.any():
                row = int(np.argmax(low))
                raise ValueError(
                    f"{self.name}: {key} must be at least 1, got {getattr(self, key)[row]} for request {row}"
                )
        for key, names in (("slo", self.slo_names), ("adapter", self.adapter_names)):
            codes = getattr(self, key)
            if codes.min() < 0 or codes.max() >= len(names):
                raise ValueError(f"{self.name}: {key} codes must be in 0..{len(names) - 1}")
        if self.adapter_names[0] != "":
            raise ValueError(f"{self.name}: adapter code 0 is the base model, got {self.adapter_names[0]!r}")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        """Mean rate over the window."""
        return len(self) / self.duration_s

    def slice(self, start_s: float, end_s: float | None = None) -> RequestTable:
        """Requests that arrive in [start_s, end_s), with times counted from start_s."""
        end_s = self.duration_s if end_s is None else end_s
        check_number(f"{self.name}: start_s", start_s, at_least=0)
        check_number(f"{self.name}: end_s", end_s, above=start_s, at_most=self.duration_s)
        first, last = np.searchsorted(self.arrival_s, (start_s, end_s), side="left").tolist()
        if first == last:
            raise ValueError(f"{self.name}: no request arrives in [{start_s:g}, {end_s:g}) s")
        return self._rows(np.arange(first, last), self.arrival_s[first:last] - start_s, end_s - start_s)

    def head(self, count: int) -> RequestTable:
        """The first `count` requests, or all; the window closes one mean gap after the last one."""
        check_whole(f"{self.name}: count", count, at_least=1)
        if count >= len(self):
            return self
        arrival_s = self.arrival_s[:count]
        return self._rows(np.arange(count), arrival_s, window_s(arrival_s))

    def at_rate(self, rate_rps: float) -> RequestTable:
        """The same requests with time stretched so that `rate_rps` is exactly the mean rate.

        All gaps are scaled alike: bursts keep their shape and the CV stays what it is.
        """
        check_number(f"{self.name}: rate_rps", rate_rps, above=0)
        duration_s = len(self) / rate_rps
        return self._rows(np.s_[:], self.arrival_s * (duration_s / self.duration_s), duration_s)

    def repeat(self, copies: int) -> RequestTable:
        """`copies` of the window one after another."""
        check_whole(f"{self.name}: copies", copies, at_least=1)
        starts_s = np.arange(copies) * self.duration_s
        arrival_s = (self.arrival_s + starts_s[:, None]).ravel()
        return self._rows(np.tile(np.arange(len(self)), copies), arrival_s, copies * self.duration_s)

    def filter(
        self,
        *,
        max_prompt_tokens: int | None = None,
        max_total_tokens: int | None = None,
    ) -> RequestTable:
        """Requests within the bounds, at the times they had; the window stays, so the rate drops."""
        keep = np.ones(len(self), bool)
        for key, values, most in (
            ("max_prompt_tokens", self.prompt_tokens, max_prompt_tokens),
            ("max_total_tokens", self.prompt_tokens + self.output_tokens, max_total_tokens),
        ):
            if most is not None:
                check_whole(f"{self.name}: {key}", most, at_least=1)
                keep &= values <= most
        if keep.all():
            return self
        if not keep.any():
            raise ValueError(
                f"{self.name}: there are no requests as short as asked for; the shortest prompt has "
                f"{self.prompt_tokens.min()} tokens, the shortest request "
                f"{(self.prompt_tokens + self.output_tokens).min()}"
            )
        dropped = len(self) - int(keep.sum())
        kept = self._rows(np.flatnonzero(keep), self.arrival_s[keep], self.duration_s)
        note = f"{dropped} of {len(self)} requests are longer than asked for and left out"
        return replace(kept, notes=(*self.notes, note))

    def _rows(self, rows: Any, arrival_s: Floats, duration_s: float) -> RequestTable:
        """`rows` of every column with other times. Rounding may not push a time out of the window.

        Rows by number are copied: a view of a few would keep all the others in memory.
        """
        return replace(
            self,
            duration_s=duration_s,
            arrival_s=np.minimum(arrival_s, np.nextafter(duration_s, 0)),
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            slo=self.slo[rows],
            adapter=self.adapter[rows],
        )


COLUMNS: dict[str, type[np.generic]] = {
    "arrival_s": np.float64,
    "prompt_tokens": np.int64,
    "output_tokens": np.int64,
    "slo": np.int16,
    "adapter": np.int32,
}


def window_s(arrival_s: Floats) -> float:
    """Length of the window of a trace that starts at 0: one mean gap after its last request.

    Then requests / window is the reciprocal of the mean gap, without the one-off of a closed interval,
    and copies of a trace follow each other at its own pace. Stamps that are all 0, and a single one,
    get 1 s after them.
    """
    last_s = float(arrival_s[-1])
    gaps = len(arrival_s) - 1
    return last_s * (gaps + 1) / gaps if last_s > 0 and gaps > 0 else last_s + 1.0
