"""The finetuning jobs of one pipeline: which are active, whose turn it is, what a slice computes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from sim.core.finetune import (
    Backward,
    Forward,
    IllegalSlice,
    Job,
    JobView,
    Slice,
    after,
    backward_chunks,
    recompute_chunks,
)
from sim.core.work import Chunk, LayerChunk


class PublishedStep(NamedTuple):
    """An optimizer step: the job, its number from 1, and what it was made of."""

    job: str
    step: int
    samples: int
    tokens: int


FinetuneWork = tuple[
    tuple[Chunk, ...], tuple[LayerChunk, ...], tuple[Chunk, ...], int, tuple[PublishedStep, ...]
]
"""The finetuning part of one iteration: forward, backward, recompute and optimizer parameters, in the terms of
`Work`, and the steps."""

Move = tuple[Slice, JobView, JobView]
"""A slice, where its job stands before and after it."""

_new = tuple.__new__


class Jobs:
    """Several jobs share the finetuning work by weight: the one furthest behind its share comes first.

    What it leaves of an iteration goes to the next, and each works on one sample at a time. So weights hold where
    an iteration has no room for a sample of each; where it has, nobody waits, and all get the same.
    """

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        self.active: dict[str, Job] = {}
        self.views: tuple[JobView, ...] = ()
        """Active jobs, the one furthest behind first."""
        self.view_of: dict[str, JobView] = {}
        with_data = [job for job in jobs if not job.finished]
        self._future = sorted(with_data, key=lambda job: (job.spec.start_s, job.spec.id))
        self.next_start_s = self._future[0].spec.start_s if self._future else math.inf
        """When the next job starts; `inf` when none waits."""

    def start(self, now_s: float) -> None:
        """Activate the jobs whose time has come."""
        floor = min((job.virtual_s for job in self.active.values()), default=0.0)
        while self._future and self._future[0].spec.start_s <= now_s:
            job = self._future.pop(0)
            # A late job shares from now on; it does not claim the time before it started.
            job.virtual_s = floor
            self.active[job.spec.id] = job
        self.next_start_s = self._future[0].spec.start_s if self._future else math.inf
        self._refresh()

    def moves(self, pieces: tuple[Slice, ...]) -> list[Move]:
        """What the slices do, one by one. Changes nothing; raises IllegalSlice if they are not legal."""
        moves: list[Move] = []
        now: dict[str, JobView] = self.view_of
        for piece in pieces:
            id = piece.job
            view = now.get(id)
            if view is None:
                raise IllegalSlice(f"finetuning job {id!r} is not active")
            moved = after(view, piece)
            moves.append((piece, view, moved))
            if len(pieces) > 1:
                now = now | {id: moved}
        return moves

    def run(self, moves: list[Move]) -> FinetuneWork:
        """Carry out what `moves` found legal, and say what that computes."""
        forward: tuple[Chunk, ...] = ()
        backward: tuple[LayerChunk, ...] = ()
        recompute: tuple[Chunk, ...] = ()
        steps: tuple[PublishedStep, ...] = ()
        params = 0
        for piece, view, moved in moves:
            job = self.active[piece.job]
            if type(piece) is Backward:
                backward += backward_chunks(view, piece.layer_tokens)
                if view.memory == "recompute":
                    recompute += recompute_chunks(view, piece.layer_tokens)
            elif type(piece) is Forward:
                forward += (_new(Chunk, (piece.tokens, view.forward_tokens)),)
            else:
                params += job.spec.optimizer_params
                made_of = job.accumulated_samples, job.accumulated_tokens
                steps += (PublishedStep(piece.job, job.steps + 1, *made_of),)
            job.take(piece, moved)
        for step in steps:
            if self.active[step.job].finished:
                del self.active[step.job]
        self._refresh()
        return forward, backward, recompute, params, steps

    def give_up(self, ids: Iterable[str]) -> None:
        """Jobs whose step failed: no policy sees them any more. One that has just finished is gone already."""
        for id in ids:
            if id in self.active:
                self.active.pop(id).given_up = True
        self._refresh()

    def _refresh(self) -> None:
        active = self.active
        if len(active) == 1:
            for id, job in active.items():
                view = job.view()
                self.views, self.view_of = (view,), {id: view}
            return
        self.views = tuple([job.view() for job in sorted(active.values(), key=lambda job: job.virtual_s)])
        self.view_of = {view.id: view for view in self.views}
