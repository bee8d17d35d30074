"""How long iterations may last for answers to end within the end-to-end bounds of their requests.

How long an answer will be is not known before it ends. It is taken to be as long as nearly all are that have ended
in its SLO class, and to go on for a part of what it has got so far where that is more.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

from sim.core.sequence import Sequence

NEARLY_ALL = 0.98
"""Share of the answers that are not longer than the one that policies expect."""
MOST = 0.95
"""As many as must end in time: those that routers find a place for. Where the longest would be late anywhere, requests
would be spread."""
GOES_ON = 0.25
"""Part of its tokens so far that an answer is expected to go on for at least."""
REMEMBERED = 500
"""Last answers of a class from which the next are expected."""
EVERY = 8
"""Decode ticks from one look at all answers to the next."""


class AnswerPace:
    """The decoding sequences whose class bounds the end-to-end time, and how long answers of their classes were."""

    def __init__(self) -> None:
        self._decoding: dict[int, Sequence] = {}
        self._lengths: dict[str, _Lengths] = {}
        self._pace_s = math.inf
        self._look_at = 0

    def add(self, sequence: Sequence) -> None:
        """A decoding sequence whose last prefill's token has its time."""
        if sequence.slo.e2e_s < math.inf:
            self._decoding[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """The sequence decodes no more."""
        self._decoding.pop(sequence.id, None)

    def finished(self, sequence: Sequence) -> None:
        """Its answer has ended, by itself."""
        if sequence.slo.e2e_s < math.inf:
            self._lengths.setdefault(sequence.slo.name, _Lengths()).add(sequence.generated_tokens)

    def expected_tokens(self, slo: str) -> int:
        """Tokens that most answers of the class do not exceed; 0 while none has ended."""
        lengths = self._lengths.get(slo)
        return 0 if lengths is None else lengths.longest(MOST)

    def pace_s(self, tick: int, now_s: float) -> float:
        """Seconds per iteration, after decode tick `tick`, with which every answer ends in time; `inf` where no
        bound is. A bound that is already lost counts as none. Up to `EVERY` ticks old."""
        if not self._decoding:
            self._look_at = tick
            return math.inf
        if tick >= self._look_at:
            self._look_at = tick + EVERY
            self._pace_s = self._find_pace(tick, now_s)
        return self._pace_s

    def _find_pace(self, tick: int, now_s: float) -> float:
        expected = {name: lengths.longest(NEARLY_ALL) for name, lengths in self._lengths.items()}
        pace_s = math.inf
        for sequence in self._decoding.values():
            left_s = sequence.arrival_s + sequence.slo.e2e_s - now_s
            if left_s > 0:
                tokens = sequence.generated_tokens + tick - sequence.start_tick
                left = max(expected.get(sequence.slo.name, 0) - tokens, GOES_ON * tokens)
                pace_s = min(pace_s, left_s / left)
        return pace_s


class _Lengths:
    """The last answers of one class."""

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, tokens: int) -> None:
        self._last.append(tokens)
        insort(self._sorted, tokens)
        if len(self._last) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]

    def longest(self, share: float) -> int:
        """Tokens that this share of them does not exceed."""
        return self._sorted[int(share * (len(self._sorted) - 1))]
