"""The waiting requests, in order of admission."""

from __future__ import annotations

from bisect import insort_right
from collections.abc import Callable, Iterator

from sim.core.sequence import Sequence

ORDERS: dict[str, Callable[[Sequence], float]] = {
    "fcfs": lambda s: s.arrival_s,
    "deadline": lambda s: s.arrival_s + min(s.slo.ttft_s, 1e12),
    "shortest": lambda s: s.prompt_tokens,
}
"""Admission order -> key; equal keys keep their order of arrival. An absent TTFT bound is a far one,
so that such requests still go first-come first-served among themselves."""


class AdmissionQueue:
    """Sequences by key, behind those that were put back at the front.

    A list with a moving head: appending in key order and taking from the front, which is all that
    first-come first-served does, cost O(1).
    """

    def __init__(self, order: str) -> None:
        self._key = ORDERS[order]
        self._items: list[Sequence] = []
        self._head = 0
        self._returned = 0
        """How many of the first items were put back; they stay in front whatever their key."""
        self.tokens = 0
        """Known tokens of all waiting sequences."""

    def __len__(self) -> int:
        return len(self._items) - self._head

    def __iter__(self) -> Iterator[Sequence]:
        items = self._items
        for i in range(self._head, len(items)):
            yield items[i]

    def add(self, sequence: Sequence) -> None:
        insort_right(self._items, sequence, lo=self._head + self._returned, key=self._key)
        self.tokens += sequence.known_tokens

    def put_back(self, sequence: Sequence) -> None:
        """Insert at the very front."""
        if self._head:
            self._head -= 1
            self._items[self._head] = sequence
        else:
            self._items.insert(0, sequence)
        self._returned += 1
        self.tokens += sequence.known_tokens

    def first(self) -> Sequence:
        return self._items[self._head]

    def last(self) -> Sequence:
        return self._items[-1]

    def take(self) -> Sequence:
        """Remove and return the first."""
        sequence = self._items[self._head]
        self._head += 1
        self._returned = max(0, self._returned - 1)
        self.tokens -= sequence.known_tokens
        if self._head > 64 and 2 * self._head > len(self._items):
            del self._items[: self._head]
            self._head = 0
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is not served any more; O(n), for aborts."""
        index = self._items.index(sequence, self._head)
        if index < self._head + self._returned:
            self._returned -= 1
        del self._items[index]
        self.tokens -= sequence.known_tokens
