"""Which K/V blocks belong to which sequence: the block ids behind the counts of `KvBlocks`.

The simulator needs only counts. An engine also needs to know which block holds which token, and learns it
here from what the loop shows to everybody: requests as they arrive, plans as they are launched, and the ids
that `Arrivals.ended` is told. Nothing is reported back, so the loop is the same with or without it. Its
order is that of `PipelineState`: preempted sequences release first, then decodes grow, then chunks.

A sequence also has a slot, one of `max_sequences`, while it holds blocks: the row of the table that a device
keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.core.plan import Limits, Plan
from sim.core.request import Request


class Span(NamedTuple):
    """Tokens of one sequence that an iteration computes."""

    id: int
    slot: int
    context: int
    """Tokens of the sequence that are in the cache before."""
    tokens: int
    sampled: bool
    """The last of them gives the sequence's next token."""


class Placement(NamedTuple):
    """What one iteration computes for inference, and where it lies."""

    decodes: tuple[Span, ...]
    """One token each, in the order in which the sequences began to decode."""
    chunks: tuple[Span, ...]
    """In the plan's order."""


class _Row:
    __slots__ = ("blocks", "cached", "id", "known", "last", "slot")

    def __init__(self, id: int, known: int, last: int) -> None:
        self.id = id
        self.slot: int | None = None
        self.cached = 0
        self.known = known
        """Tokens of prompt and output so far."""
        self.last = last
        """`known` after the last token."""
        self.blocks: list[int] = []


class BlockTables:
    """Block ids and slots of one pipeline. `apply` and `ended` change it, as the loop goes on."""

    def __init__(self, limits: Limits) -> None:
        self.block_tokens = limits.block_tokens
        blocks = limits.kv_tokens // limits.block_tokens
        self._max_tokens = min(limits.max_sequence_tokens, blocks * limits.block_tokens)
        self.table: NDArray[np.int32] = np.zeros(
            (limits.max_sequences, -(-self._max_tokens // limits.block_tokens)), np.int32
        )
        """Row `slot` lists the blocks of its sequence in order; what follows them means nothing."""
        self._free = list(range(blocks - 1, -1, -1))
        self._free_slots = list(range(limits.max_sequences - 1, -1, -1))
        self._rows: dict[int, _Row] = {}
        self._decoding: dict[int, _Row] = {}

    @property
    def free(self) -> int:
        """Blocks that no sequence holds; equals `KvBlocks.free` whenever the loop yields."""
        return len(self._free)

    def blocks(self, id: int) -> tuple[int, ...]:
        """The blocks of a request that has arrived and not ended, in order of its tokens."""
        return tuple(self._rows[id].blocks)

    def arrive(self, request: Request) -> None:
        """A request has come; the loop may still refuse it, and then says that it ended."""
        last = min(request.prompt_tokens + request.output_tokens, self._max_tokens)
        self._rows[request.id] = _Row(request.id, request.prompt_tokens, last)

    def apply(self, plan: Plan) -> Placement:
        """Follow a plan that `PipelineState.apply` has accepted."""
        for id in plan.preempted:
            self._decoding.pop(id, None)
            self._release(self._rows[id])
        decodes = self._decode() if plan.decode else ()
        return Placement(decodes, tuple([self._compute(self._rows[id], n) for id, n in plan.prefills]))

    def ended(self, id: int) -> None:
        """A request finished, was rejected or was aborted: it holds nothing any more."""
        self._decoding.pop(id, None)
        self._release(self._rows.pop(id))

    def _decode(self) -> tuple[Span, ...]:
        spans = []
        done = []
        for row in self._decoding.values():
            assert row.slot is not None
            spans.append(Span(row.id, row.slot, row.cached, 1, True))
            self._grow(row, row.cached + 1)
            row.known += 1
            if row.known == row.last:
                done.append(row.id)
        for id in done:
            del self._decoding[id]
        return tuple(spans)

    def _compute(self, row: _Row, tokens: int) -> Span:
        if row.slot is None:
            row.slot = self._free_slots.pop()
        context = row.cached
        self._grow(row, context + tokens)
        sampled = row.cached == row.known
        if sampled:
            row.known += 1
            if row.known < row.last:
                self._decoding[row.id] = row
        return Span(row.id, row.slot, context, tokens, sampled)

    def _grow(self, row: _Row, cached: int) -> None:
        row.cached = cached
        while len(row.blocks) * self.block_tokens < cached:
            block = self._free.pop()
            self.table[row.slot, len(row.blocks)] = block
            row.blocks.append(block)

    def _release(self, row: _Row) -> None:
        self._free += reversed(row.blocks)
        row.blocks.clear()
        row.cached = 0
        if row.slot is not None:
            self._free_slots.append(row.slot)
            row.slot = None
