"""The waiting requests, in order of admission."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from sim.core.sequence import Sequence
from sim.core.work import Chunk

ORDERS: dict[str, Callable[[Sequence], float]] = {
    "fcfs": lambda s: s.arrival_s,
    "deadline": lambda s: s.arrival_s + min(s.slo.first_token_s, 1e12),
    "shortest": lambda s: s.prompt_tokens,
}
"""Admission order -> key; equal keys keep their order of arrival. An absent bound is a far one, so
that such requests still go first-come first-served among themselves."""


Entry = tuple[float, int, Sequence]
"""Key, order of arrival, sequence: no two compare equal before the sequence."""


class AdmissionQueue:
    """Sequences by key, behind those that were put back at the front.

    A heap, so that a queue of hundreds of thousands costs O(log n) whatever its order. Looking at its first k
    in order takes O(k log k) and changes nothing: the next one is always a child of one seen.
    """

    def __init__(self, order: str) -> None:
        self._key = ORDERS[order]
        self._returned: list[Sequence] = []
        """Those that were put back, the first of them at the end; in front whatever their key."""
        self._heap: list[Entry] = []
        self._last: Entry | None = None
        """The largest entry of the heap, which leaves it last."""
        self._added = 0
        self.tightest_s = math.inf
        """Tightest bound on the first token among all that have come so far."""
        self.count = 0
        """How many wait; an attribute, since it is asked several times per iteration."""
        self.tokens = 0
        """Known tokens of all waiting sequences."""
        self.attention_pairs = 0.0
        """Query-key pairs of computing them all."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sequence]:
        yield from reversed(self._returned)
        heap = self._heap
        seen = [(heap[0], 0)] if heap else []
        while seen:
            (_, _, sequence), index = heappop(seen)
            yield sequence
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heappush(seen, (heap[child], child))

    def add(self, sequence: Sequence) -> None:
        entry = (self._key(sequence), self._added, sequence)
        self._added += 1
        if sequence.slo.first_token_s < self.tightest_s:
            self.tightest_s = sequence.slo.first_token_s
        heappush(self._heap, entry)
        if self._last is None or entry > self._last:
            self._last = entry
        self._count(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Insert at the very front."""
        self._returned.append(sequence)
        self._count(sequence)

    def first(self) -> Sequence:
        return self._returned[-1] if self._returned else self._heap[0][2]

    def last(self) -> Sequence:
        return self._returned[0] if self._last is None else self._last[2]

    def take(self) -> Sequence:
        """Remove and return the first."""
        if self._returned:
            sequence = self._returned.pop()
        else:
            sequence = heappop(self._heap)[2]
            if not self._heap:
                self._last = None
        self._discount(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is not served any more; O(n), for aborts."""
        if sequence in self._returned:
            self._returned.remove(sequence)
        else:
            self._heap = [entry for entry in self._heap if entry[2] is not sequence]
            heapify(self._heap)
            self._last = max(self._heap, default=None)
        self._discount(sequence)

    def _count(self, sequence: Sequence) -> None:
        self.count += 1
        self.tokens += sequence.known_tokens
        self.attention_pairs += Chunk(sequence.known_tokens, 0).attention_pairs

    def _discount(self, sequence: Sequence) -> None:
        self.count -= 1
        self.tokens -= sequence.known_tokens
        self.attention_pairs -= Chunk(sequence.known_tokens, 0).attention_pairs
