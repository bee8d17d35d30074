"""Blocks: which are alike, who finds them, and that none is lost."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from sim.core.loop import Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.vllm.blocks import BlockPool, Trial, alike
from sim.vllm.policy import Vllm
from sim.vllm.state import CachedState


@pytest.mark.parametrize("seed", range(10))
def test_blocks_are_alike_when_all_tokens_up_to_their_ends_are_equal(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randint(0, 1) for _ in range(rng.randint(0, 14))] for _ in range(12)]
    blocks = alike(prompts, 3)
    for one in range(12):
        assert len(blocks[one]) == len(prompts[one]) // 3
        for other in range(12):
            for i, number in enumerate(blocks[one]):
                for j, same in enumerate(blocks[other]):
                    end, other_end = 3 * (i + 1), 3 * (j + 1)
                    assert (number == same) == (prompts[one][:end] == prompts[other][:other_end])


def pool_of(blocks: int, prompts: dict[int, tuple[int, ...]]) -> BlockPool:
    return BlockPool(blocks, 4, prompts, caching=True)


def admit(pool: BlockPool, request: int, tokens: int) -> int:
    found = pool.admit(request, tokens)
    pool.hold(request, tokens)
    pool.fill(request, tokens)
    return found


def test_a_prompt_that_begins_like_a_running_one_shares_its_blocks() -> None:
    pool = pool_of(10, {0: (7, 8, 9), 1: (7, 8, 5)})
    assert admit(pool, 0, 12) == 0 and pool.free == 7
    assert pool.needed(1, 13) == 2
    assert admit(pool, 1, 13) == 2 and pool.free == 5
    pool.release(0)
    assert pool.free == 6, "two of its three blocks are in use"
    pool.release(1)
    assert pool.free == 10


def test_the_last_token_is_always_computed() -> None:
    pool = pool_of(10, {0: (7, 8), 1: (7, 8)})
    admit(pool, 0, 8)
    assert len(pool.found(1, 8)) == 1
    assert len(pool.found(1, 9)) == 2


def test_beginnings_survive_longest_and_a_free_block_that_is_found_counts_as_needed() -> None:
    pool = pool_of(6, {0: (1, 2, 3, 4)})
    admit(pool, 0, 16)
    pool.release(0)
    admit(pool, 1, 16)  # two blocks that never held anything, then the last two of the prompt
    assert len(pool.found(0, 17)) == 2
    assert pool.needed(0, 17) == 5


def test_victims_together_free_what_they_share() -> None:
    pool = pool_of(10, {0: (1, 2), 1: (1, 2), 2: (1,)})
    for request in (0, 1, 2):
        admit(pool, request, 9)
    gone: Counter[int] = Counter()
    freed = [pool.freed_by(request, gone) for request in (2, 1, 0)]
    assert freed == [2, 1, 3]
    assert pool.free + sum(freed) == 10


def test_a_trial_says_what_the_pool_says_afterwards_and_leaves_no_trace() -> None:
    prompts = {0: (1, 2, 3), 1: (1, 2, 4), 2: (1, 2, 4, 5), 3: (9, 8)}
    for released in (False, True):
        pool = pool_of(12, prompts)
        admit(pool, 0, 12)
        admit(pool, 3, 8)
        pool.release(3)
        if released:
            pool.release(0)
        before = (pool.free, pool.found(1, 13), pool.found(3, 9))
        trial = Trial(pool)
        counts = []
        for request, tokens in ((1, 13), (2, 17), (3, 9)):
            found = trial.found(request, tokens)
            needed = trial.needed(found, tokens)
            free = trial.free
            trial.admit(found)
            trial.compute(request, 4 * len(found), tokens - 4 * len(found))
            assert free - trial.free == needed
            counts.append((len(found), needed))
        assert before == (pool.free, pool.found(1, 13), pool.found(3, 9))
        for (request, tokens), (found, needed) in zip(((1, 13), (2, 17), (3, 9)), counts, strict=True):
            assert pool.needed(request, tokens) == needed
            assert admit(pool, request, tokens) == found
        assert trial.free == pool.free


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(10, 4, {0: (1,), 1: (1,)}, caching=False)
    admit(pool, 0, 4)
    assert pool.found(1, 5) == ()


def test_no_block_is_lost_over_a_run_with_preemptions() -> None:
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
    loop = run_loop(state, Vllm(state.pool), Listed(), Horizon())
    now_s, reply = 0.0, None
    while True:
        try:
            command = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            break
        if isinstance(command, Sleep):
            now_s = max(now_s, command.until_s)
        elif not isinstance(command, Execute):
            now_s += 0.02
        assert state.kv.free == state.pool.free
        reply = Done(now_s)
    rows = recorder.requests.arrays()
    assert rows["preemptions"].sum() > 10
    assert (rows["generated_tokens"] == rows["output_tokens"]).all()
    assert state.pool.free == state.kv.free == state.kv.total
