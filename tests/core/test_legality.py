"""Every rule of a legal plan, broken once: it raises, and the state is as it was."""

from __future__ import annotations

from typing import Any

import pytest

from sim.core.finetune import Backward, Forward, Step
from sim.core.legality import IllegalPlan
from sim.core.plan import Plan
from sim.core.request import Request
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from tests.reference import snapshot
from tests.support import SLOS, job_of, limits_of


def state_of(**changes: Any) -> PipelineState:
    """Request 0 decodes with 16 tokens cached, 1 has 10 of its 40 tokens computed, 2 and 3 wait."""
    limits = limits_of(
        **({"kv_tokens": 128, "block_tokens": 16, "max_sequences": 3, "max_tokens": 60} | changes)
    )
    jobs = [
        job_of([20, 20], id="rows"),
        job_of([20, 20], id="windows", order="window_major", memory="recompute"),
        job_of([5, 20], id="due", accumulation=1, layers=1),
        job_of([20], id="late", start_s=9.0),
    ]
    state = PipelineState(limits=limits, slos=SLOS, recorder=Recorder(), jobs=jobs)
    for id, prompt in enumerate([16, 40, 30, 66]):
        assert state.arrive(Request(id, 0.0, prompt, 50))
    state.view(0.0)
    state.apply(Plan(prefills=((0, 16), (1, 10)), finetune=(Forward("due", 5), Backward("due", 5))), 0.0)
    state.commit(0.1)
    return state


ILLEGAL = {
    "nothing": Plan(),
    "decode of a preempted only": Plan(decode=True, preempted=(0,)),
    "unknown preempted": Plan(decode=True, preempted=(7,)),
    "waiting preempted": Plan(decode=True, preempted=(2,)),
    "preempted twice": Plan(decode=True, preempted=(1, 1)),
    "preempted and computed": Plan(decode=True, prefills=((1, 4),), preempted=(1,)),
    "planned twice": Plan(prefills=((1, 4), (1, 4))),
    "chunk of zero": Plan(prefills=((1, 0),)),
    "negative chunk": Plan(prefills=((1, -1),)),
    "chunk too long": Plan(prefills=((1, 31),)),
    "prefill of a decoding one": Plan(prefills=((0, 1),)),
    "not next in the queue": Plan(prefills=((3, 4),)),
    "unknown request": Plan(prefills=((9, 4),)),
    "admits while it preempts": Plan(decode=True, prefills=((2, 4),), preempted=(1,)),
    "too many sequences": Plan(prefills=((2, 4), (3, 4))),
    "too many tokens": Plan(decode=True, prefills=((1, 30), (2, 30))),
    "unknown job": Plan(finetune=(Forward("none", 1),)),
    "job not started": Plan(finetune=(Forward("late", 1),)),
    "no step due": Plan(finetune=(Step("rows"),)),
    "step is due first": Plan(finetune=(Forward("due", 1),)),
    "two steps": Plan(finetune=(Step("due"), Step("due"))),
    "forward of zero": Plan(finetune=(Forward("rows", 0),)),
    "forward past the sample": Plan(finetune=(Forward("rows", 21),)),
    "two forwards past the sample": Plan(finetune=(Forward("rows", 11), Forward("rows", 10))),
    "backward before forward": Plan(finetune=(Forward("rows", 19), Backward("rows", 1))),
    "backward past the sample": Plan(finetune=(Forward("rows", 20), Backward("rows", 81))),
    "backward of zero": Plan(finetune=(Forward("rows", 20), Backward("rows", 0))),
    "part of a window": Plan(finetune=(Forward("windows", 20), Backward("windows", 3))),
    "next sample in the same plan": Plan(
        finetune=(Forward("rows", 20), Backward("rows", 80), Forward("rows", 1))
    ),
    "legal inference, illegal finetuning": Plan(decode=True, prefills=((1, 4),), finetune=(Step("rows"),)),
    "not a slice": Plan(finetune=(type("Odd", (tuple,), {"job": "rows"})(),)),
}


@pytest.mark.parametrize("rule", list(ILLEGAL))
def test_an_illegal_plan_raises_and_changes_nothing(rule: str) -> None:
    state = state_of()
    before = snapshot(state)
    with pytest.raises(IllegalPlan):
        state.apply(ILLEGAL[rule], 0.2)
    assert snapshot(state) == before


@pytest.mark.parametrize(
    "plan",
    [Plan(decode=True, prefills=((1, 30), (2, 30))), Plan(prefills=((2, 30), (3, 66)))],
    ids=["decode grows", "prefill alone"],
)
def test_more_blocks_than_are_free_are_refused(plan: Plan) -> None:
    """Blocks held: 1 + 1 of 6 or 5. Growth takes 1, the rest of request 1 takes 2, request 2 takes 2."""
    blocks = 6 if plan.decode else 8
    state = state_of(kv_tokens=16 * blocks, max_tokens=256, max_sequences=4)
    before = snapshot(state)
    with pytest.raises(IllegalPlan, match="KV blocks"):
        state.apply(plan, 0.2)
    assert snapshot(state) == before
    state_of(kv_tokens=16 * (blocks + 1), max_tokens=256, max_sequences=4).apply(plan, 0.2)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(decode=True),
        Plan(decode=True, prefills=((1, 30), (2, 30))),
        Plan(decode=True, preempted=(1,)),
        Plan(prefills=((1, 1),), preempted=(0,)),
        Plan(finetune=(Step("due"), Forward("due", 20), Backward("due", 20))),
        Plan(finetune=(Forward("windows", 20), Backward("windows", 8), Forward("rows", 20))),
    ],
)
def test_legal_neighbours_of_the_illegal_plans_are_carried_out(plan: Plan) -> None:
    state = state_of(max_tokens=128)
    work = state.apply(plan, 0.2)
    assert work.decode_count == (1 if plan.decode else 0)
    assert work.prefill_tokens == sum(tokens for _, tokens in plan.prefills)
