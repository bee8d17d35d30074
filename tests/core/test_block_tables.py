"""Block ids follow the counts of the pipeline's state at every step, and no block has two owners."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sim.core.block_tables import BlockTables, Placement
from sim.core.loop import Execute, Horizon, run_loop
from sim.core.plan import Limits
from sim.core.request import Request
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from tests.support import (
    FINETUNING,
    POLICIES,
    SLOS,
    Answer,
    LinearCost,
    ListArrivals,
    build_policy,
    drive,
    job_of,
    limits_of,
    requests_of,
)

SERVING = [name for name, cls in POLICIES.items() if cls.serves]


class Watched(ListArrivals):
    """Arrivals that tell the tables what the loop is told."""

    def __init__(self, requests: Seq[Request], tables: BlockTables) -> None:
        super().__init__(requests)
        self._tables = tables
        self.alive: set[int] = set()

    def due(self, now_s: float) -> Seq[Request]:
        found = super().due(now_s)
        for request in found:
            self._tables.arrive(request)
            self.alive.add(request.id)
        return found

    def ended(self, request_id: int, now_s: float) -> None:
        super().ended(request_id, now_s)
        self._tables.ended(request_id)
        self.alive.remove(request_id)


class Case:
    """A run with tables beside the state; every step is compared."""

    def __init__(
        self, name: str, requests: Seq[Request], limits: Limits, answers: Seq[tuple[str, int]]
    ) -> None:
        self.tables = BlockTables(limits)
        self.arrivals = Watched(requests, self.tables)
        jobs = [job_of([30, 7])] if name in FINETUNING else []
        self.state = PipelineState(limits=limits, slos=SLOS, recorder=Recorder(), jobs=jobs)
        self.limits = limits
        self.placements: list[Placement] = []
        self.launched: list[Placement] = []
        self.answers = list(answers)
        loop = run_loop(self.state, build_policy(name), self.arrivals, Horizon(duration_s=1000.0))
        drive(
            loop,
            lambda _, work: LinearCost().iteration_s(work),
            answer=self.answer,
            on_execute=self.execute,
        )
        self.compare()

    def execute(self, command: Execute, now_s: float) -> None:
        placement = self.tables.apply(command.plan)
        assert len(placement.decodes) == command.work.decode_count
        assert sum(s.context for s in placement.decodes) == command.work.decode_context_tokens
        assert [(s.tokens, s.context) for s in placement.chunks] == list(command.work.prefill)
        sampled = sum(s.sampled for s in (*placement.decodes, *placement.chunks))
        assert sampled == command.work.sampled_tokens
        self.placements.append(placement)
        self.launched.append(placement)
        self.compare()

    def compare(self) -> None:
        assert self.tables.free == self.state.kv.free
        owned: list[int] = []
        for id in self.arrivals.alive:
            blocks = self.tables.blocks(id)
            running = self.state.running.get(id)
            assert (running is not None) or blocks == ()
            owned += blocks
        assert len(owned) == len(set(owned)) == self.state.kv.used
        if self.placements:
            slots = [s.slot for s in (*self.placements[-1].decodes, *self.placements[-1].chunks)]
            assert len(slots) == len(set(slots))
            for span in (*self.placements[-1].decodes, *self.placements[-1].chunks):
                if span.id in self.arrivals.alive:
                    blocks = self.tables.blocks(span.id)
                    assert len(blocks) >= self.state.kv.blocks_for(span.context + span.tokens)
                    assert self.tables.table[span.slot, : len(blocks)].tolist() == list(blocks)

    def answer(self, index: int) -> Answer:
        """Stop tokens of what this iteration sampled, and aborts of anybody."""
        placement = self.launched.pop(0)
        kind, id = self.answers[index] if index < len(self.answers) else ("", 0)
        if kind == "abort":
            return Answer(aborted=(id,))
        sampled = {s.id for s in (*placement.decodes, *placement.chunks) if s.sampled}
        return Answer(ended=(id,)) if kind == "end" and id in sampled & self.arrivals.alive else Answer()


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Request], Limits, list[tuple[str, int]]]:
    block = draw(st.sampled_from([1, 4, 16]))
    sequences = draw(st.integers(1, 6))
    limits = Limits(
        kv_tokens=draw(st.integers(4 * block, 120)) if draw(st.booleans()) else 4096,
        block_tokens=block,
        max_sequences=sequences,
        max_tokens=draw(st.integers(sequences, sequences + 40)),
        max_sequence_tokens=draw(st.integers(8, 256)),
        lookahead=draw(st.sampled_from([0, 1])),
    )
    requests = [
        Request(id, id * draw(st.sampled_from([0, 0.01])), draw(st.integers(1, 40)), draw(st.integers(1, 24)))
        for id in range(draw(st.integers(1, 8)))
    ]
    answers = st.lists(st.tuples(st.sampled_from(["", "end", "abort"]), st.integers(0, 7)), max_size=16)
    return requests, limits, draw(answers)


@pytest.mark.parametrize("name", SERVING)
@settings(max_examples=20, phases=[Phase.generate])
@given(case=cases())
def test_block_ids_follow_the_counts_at_every_step(
    name: str, case: tuple[list[Request], Limits, list[tuple[str, int]]]
) -> None:
    Case(name, *case)


def test_preemptions_are_among_what_was_compared() -> None:
    """Scarce blocks: the property above is about something only if sequences lose and regain them."""
    limits = limits_of(kv_tokens=160, max_sequences=8, lookahead=1)
    requests = requests_of(20, rate_rps=500, prompt_tokens=(5, 60), output_tokens=(5, 40))
    case = Case("inference_only", requests, limits, ())
    first_chunks = [s.id for p in case.placements for s in p.chunks if s.context == 0]
    assert len(first_chunks) > len(set(first_chunks)) == 20
    assert case.tables.free == case.state.kv.total
