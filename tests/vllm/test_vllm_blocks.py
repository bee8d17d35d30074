"""Blocks that remember their owner, against a list of single blocks."""

from __future__ import annotations

import random

import pytest

from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits
from sim.core.request import Slo
from sim.core.rows import Recorder
from sim.vllm.state import ReusableBlocks


class ListedBlocks:
    """The free list block by block: (owner, which of its blocks), the next to be taken first."""

    def __init__(self, total: int) -> None:
        self.free: list[tuple[int | None, int]] = [(None, n) for n in range(total)]

    def release(self, owner: int | None, count: int) -> None:
        self.free += [(owner, n) for n in reversed(range(count))]

    def take(self, count: int) -> None:
        del self.free[:count]

    def kept(self, owner: int, taken: int = 0) -> int:
        held = {n for own, n in self.free[taken:] if own == owner}
        return next(n for n in range(len(held) + 1) if n not in held)

    def claim(self, owner: int) -> int:
        kept = self.kept(owner)
        self.free = [block for block in self.free if block[0] != owner]
        return kept


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_blocks_say_what_single_blocks_say(seed: int) -> None:
    rng = random.Random(seed)
    total = 60
    runs, listed = ReusableBlocks(total * 4, 4), ListedBlocks(total)
    held = 0
    gone: list[int] = []
    for step in range(300):
        taken = rng.randint(0, min(6, runs.free))
        runs.free -= taken
        listed.take(taken)
        held += taken
        if held and rng.random() < 0.4:
            count, owner = rng.randint(1, held), rng.choice([None, step])
            held -= count
            runs.owner = owner
            runs.free += count
            runs.owner = None
            listed.release(owner, count)
            if owner is not None:
                gone.append(owner)
        for owner in gone:
            more = rng.randint(0, runs.free)
            assert runs.kept_after(owner, more) == listed.kept(owner, more)
        if gone and rng.random() < 0.2:
            back = gone.pop(rng.randrange(len(gone)))
            count = runs.claim(back)
            assert count == listed.claim(back)
            held += count
        assert runs.free == len(listed.free) == total - held


def test_no_block_is_lost_over_a_run_with_preemptions() -> None:
    from collections import deque

    from sim.core.loop import Done, Execute, Sleep
    from sim.core.request import Request
    from sim.vllm.policy import Vllm
    from sim.vllm.state import CachedState

    class Listed:
        def __init__(self) -> None:
            self.coming = deque(Request(i, 0.01 * i, 40 + 7 * i % 60, 30 + i % 17) for i in range(60))

        def next_s(self) -> float | None:
            return self.coming[0].arrival_s if self.coming else None

        def due(self, now_s: float) -> list[Request]:
            taken = []
            while self.coming and self.coming[0].arrival_s <= now_s:
                taken.append(self.coming.popleft())
            return taken

        def ended(self, request_id: int, now_s: float) -> None: ...

    recorder = Recorder()
    limits = Limits(kv_tokens=640, block_tokens=8, max_sequences=16, max_tokens=64, lookahead=1)
    state = CachedState(limits=limits, slos={"default": Slo()}, recorder=recorder)
    loop = run_loop(state, Vllm(), Listed(), Horizon())
    now_s, reply, launched = 0.0, None, 0
    while True:
        try:
            command = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            break
        if isinstance(command, Sleep):
            now_s = max(now_s, command.until_s)
        elif not isinstance(command, Execute):
            now_s += 0.02
        launched += isinstance(command, Execute)
        reply = Done(now_s)
    rows = recorder.requests.arrays()
    assert rows["preemptions"].sum() > 10
    assert (rows["generated_tokens"] == rows["output_tokens"]).all()
    assert state.kv.free == state.kv.total
