"""Inference first: the part of a plan that every serving policy shares.

Decodes come first; when their growth does not fit, the last admitted are preempted. Then prefill chunks of
what is already admitted, then of the waiting queue, until the token budget, the sequences, the K/V blocks
or (where a predictor is given) the latency budget are used up. A waiting request is admitted only when its
whole prompt fits into the blocks that no admitted prompt still needs, so prefills never block each other.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.core.cost import Predictor
from sim.core.plan import Plan, View
from sim.core.sequence import Sequence
from sim.core.work import Chunk, Work


class Inference(NamedTuple):
    """The inference part of a plan, and its Work for a predictor."""

    prefills: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]
    work: Work

    @property
    def busy(self) -> bool:
        """There are inference tokens to compute."""
        return self.work.decode_count > 0 or bool(self.prefills)

    def plan(self) -> Plan:
        return Plan(decode=True, prefills=self.prefills, preempted=self.preempted)


class Latency(NamedTuple):
    """A bound on the predicted time of the iteration for sizing prefill chunks."""

    predictor: Predictor
    budget_s: float
    min_chunk_tokens: int
    """Computed even when it breaks the bound: without it, decodes near the bound would starve prompts."""


def pack_inference(view: View, max_tokens: int, latency: Latency | None = None) -> Inference:
    """Fill an iteration with at most `max_tokens` inference tokens (decodes are never cut)."""
    growth, free = view.growth_blocks, view.free_blocks
    if growth <= free:
        if not view.prefilling and (not len(view.waiting) or view.running >= view.limits.max_sequences):
            return Inference((), (), view.decode_work)
        return _with_prefills(view, max_tokens, latency, free - growth)
    return _with_preemptions(view, max_tokens, latency)


def _with_preemptions(view: View, max_tokens: int, latency: Latency | None) -> Inference:
    growth, free = view.growth_blocks, view.free_blocks
    count, context = view.decode_count, view.decode_context_tokens
    preempted: list[int] = []
    for victim in view.victims():
        if growth <= free:
            break
        preempted.append(victim.id)
        free += victim.blocks
        if victim.decoding:
            count -= 1
            context -= victim.context_tokens
            growth -= victim.grows
    gone = set(preempted)
    work = view.decode_work._replace(
        decode_count=count, decode_context_tokens=context, sampled_tokens=count
    )
    kept = [s for s in view.prefilling if s.id not in gone]
    packing = _Packing(work, max_tokens - count, free - growth, view.limits.block_tokens, latency)
    for sequence in kept:
        packing.add(sequence)
    return Inference(tuple(packing.prefills), tuple(preempted), packing.work)


def _with_prefills(view: View, max_tokens: int, latency: Latency | None, free: int) -> Inference:
    limits = view.limits
    packing = _Packing(view.decode_work, max_tokens - view.decode_count, free, limits.block_tokens, latency)
    for sequence in view.prefilling:
        packing.add(sequence)
    room = limits.max_sequences - view.running
    for sequence in view.waiting:
        if room == 0 or not packing.admits(sequence):
            break
        packing.add(sequence)
        room -= 1
    return Inference(tuple(packing.prefills), (), packing.work)


class _Packing:
    """Chunks of one iteration under construction."""

    def __init__(
        self, work: Work, tokens: int, free_blocks: int, block_tokens: int, latency: Latency | None
    ) -> None:
        self.work = work
        self.prefills: list[tuple[int, int]] = []
        self._tokens = tokens
        self._free_blocks = free_blocks
        self._block_tokens = block_tokens
        self._latency = latency
        self._promised_blocks = 0
        """Blocks that admitted prompts will still need after this iteration."""
        self._open = True
        """False once the latency budget is used up."""

    def admits(self, sequence: Sequence) -> bool:
        need = -(-sequence.known_tokens // self._block_tokens)
        return self._open and self._tokens > 0 and need <= self._free_blocks - self._promised_blocks

    def add(self, sequence: Sequence) -> None:
        """Give the sequence the largest chunk that fits, if any."""
        block = self._block_tokens
        done = sequence.computed_tokens
        held = -(-done // block)
        remaining = sequence.remaining_tokens
        tokens = min(remaining, self._tokens, (held + self._free_blocks) * block - done)
        if not self._open:
            tokens = 0
        elif self._latency is not None and tokens > 0:
            tokens = self._within_latency(done, tokens)
        if tokens > 0:
            taken = -(-(done + tokens) // block) - held
            self._tokens -= tokens
            self._free_blocks -= taken
            held += taken
            work = self.work
            self.prefills.append((sequence.id, tokens))
            self.work = work._replace(
                prefill=(*work.prefill, Chunk(tokens, done)),
                sampled_tokens=work.sampled_tokens + (tokens == remaining),
            )
        self._promised_blocks += -(-sequence.known_tokens // block) - held

    def _within_latency(self, done: int, tokens: int) -> int:
        assert self._latency is not None
        predictor, budget_s, min_chunk = self._latency
        largest = predictor.largest_prefill(self.work, done, tokens, budget_s)
        if largest < tokens:
            self._open = False
            if largest < min_chunk and not self.prefills:
                return min(min_chunk, tokens)
        return largest
