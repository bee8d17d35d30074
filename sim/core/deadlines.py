"""The earliest time at which some decoding sequence must have its next token.

A sequence keeps its mean TPOT if its k-th token after the first comes by `first + k * tpot`. All decoding
sequences advance together, so that is `base + tick * tpot` with a `base` fixed when it joins: one heap per
TPOT bound, and the earliest deadline at any tick is read from the tops.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from sim.core.sequence import Sequence


class TokenDeadlines:
    """Deadlines of the decoding sequences whose class bounds TPOT."""

    def __init__(self) -> None:
        self._heaps: dict[float, list[tuple[float, int]]] = {}
        self._base_s: dict[int, float] = {}

    def add(self, sequence: Sequence) -> None:
        """A decoding sequence whose last prefill's token has its time."""
        tpot_s = sequence.slo.tpot_s
        if tpot_s == math.inf:
            return
        assert sequence.first_token_s is not None
        ahead = sequence.generated_tokens - 1 - sequence.start_tick
        base_s = self._base_s[sequence.id] = sequence.first_token_s + ahead * tpot_s
        heappush(self._heaps.setdefault(tpot_s, []), (base_s, sequence.id))

    def remove(self, sequence: Sequence) -> None:
        """The sequence decodes no more; its heap entry is dropped when it surfaces."""
        self._base_s.pop(sequence.id, None)

    def earliest_s(self, tick: int) -> float:
        """Deadline of the token that decode tick `tick` gives; `inf` when there is none."""
        earliest = math.inf
        for tpot_s, heap in self._heaps.items():
            while heap:
                base_s, id = heap[0]
                if self._base_s.get(id) == base_s:
                    deadline_s = base_s + tick * tpot_s
                    if deadline_s < earliest:
                        earliest = deadline_s
                    break
                heappop(heap)
        return earliest
