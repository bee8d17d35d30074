"""An engine that can be put into any state and timed: what a measured profile is made of.

A state costs nothing to reach. The loop's accounts (`PipelineState`, `BlockTables`) are shown the plans that
would lead there, and the device is not: its pages hold random keys and values, its sample the activations of a
pass made once. The iteration that is timed then goes the way of the loop: view, apply, launch, collect, commit.
Only the policy's own thinking is missing.

Its time is split into what the device worked (CUDA events round the launch; on a CPU, which is its own device,
the time inside the engine) and what the host took beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from engine.assemble import TrainingJob, assemble_engine
from engine.design import GROWTH_TOKENS, Point, Space
from engine.engine import Engine
from engine.finetune import Sample
from engine.lora import Adapter
from engine.model import Model
from engine.sampling import Sampling
from sim.core.finetune import Backward, Forward, Job, Slice, Step
from sim.core.plan import Limits, Plan
from sim.core.request import Request, Slo
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from sim.core.work import Work

WARM_UPS = 1
BURST = 4
"""Iterations launched one ahead of the other, for the time with a lookahead."""
LONGEST_POINT_S = 0.7
"""A point stops repeating after so long; three repeats are always made."""
LEAST_REPEATS = 3
SECOND_WINDOW_TOKENS = 1024
"""Beside a job that keeps a whole sample there is seldom room for a second sample's activations."""


class Timed(NamedTuple):
    """Times of one point; arrays have the shape (repeats,)."""

    work: Work
    """Of the middle repeat: a context grows by a token each time."""
    seconds: np.ndarray
    """From one iteration's end to the next one's, nothing planned ahead."""
    host_s: np.ndarray
    """The part of `seconds` in which the device did not work."""
    ahead_s: float
    """Seconds per iteration when the next one is launched before the last has ended; NaN if not asked, for
    optimizer steps (a job must see a label between two) and where two iterations' prompts do not fit."""
    device_s: float
    """Median of what the device worked."""


class Rig:
    """One engine for many points. `jobs` are used up; their adapters are thrown away."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        jobs: Sequence[TrainingJob],
        adapters: Mapping[str, Adapter] | None = None,
        assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine,
    ) -> None:
        """`assemble` makes the engine, as `assemble_engine` does."""
        self._adapters = [*(adapters or {})]
        self._lengths = {job.id: 2 for job in jobs}
        """Of the sample that each job draws next."""
        most = max((job.max_sample_tokens for job in jobs), default=2)
        # Trainers have room for whole blocks, and are warmed up with all of it.
        filled = -(-most // limits.block_tokens) * limits.block_tokens
        random = np.random.default_rng(0)
        self._vocab = model.config.shape.vocab
        self._text = random.integers(0, self._vocab, max(filled, limits.max_sequence_tokens)).astype(np.int32)
        self._labels = self._text.astype(np.int64)
        self._made: dict[int, Sample] = {}
        own = [replace(job, samples=self._samples(job.id), accumulation=1) for job in jobs]
        self.engine, counted = assemble(model, limits, own, adapters)
        self.engine.warm_up(adapters=bool(self._adapters))
        self.engine.fill()
        # A state is reached by one prompt as long as it takes, whatever an iteration may hold.
        free = replace(limits, max_tokens=2**31, lookahead=0)
        self._state = PipelineState(limits=free, slos={"default": Slo()}, recorder=Recorder(), jobs=counted)
        self._state.view(0.0)
        self._jobs = [job.id for job in jobs]
        self._next_id = 0
        self._clock = _DeviceClock(model.device)
        self.space = Space(
            limits=limits,
            layers=model.config.shape.layers,
            sample_tokens=most,
            orders=tuple(job.order for job in jobs),
            window_tokens=most if len(jobs) < 2 else min(most, SECOND_WINDOW_TOKENS),
            adapters=len(self._adapters),
            overlap=self.engine.overlaps,
        )
        for job in self._jobs:
            self._warm_up(job, limits.max_tokens)

    def time(self, point: Point, repeats: int, ahead: bool = False, warm_ups: int = WARM_UPS) -> Timed:
        """Time a point: a few warm-ups, then `repeats` or as many as fit into LONGEST_POINT_S."""
        assert repeats + warm_ups + BURST < GROWTH_TOKENS
        decoding = self._sequences(point)
        rows, works = [], []
        started_s = time.perf_counter()
        for n in range(warm_ups + repeats):
            work, *times = self._repeat(point)
            if n >= warm_ups:
                works.append(work)
                rows.append(times)
            enough = len(rows) >= LEAST_REPEATS
            if enough and time.perf_counter() - started_s > LONGEST_POINT_S:
                break
        burst_s = self._burst(point) if ahead and self._holds_two(point) else math.nan
        self._release(decoding)
        seconds, host_s = np.array(rows).T
        return Timed(works[len(works) // 2], seconds, host_s, burst_s, float(np.median(seconds - host_s)))

    # Reaching a state

    def _sequences(self, point: Point) -> list[int]:
        """Sequences that decode from now on."""
        if not point.decodes:
            return []
        ids = [
            self._arrive(point.context, GROWTH_TOKENS + 2, self._adapter(point, n))
            for n in range(point.decodes)
        ]
        self._skip(Plan(prefills=tuple((id, point.context) for id in ids)))
        return ids

    def _chunks(self, point: Point, counted: bool = True) -> tuple[tuple[int, int], ...]:
        """Prompts of which only the chunk is missing. Not `counted`: the loop's state does not hear of them."""
        chunks = []
        for tokens, context in point.prefill:
            more = 0 if point.ends else 1
            id = self._arrive(context + tokens + more, 1, self._adapter(point, 0), counted)
            if context:
                plan = Plan(prefills=((id, context),))
                if counted:
                    self._skip(plan)
                else:
                    self.engine.skip(plan)
            chunks.append((id, tokens))
        return tuple(chunks)

    def _slices(self, point: Point) -> tuple[Slice, ...]:
        """Bring the job, and its trainer, to where the point's slices follow; returns them."""
        if not (point.forward or point.backward or point.step):
            return ()
        job = self._jobs[point.job]
        if point.step:
            self._sample(job, 2)
            self._stand(point, fresh=True)
            self._real(Plan(finetune=(Forward(job, 2),)))  # a step divides by the labels that it has seen
            self._skip(Plan(finetune=(Backward(job, 2 * self._layers(job)),)))
        else:
            length, forward_tokens, done = _place(point)
            self._sample(job, length)
            if forward_tokens:
                self._skip(Plan(finetune=(Forward(job, forward_tokens),)))
            if done:
                self._skip(Plan(finetune=(Backward(job, done),)))
            self._stand(point, fresh=True)
        return self._pieces(point)

    def _pieces(self, point: Point) -> tuple[Slice, ...]:
        if not (point.forward or point.backward or point.step):
            return ()
        job = self._jobs[point.job]
        pieces: list[Slice] = [Step(job)] if point.step else []
        if point.forward:
            pieces.append(Forward(job, point.forward.tokens))
        if point.backward:
            pieces.append(Backward(job, point.backward.layer_tokens))
        return tuple(pieces)

    def _sample(self, job: str, length: int) -> None:
        """End the job's sample on paper and begin one of `length` tokens."""
        self._lengths[job] = length
        if self._state.jobs.view_of[job].step_due:
            self._skip(Plan(finetune=(Step(job),)))
        view = self._state.jobs.view_of[job]
        if view.forward_left:
            self._skip(Plan(finetune=(Forward(job, view.forward_left),)))
        self._skip(Plan(finetune=(Backward(job, view.backward_left),)))
        self._skip(Plan(finetune=(Step(job),)))

    def _stand(self, point: Point, fresh: bool) -> None:
        length, forward_tokens, done = (2, 0, 0) if point.step else _place(point)
        job = self._jobs[point.job]
        self.engine.stand(job, self._tokens(length), forward_tokens, done, fresh)

    def _skip(self, plan: Plan) -> None:
        """The accounts follow a plan that the device does not see."""
        self._state.apply(plan, 0.0)
        self.engine.skip(plan)
        self._commit()

    def _commit(self) -> None:
        for id in self._state.commit(0.0):
            self.engine.ended(id)

    def _arrive(self, prompt: int, output: int, adapter: str | None, counted: bool = True) -> int:
        request = Request(self._next_id, 0.0, prompt, output, "default", adapter)
        self._next_id += 1
        self.engine.arrive(request, self._text[:prompt].tolist(), Sampling())
        if counted:
            accepted = self._state.arrive(request)
            assert accepted, f"a prompt of {prompt} tokens does not fit"
        return request.id

    def _release(self, ids: Sequence[int]) -> None:
        for id in self._state.abort(ids):
            self.engine.ended(id)

    # Timing

    def _repeat(self, point: Point) -> tuple[Work, float, float]:
        """One iteration: its work, its seconds, and those in which the device did not work."""
        chunks, slices = self._chunks(point), self._slices(point)
        plan = Plan(decode=point.decodes > 0, prefills=chunks, finetune=slices, overlap=point.overlap)
        self._clock.settle()
        start_s = time.perf_counter()
        self._state.view(0.0)
        work = self._state.apply(plan, 0.0)
        self._clock.start()
        self.engine.launch(plan)
        self._clock.stop()
        self.engine.collect()
        self._commit()
        seconds = time.perf_counter() - start_s
        if not point.ends:
            self._release([id for id, _ in chunks])
        return work, seconds, max(0.0, seconds - self._clock.device_s())

    def _burst(self, point: Point) -> float:
        """Seconds per iteration with one launched ahead. The loop's state stays out: it goes one by one."""
        sent, ended_s = [], []
        for n in range(BURST + 1):
            if n < BURST:
                chunks = self._chunks(point, counted=False)
                sent.append(chunks)
                if point.forward or point.backward:
                    self._stand(point, fresh=False)
                plan = Plan(decode=point.decodes > 0, prefills=chunks, overlap=point.overlap)
                self.engine.launch(plan._replace(finetune=self._pieces(point)))
            if n > 0:
                self.engine.collect()
                ended_s.append(time.perf_counter())
                for id, _ in sent[n - 1]:
                    self.engine.ended(id)
        return float(np.median(np.diff(ended_s)))

    def _holds_two(self, point: Point) -> bool:
        """Whether two such iterations can follow each other: their prompts fit beside the decodes."""
        if point.step:
            return False
        limits = self.space.limits
        prompts = [tokens + context for tokens, context in point.prefill]
        blocks = 2 * sum(-(-tokens // limits.block_tokens) for tokens in prompts)
        # The decodes have taken their blocks, but for what the burst adds.
        grown = point.decodes * -(-BURST // limits.block_tokens)
        slots = point.decodes + 2 * len(prompts)
        return slots <= limits.max_sequences and blocks + grown <= self.engine.tables.free

    def _real(self, plan: Plan) -> None:
        """An iteration that is computed and not timed."""
        self._state.apply(plan, 0.0)
        self.engine.launch(plan)
        self.engine.collect()
        self._commit()

    def _warm_up(self, job: str, window: int) -> None:
        """One whole sample, so that what is kept of it is real and all is allocated."""
        trainer = self.engine.trainers[job]
        left, layers = trainer.max_tokens, self._layers(job)
        self.engine.stand(job, self._tokens(left), 0, 0, fresh=True)
        while left:
            tokens = min(window, left)
            self.engine.launch(Plan(finetune=(Forward(job, tokens),)))
            self.engine.collect()
            left -= tokens
        self.engine.launch(Plan(finetune=(Backward(job, trainer.max_tokens * layers),)))
        self.engine.collect()

    # Small things

    def _samples(self, job: str) -> Iterator[Sample]:
        while True:
            yield self._tokens(self._lengths[job])

    def _tokens(self, length: int) -> Sample:
        if length not in self._made:
            self._made[length] = Sample(self._text[:length], self._labels[:length])
        return self._made[length]

    def _layers(self, job: str) -> int:
        return self.engine.trainers[job].spec.layers

    def _adapter(self, point: Point, n: int) -> str | None:
        return self._adapters[n % point.adapters] if point.adapters else None


def _place(point: Point) -> tuple[int, int, int]:
    """Length of the point's sample, and how much of its forward and backward lies before."""
    if point.backward is None:
        assert point.forward is not None
        tokens, context = point.forward
        return max(2, context + tokens), context, 0
    length, done, _ = point.backward
    before = length if point.forward is None else point.forward.context
    return length, before, done


class _DeviceClock:
    """How long the device worked between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks_s = [0.0, 0.0]
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def device_s(self) -> float:
        """Of the last pair, once its work has been waited for."""
        if self._cuda:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._marks_s[1] - self._marks_s[0]

    def _mark(self, n: int) -> None:
        if self._cuda:
            self._events[n].record()
        else:
            self._marks_s[n] = time.perf_counter()
