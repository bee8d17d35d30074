"""The earliest time at which some decoding sequence must have its next token.

A sequence keeps its mean TPOT if its k-th token after the first comes by `first + k * tpot`. All decoding
sequences advance together, so that is `base + tick * tpot` with a `base` fixed when it joins: one heap per
TPOT bound, and the earliest deadline at any tick is read from the tops.

An entry of a sequence that decodes no more is dropped when it comes to the top. While iterations are shorter
than the bound each newer base is earlier, so most never would: a heap mostly of such entries is made anew.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

from sim.core.sequence import Sequence


class TokenDeadlines:
    """Deadlines of the decoding sequences whose class bounds TPOT."""

    def __init__(self) -> None:
        self._heaps: dict[float, list[tuple[float, int]]] = {}
        self._base_s: dict[int, float] = {}
        self._tops: list[tuple[float, float]] | None = []
        """(earliest base, bound) of each heap; None when they may have changed."""

    def add(self, sequence: Sequence) -> None:
        """A decoding sequence whose last prefill's token has its time."""
        tpot_s = sequence.slo.tpot_s
        if tpot_s == math.inf:
            return
        assert sequence.first_token_s is not None
        ahead = sequence.generated_tokens - 1 - sequence.start_tick
        base_s = self._base_s[sequence.id] = sequence.first_token_s + ahead * tpot_s
        heappush(self._heaps.setdefault(tpot_s, []), (base_s, sequence.id))
        self._tops = None

    def remove(self, sequence: Sequence) -> None:
        """The sequence decodes no more; its heap entry is dropped later."""
        if self._base_s.pop(sequence.id, None) is not None:
            self._tops = None

    def earliest_s(self, tick: int) -> float:
        """Deadline of the token that decode tick `tick` gives; `inf` when there is none."""
        if self._tops is None:
            self._tops = self._find_tops()
        earliest = math.inf
        for base_s, tpot_s in self._tops:
            deadline_s = base_s + tick * tpot_s
            if deadline_s < earliest:
                earliest = deadline_s
        return earliest

    def _find_tops(self) -> list[tuple[float, float]]:
        tops = []
        for tpot_s, heap in self._heaps.items():
            if len(heap) > 2 * len(self._base_s) + 64:
                heap[:] = [entry for entry in heap if self._base_s.get(entry[1]) == entry[0]]
                heapify(heap)
            while heap and self._base_s.get(heap[0][1]) != heap[0][0]:
                heappop(heap)
            if heap:
                tops.append((heap[0][0], tpot_s))
        return tops
