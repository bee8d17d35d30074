"""Chunked prefill as vLLM's v1 scheduler does it: running sequences first, then the waiting, no finetuning.

It differs from `inference_only` in what happens when blocks run short. A waiting request enters when its
whole known length fits into the blocks that are free right now, but only those of its first chunk are
taken, so decodes may use up the others. Its next chunk is then not cut to what is free: the last admitted
are preempted, itself included. An iteration that preempts admits nobody. What a waiting request
finds in blocks depends on what is taken and filled before it in the same iteration, so admission is tried
before it is planned.

Source: vllm/v1/core/sched/scheduler.py of vLLM 0.19 (`schedule`), with `scheduler_reserve_full_isl`.
"""

from __future__ import annotations

from itertools import islice

from sim.core.plan import Plan, Victim, View
from sim.vllm.blocks import BlockPool, Trial


class Vllm:
    """Continuous batching with the admission and preemption of vLLM v1."""

    serves = True
    finetunes = False

    def __init__(
        self, pool: BlockPool, *, reserve_full_prompt: bool = True, most_prompt_tokens: int = 0
    ) -> None:
        """`pool`: of the engine that is planned for; only read.

        `reserve_full_prompt`: False admits when the first chunk fits, as vLLM did before 0.19.
        `most_prompt_tokens`: of one prompt in an iteration (long_prefill_token_threshold); 0 is no limit.
        """
        self._pool = pool
        self._reserve_full_prompt = reserve_full_prompt
        self._most_prompt_tokens = most_prompt_tokens

    def plan(self, view: View) -> Plan:
        batch = _Batch(view, self._most_prompt_tokens or view.limits.max_tokens)
        if batch.free_blocks < 0:
            batch.preempt_until(0)
        batch.continue_prefills()
        if not batch.preempted:
            batch.admit(self._pool, self._reserve_full_prompt)
        if not (batch.decodes or batch.prefills):
            # Only with a lookahead: sequences that finish in the running iteration still hold their blocks.
            return Plan()
        return Plan(True, tuple(batch.prefills), tuple(batch.preempted))


class _Batch:
    """The plan while it is made."""

    def __init__(self, view: View, most_prompt_tokens: int) -> None:
        self.view = view
        self._most_prompt_tokens = most_prompt_tokens
        self.prefills: list[tuple[int, int]] = []
        self.preempted: list[int] = []
        self.decodes = view.decode_count
        self.free_blocks = view.free_blocks - view.growth_blocks
        self._victims = view.victims()

    @property
    def tokens_left(self) -> int:
        return self.view.limits.max_tokens - self.decodes - sum(tokens for _, tokens in self.prefills)

    def preempt_until(self, needed_blocks: int, wanting: int | None = None) -> None:
        """Preempt the last admitted until so many blocks are free, or nobody is left, or `wanting` itself,
        which needs them, is preempted."""
        while self.free_blocks < needed_blocks and wanting not in self.preempted:
            victim = next(self._victims, None)
            if victim is None:
                break
            self._preempt(victim)

    def _preempt(self, victim: Victim) -> None:
        self.preempted.append(victim.id)
        self.free_blocks += victim.blocks + (1 if victim.grows else 0)
        self.decodes -= victim.decoding

    def continue_prefills(self) -> None:
        """The next chunk of every admitted prompt, in order of admission."""
        for sequence in self.view.prefilling:
            tokens = min(sequence.remaining_tokens, self._most_prompt_tokens, self.tokens_left)
            if tokens <= 0 or sequence.id in self.preempted:
                continue
            needed = self._new_blocks(sequence.computed_tokens, tokens)
            if needed > self.free_blocks:
                self.preempt_until(needed, sequence.id)
                if sequence.id in self.preempted or needed > self.free_blocks:
                    continue
            self.prefills.append((sequence.id, tokens))
            self.free_blocks -= needed

    def admit(self, pool: BlockPool, reserve_full_prompt: bool) -> None:
        """First chunks of the waiting, in their order, until the first that does not fit."""
        view, block = self.view, self.view.limits.block_tokens
        trial: Trial | None = None
        for sequence in islice(view.waiting, view.limits.max_sequences - view.running):
            left = min(self._most_prompt_tokens, self.tokens_left)
            if left <= 0:
                break
            id, known = sequence.id, sequence.known_tokens
            if trial is None:
                if (pool.needed(id, known) if reserve_full_prompt else 1) > self.free_blocks:
                    break
                trial = self._after_those_running(pool)
            found = trial.found(id, known)
            done = block * len(found)
            tokens = min(known - done, left)
            if trial.needed(found, known if reserve_full_prompt else done + tokens) > trial.free:
                break
            trial.admit(found)
            trial.compute(id, done, tokens)
            self.prefills.append((id, tokens))
            self.free_blocks = trial.free

    def _after_those_running(self, pool: BlockPool) -> Trial:
        """`pool` once the decodes and chunks that are planned have their blocks."""
        trial = Trial(pool)
        trial.take(self.view.growth_blocks)
        computed = {sequence.id: sequence.computed_tokens for sequence in self.view.prefilling}
        for id, tokens in self.prefills:
            trial.compute(id, computed[id], tokens)
        return trial

    def _new_blocks(self, done: int, tokens: int) -> int:
        block = self.view.limits.block_tokens
        return -(-(done + tokens) // block) - -(-done // block)
