"""Attention times on a grid of (prefill chunk, its context, decodes, their context), linear along each axis.

Blending linearly per axis was 2-4 % off on mixed batches where blending in log space was 12-14 % off. A point
above an axis is extended along the axis's last cell, since attention grows linearly with context and with
sequences; one below it counts as its first value, since no kernel is shorter than that. Corners without a
measurement (too large for the card) are extended in the same way from those below them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

Point = tuple[int, int, int, int]


class AttentionGrid:
    """Seconds of one layer's attention."""

    def __init__(self, seconds: Mapping[Point, float], *, by_key: bool = False) -> None:
        """`seconds` by (prefill chunk, its context, decodes, context of each); 0, 0 where there is none. `by_key`: in
        place of the context, the keys that a query of the chunk sees on average but for itself, so that a chunk may
        be of several prompts."""
        self._seconds = dict(seconds)
        self.by_key = by_key
        kinds = {
            "prefill": {p for p in seconds if p[2] == 0},
            "decode": {p for p in seconds if p[0] == 0},
            "mixed": {p for p in seconds if p[0] and p[2]},
        }
        for kind, points in kinds.items():
            if not points:
                raise ValueError(f"the attention profile has no {kind} rows")
        self._axes = {
            kind: [sorted({p[axis] for p in points}) for axis in range(4)] for kind, points in kinds.items()
        }

    def at(self, chunk: float, before: float, decodes: float, context: float) -> float:
        """Seconds at any point; 0 without any token."""
        if chunk == 0 and decodes == 0:
            return 0.0
        kind = "decode" if chunk == 0 else "prefill" if decodes == 0 else "mixed"
        a, b, c, d = (
            _cell(axis, value)
            for axis, value in zip(self._axes[kind], (chunk, before, decodes, context), strict=True)
        )
        return sum(
            wa * wb * wc * wd * self._corner((i, j, k, m))
            for i, wa in a
            for j, wb in b
            for k, wc in c
            for m, wd in d
        )

    def _corner(self, point: Point) -> float:
        seconds = self._seconds.get(point)
        if seconds is None:
            seconds = self._seconds[point] = self._beyond(point)
        return seconds

    def _beyond(self, point: Point) -> float:
        """A corner without a measurement, from the two measured ones next below it along some axis."""
        for axis in (3, 1, 2, 0):
            line = sorted((p[axis], s) for p, s in self._seconds.items() if _aligned(p, point, axis))
            if len(line) >= 2:
                (low, low_s), (high, high_s) = line[-2:]
                return high_s + (high_s - low_s) / (high - low) * (point[axis] - high)
        raise ValueError(f"the attention profile has too few rows below {point}")


def _aligned(below: Point, point: Point, axis: int) -> bool:
    """The two differ along `axis` alone, and `below` is lower there."""
    return below[axis] < point[axis] and all(below[i] == point[i] for i in range(4) if i != axis)


def _cell(axis: Sequence[int], value: float) -> tuple[tuple[int, float], ...]:
    """The grid values around `value` with their shares; above the axis one share is negative."""
    if len(axis) == 1 or value <= axis[0]:
        return ((axis[0], 1.0),)
    high = min(bisect_left(axis, value), len(axis) - 1)
    if axis[high] == value:
        return ((axis[high], 1.0),)
    low = high - 1
    share = (value - axis[low]) / (axis[high] - axis[low])
    return ((axis[low], 1.0 - share), (axis[high], share))
