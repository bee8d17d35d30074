"""The rules that every plan must keep. Checked before anything changes, so a refused plan leaves no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.core.finetune import IllegalSlice
from sim.core.jobs import Move
from sim.core.plan import Plan

if TYPE_CHECKING:
    from sim.core.state import PipelineState


class IllegalPlan(ValueError):
    """A policy planned what the pipeline cannot do."""


def check_plan(state: PipelineState, plan: Plan) -> list[Move]:
    """What `plan`'s finetuning slices do. Raises IllegalPlan unless `state` can carry out the whole plan.

    Changes nothing; O(changes), not O(running).
    """
    decode, prefills, preempted, slices, _, _, _ = plan
    kv = state.kv
    count = state.decode_count if decode else 0
    growth = kv.growth(state.tick + 1) if count else 0
    free = kv.free
    if preempted:
        released, decoding, saved = _check_preempted(state, plan)
        free += released
        if decode:
            count -= decoding
            growth -= saved
    if not (count or prefills or slices):
        raise IllegalPlan("a plan must have work, got neither decodes, prefills nor finetuning")
    if prefills:
        tokens, blocks = _check_prefills(state, plan)
        if count + tokens > state.limits.max_tokens:
            raise IllegalPlan(
                f"an iteration holds at most {state.limits.max_tokens} inference tokens, "
                f"got {count} decodes and {tokens} prefill tokens"
            )
        growth += blocks
    if growth > free:
        raise IllegalPlan(f"the plan takes {growth} KV blocks, {free} are free")
    if not slices:
        return []
    try:
        return state.jobs.moves(slices)
    except IllegalSlice as error:
        raise IllegalPlan(str(error)) from None


def _check_preempted(state: PipelineState, plan: Plan) -> tuple[int, int, int]:
    """Blocks released, decoding sequences among them, and blocks that these would have taken."""
    if len(set(plan.preempted)) != len(plan.preempted):
        raise IllegalPlan(f"a sequence can be preempted once, got {plan.preempted}")
    released = decoding = saved = 0
    for id in plan.preempted:
        sequence = state.running.get(id)
        if sequence is None or not (sequence.decoding or id in state.prefilling):
            raise IllegalPlan(f"only a sequence that runs on can be preempted, got {id}")
        victim = state.victim(sequence)
        released += victim.blocks
        decoding += victim.decoding
        saved += victim.grows
    return released, decoding, saved


def _check_prefills(state: PipelineState, plan: Plan) -> tuple[int, int]:
    """Tokens and new blocks of the chunks."""
    tokens = blocks = admitted = 0
    seen = set(plan.preempted)
    queue = iter(state.waiting)
    for id, chunk in plan.prefills:
        if id in seen:
            raise IllegalPlan(f"sequence {id} is planned twice, or both preempted and computed")
        seen.add(id)
        sequence = state.prefilling.get(id)
        if sequence is None:
            sequence = next(queue, None)
            if sequence is None or sequence.id != id:
                raise IllegalPlan(f"sequence {id} is neither prefilling nor next in the waiting queue")
            admitted += 1
        if not 1 <= chunk <= sequence.remaining_tokens:
            raise IllegalPlan(
                f"a chunk of sequence {id} must be 1..{sequence.remaining_tokens} tokens, got {chunk}"
            )
        tokens += chunk
        done = sequence.computed_tokens
        blocks += state.kv.blocks_for(done + chunk) - state.kv.blocks_for(done)
    if admitted and plan.preempted:
        raise IllegalPlan("a plan cannot admit while it preempts")
    if len(state.running) + admitted > state.limits.max_sequences:
        raise IllegalPlan(
            f"at most {state.limits.max_sequences} sequences run, "
            f"got {len(state.running)} and {admitted} more"
        )
    return tokens, blocks
