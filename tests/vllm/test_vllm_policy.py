"""Admission and preemption as vLLM v1 does them, one rule at a time."""

from __future__ import annotations

from sim.core.plan import Limits, Plan
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.vllm.policy import Vllm
from sim.vllm.state import CachedState


def state_of(blocks: int, max_tokens: int = 64) -> CachedState:
    limits = Limits(kv_tokens=16 * blocks, block_tokens=16, max_sequences=8, max_tokens=max_tokens)
    return CachedState(limits=limits, slos={"default": Slo()}, recorder=Recorder())


def step(state: CachedState, at: int) -> Plan:
    plan = Vllm(state.pool).plan(state.view(float(at)))
    state.apply(plan, float(at))
    state.commit(at + 1.0)
    return plan


def test_a_prompt_waits_until_all_of_it_fits_not_only_its_first_chunk() -> None:
    for reserve, admitted in ((True, ()), (False, ((1, 54),))):
        state = state_of(blocks=8)
        state.arrive(Request(0, 0.0, 60, 50))
        step(state, 0)
        state.arrive(Request(1, 0.0, 65, 5))  # 5 blocks, 4 are free
        if reserve:  # somebody else has a block
            state.pool.admit(7, 1)
            state.pool.hold(7, 16)
            state.kv.free = state.pool.free
        plan = Vllm(state.pool, reserve_full_prompt=reserve).plan(state.view(1.0))
        assert plan.decode
        assert [id for id, _ in plan.prefills] == [id for id, _ in admitted]


def test_a_chunk_without_blocks_preempts_from_the_end_itself_included() -> None:
    state = state_of(blocks=9)
    state.arrive(Request(0, 0.0, 63, 50))  # 4 blocks
    state.arrive(Request(1, 0.0, 80, 5))  # 5 blocks, which are free
    assert step(state, 0).prefills == ((0, 63), (1, 1))
    assert step(state, 1).prefills == ((1, 63),)
    plan = step(state, 2)  # the decode takes the block that the last 16 tokens were admitted on
    assert plan.decode and plan.preempted == (1,) and not plan.prefills


def test_the_last_admitted_is_preempted_nobody_enters_and_it_finds_its_blocks_again() -> None:
    state = state_of(blocks=6)
    for id, prompt in ((0, 47), (1, 31)):
        state.arrive(Request(id, 0.0, prompt, 40))
    assert step(state, 0).prefills == ((0, 47), (1, 17))
    state.arrive(Request(2, 0.0, 60, 4))
    plans = [step(state, at) for at in range(1, 22)]
    preempting = next(plan for plan in plans if plan.preempted)
    assert preempting.preempted == (1,)
    assert preempting.decode and not preempting.prefills
    assert state.waiting.first().id == 1
    back = state.waiting.first()
    assert 0 < 16 * len(state.pool.found(1, back.known_tokens)) < back.known_tokens


def test_prompts_admitted_together_share_what_is_only_planned() -> None:
    limits = Limits(kv_tokens=16 * 20, block_tokens=16, max_sequences=8, max_tokens=256)
    prompts = {0: (5, 6, 7), 1: (5, 6, 8), 2: (9,)}
    state = CachedState(limits=limits, slos={"default": Slo()}, recorder=Recorder(), prompts=prompts)
    for id, tokens in ((0, 50), (1, 50), (2, 20)):
        state.arrive(Request(id, 0.0, tokens, 5))
    assert step(state, 0).prefills == ((0, 50), (1, 18), (2, 20))
    assert state.found_tokens == 32
    assert state.kv.used == 4 + 2 + 2


def test_a_sequence_is_preempted_while_its_last_token_is_on_its_way_and_ends_all_the_same() -> None:
    recorder = Recorder()
    limits = Limits(kv_tokens=16 * 4, block_tokens=16, max_sequences=8, max_tokens=64, lookahead=1)
    state = CachedState(limits=limits, slos={"default": Slo()}, recorder=recorder)
    policy = Vllm(state.pool)
    for id, tokens, output in ((0, 32, 9), (1, 32, 1)):
        state.arrive(Request(id, 0.0, tokens, output))
    plans = []
    for at in range(3):  # the second iteration needs a block while the first still computes request 1's token
        plans.append(policy.plan(state.view(float(at))))
        state.apply(plans[-1], float(at))
        if at:
            state.commit(at + 1.0)
    assert [plan.preempted for plan in plans] == [(), (1,), ()]
    ended = recorder.requests.arrays()
    assert ended["request"].tolist() == [1]
    assert ended["preemptions"].tolist() == [1] and ended["generated_tokens"].tolist() == [1]
    assert state.kv.free == state.pool.free == 1
