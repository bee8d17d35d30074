"""How much longer decode attention takes when its sequences are not equally long.

The profile measured, for the same sequences, the time with all at the mean context, with all at the
longest, and as they were: t = t_mean + alpha (t_longest - t_mean). It gives alpha in boxes of the batch's
shape. A kernel that does not split long sequences ends with its longest one, so alpha is large for few
sequences per multiprocessor and goes to zero for many.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import NamedTuple


class Box(NamedTuple):
    """Upper bounds of a box: decodes, share of heavy ones, longest context, prefill context."""

    decodes: float
    share: float
    longest: float
    before: float


class Skew:
    """alpha by prefill chunk and box; empty is alpha 0 everywhere."""

    def __init__(self, alphas: Mapping[int, Mapping[Box, tuple[float, int]]]) -> None:
        """`alphas`: prefill chunk -> box -> (alpha, samples it was fitted on)."""
        self._alphas = {chunk: dict(boxes) for chunk, boxes in sorted(alphas.items())}
        self._chunks = list(self._alphas)
        self._found: dict[tuple[int, Box], float] = {}
        self._bounds = [
            sorted({box[axis] for boxes in alphas.values() for box in boxes})
            for axis in range(len(Box._fields))
        ]

    def at(self, chunk: int, decodes: int, share: float, longest: float, before: float) -> float:
        """alpha; `share` is (mean - shortest) / (longest - shortest) of the decodes' contexts.

        A box without measurements has the mean of those with as many decodes beside the same chunk.
        """
        if not self._chunks:
            return 0.0
        values = (decodes, share, longest, max(before, 0.0))
        box = Box(*(_bound(bounds, v) for bounds, v in zip(self._bounds, values, strict=True)))
        nearest = min(self._chunks, key=lambda c: abs(math.log2((c + 1) / (chunk + 1))))
        key = (nearest, box)
        alpha = self._found.get(key)
        if alpha is None:
            alpha = self._found[key] = self._alpha(nearest, box)
        return alpha

    def _alpha(self, chunk: int, box: Box) -> float:
        boxes = self._alphas[chunk]
        if box in boxes:
            return boxes[box][0]
        alike = [fit for other, fit in boxes.items() if other.decodes == box.decodes] or list(boxes.values())
        samples = sum(count for _, count in alike)
        return sum(alpha * count for alpha, count in alike) / samples


def _bound(bounds: list[float], value: float) -> float:
    """The smallest upper bound that holds `value`, or the largest there is."""
    return bounds[min(bisect_left(bounds, value), len(bounds) - 1)]
