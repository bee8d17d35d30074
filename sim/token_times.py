"""Token times of a run, counted and not listed.

All sequences that run on a pipeline share its tick times, so a gap between two ticks is one value whose multiplicity
is the number of sequences running over it: two counts per segment and a running sum give all of them, and a weighted
percentile equals that of the expanded list. Cost is O(requests + ticks) however many tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class TokenTimes:
    """The token times of a run as segments and shared ticks, asked without listing them."""

    def __init__(self, ticks: Mapping[str, Floats], segments: Mapping[str, Floats], pipelines: int) -> None:
        """`ticks` and `segments` are the columns of those tables."""
        by_pipeline = np.argsort(ticks["pipeline"], kind="stable")
        self._tick_s = ticks["end_s"][by_pipeline]
        counts = np.bincount(ticks["pipeline"].astype(np.int64), minlength=pipelines)
        self._offsets = np.concatenate(([0], np.cumsum(counts)))
        """Pipeline p's ticks are `_tick_s[_offsets[p] : _offsets[p + 1]]`."""

        order = np.lexsort((segments["first_s"], segments["request"]))
        self.request = segments["request"][order]
        self._pipeline = segments["pipeline"][order].astype(np.int64)
        self._start = segments["start_tick"][order].astype(np.int64)
        self._end = segments["end_tick"][order].astype(np.int64)
        self._first_s = segments["first_s"][order]
        assert (self._end >= self._start).all()
        assert (self._end <= counts[self._pipeline]).all()

    def counts_by(self, time_s: float) -> NDArray[np.int64]:
        """Tokens of each segment, in the order of `request`, that came by `time_s` (<=)."""
        ticks_by = np.array(
            [np.searchsorted(self._tick_s[a:b], time_s, side="right") for a, b in self._spans()],
            dtype=np.int64,
        )
        last = np.minimum(self._end, ticks_by[self._pipeline])
        return np.maximum(last - self._start, 0) + (self._first_s <= time_s)

    def gaps(self, chosen: Bools) -> tuple[Floats, NDArray[np.int64]]:
        """Gaps between consecutive tokens of the chosen segments, in seconds, and how often each is there.

        A segment has the gap from `first_s` to its first tick and those between its ticks. A request's
        later segment has also the gap from the last token of the one before, which must be chosen too.
        """
        base = self._offsets[self._pipeline]
        run = self._end > self._start
        first_index, last_index = base + self._start, base + self._end - 1
        last_s = self._first_s.copy()
        last_s[run] = self._tick_s[last_index[run]]

        some = chosen & run
        to_tick = self._tick_s[first_index[some]] - self._first_s[some]
        returned = np.flatnonzero(chosen[1:] & (self.request[1:] == self.request[:-1])) + 1
        waits = self._first_s[returned] - last_s[returned - 1]

        size = self._tick_s.size + 1
        times = np.bincount(first_index[some] + 1, minlength=size)
        times -= np.bincount(last_index[some] + 1, minlength=size)
        np.cumsum(times, out=times)
        times = times[1:-1]  # over each gap between two ticks
        shared = times > 0
        values = np.concatenate((np.diff(self._tick_s)[shared], to_tick, waits))
        ones = np.ones(to_tick.size + waits.size, dtype=np.int64)
        return values, np.concatenate((times[shared], ones))

    def _spans(self) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in zip(self._offsets[:-1], self._offsets[1:], strict=True)]


def weighted_percentiles(
    values: Floats, weights: NDArray[np.int64], percents: Sequence[float]
) -> list[float]:
    """What `numpy.percentile` (linear) gives for each value repeated `weights` times; NaN of nothing."""
    total = int(weights.sum())
    if total == 0:
        return [math.nan] * len(percents)
    order = np.argsort(values)
    up_to = weights[order]
    np.cumsum(up_to, out=up_to)

    def at(position: int) -> float:
        return float(values[order[np.searchsorted(up_to, position, side="right")]])

    out = []
    for percent in percents:
        position = percent / 100 * (total - 1)
        below = math.floor(position)
        low, high = at(below), at(min(below + 1, total - 1))
        out.append(low + (high - low) * (position - below))
    return out
