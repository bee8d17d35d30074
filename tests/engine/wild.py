"""A policy without a rule: whatever it draws is legal, and all is done in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.core.finetune import Backward, Forward, JobView, Slice, Step, after
from sim.core.plan import Plan, View


class Wild:
    """Draws cuts, preemptions, pauses of the decodes, several slices of a job in a row."""

    serves = finetunes = True

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._preempts = 20
        """As often it preempts without need, so that it comes to an end."""

    def plan(self, view: View) -> Plan:
        preempted, decode, free, left = self._kept(view)
        prefills = self._prefills(view, preempted, free, left)
        slices = self._slices(view)
        if decode or prefills or slices:
            overlap = bool(slices) and self._random.random() < 0.3
            return Plan(decode, prefills, preempted, slices, overlap)
        return self._least(view)

    def _least(self, view: View) -> Plan:
        """Some work, wherever there is any: the last who run make room for the others."""
        if view.jobs and (piece := self._piece(view.jobs[0])) is not None:
            return Plan(finetune=(piece,))
        gone: list[int] = []
        count, growth, free = view.decode_count, view.growth_blocks, view.free_blocks
        for victim in (None, *view.victims()):
            if victim is not None:
                gone.append(victim.id)
                count, growth = count - victim.decoding, growth - victim.grows
                free += victim.blocks
            if count > 0 and growth <= free:
                return Plan(decode=True, preempted=tuple(gone))
            if prefills := self._prefills(view, gone, free, view.limits.max_tokens, certain=True):
                return Plan(prefills=prefills, preempted=tuple(gone))
        return Plan()

    def _kept(self, view: View) -> tuple[tuple[int, ...], bool, int, int]:
        """Who is preempted and whether the others decode; blocks and tokens that are left."""
        preempted: list[int] = []
        count, growth, free = view.decode_count, view.growth_blocks, view.free_blocks
        decode = self._random.random() < 0.9
        for victim in view.victims():
            wanted = self._preempts > 0 and self._random.random() < 0.1
            if wanted or (decode and growth > free):
                self._preempts -= wanted
                preempted.append(victim.id)
                free += victim.blocks
                count -= victim.decoding
                growth -= victim.grows
        decode = decode and count > 0
        left = view.limits.max_tokens - (count if decode else 0)
        return tuple(preempted), decode, free - (growth if decode else 0), left

    def _prefills(
        self, view: View, preempted: Sequence[int], free: int, left: int, certain: bool = False
    ) -> tuple[tuple[int, int], ...]:
        found, running = [], view.running
        waiting = () if preempted else view.waiting
        for sequence in (*view.prefilling, *waiting):
            if sequence.id in preempted:
                continue
            admitted = sequence in view.prefilling
            if admitted and not certain and self._random.random() < 0.1:
                continue
            tokens = min(sequence.remaining_tokens, int(self._random.integers(1, 16)), left)
            block, done = view.limits.block_tokens, sequence.computed_tokens
            tokens = min(tokens, (-(-done // block) + free) * block - done)
            if tokens < 1 or (not admitted and running >= view.limits.max_sequences):
                break
            found.append((sequence.id, tokens))
            free -= -(-(done + tokens) // block) - -(-done // block)
            left -= tokens
            running += not admitted
        return tuple(found)

    def _slices(self, view: View) -> tuple[Slice, ...]:
        """Of several jobs in turn."""
        queues = []
        for job in view.jobs:
            queue: list[Slice] = []
            while self._random.random() < 0.7 and (piece := self._piece(job)) is not None:
                job = after(job, piece)
                queue.append(piece)
            queues.append(queue)
        found = []
        while queues := [queue for queue in queues if queue]:
            found.append(one_of(self._random, *queues).pop(0))
        return tuple(found)

    def _piece(self, job: JobView) -> Slice | None:
        if job.step_due:
            return Step(job.id)
        if job.forward_left:
            return Forward(job.id, min(int(self._random.integers(1, 25)), job.forward_left))
        if not job.backward_left:
            return None
        unit = job.layers if job.order == "window_major" else 1
        most = one_of(self._random, 12, 100)
        return Backward(job.id, min(int(self._random.integers(1, most)) * unit, job.backward_left))


def one_of(random: np.random.Generator, *choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]
