"""The one owner of a pipeline's mutable state: requests, K/V blocks, finetuning progress, rows.

Two steps change it. `apply` launches a plan: counts advance as if it were done, since what an iteration
computes is known before it runs. `commit` gives the oldest launched iteration its end time: tokens get
their stamps, finished sequences release their blocks, steps are published. With a lookahead of one,
`apply` of the next plan comes before `commit` of the one that runs.

Cost per iteration follows what changes (arrivals, chunks, completions, preemptions), not how many
sequences run: the decoding ones are a count, a sum of contexts and a list of completions by tick.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sim.core.answers import AnswerPace
from sim.core.deadlines import TokenDeadlines
from sim.core.finetune import Job
from sim.core.jobs import FinetuneWork, Jobs, PublishedStep
from sim.core.kv import KvBlocks
from sim.core.lateness import LateRequests
from sim.core.legality import check_plan
from sim.core.plan import Feedback, Limits, Plan, Victim, View
from sim.core.queue import AdmissionQueue
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder, work_row
from sim.core.sequence import Sequence
from sim.core.work import Chunk, Work

# What is made per iteration skips the NamedTuple's own constructor, a Python function: half the time.
_new = tuple.__new__
_NAN = math.nan
_NONE: tuple[Any, ...] = ()
_NO_FINETUNING: FinetuneWork = ((), (), (), 0, ())


Launched = tuple[
    Work,
    float | None,  # predicted seconds
    float,  # time of the launch
    int,  # decode tick reached by this iteration
    Iterable[Sequence],  # computed for the first time
    Iterable[Sequence],  # prefill ended here, with a token
    Iterable[Sequence],  # finishing
    Iterable[tuple[Sequence, int, int]],  # (preempted, start tick, end tick) of segments that ended before
    Iterable[PublishedStep],
    tuple[int, int, int, int],  # running, waiting, K/V blocks used, preempted
]
"""An iteration between `apply` and `commit`."""


class PipelineState:
    """State of one pipeline; see the module's docstring for how it moves."""

    def __init__(
        self,
        *,
        limits: Limits,
        slos: Mapping[str, Slo],
        recorder: Recorder,
        jobs: Iterable[Job] = (),
        pipeline: int = 0,
    ) -> None:
        self.limits = limits
        self.pipeline = pipeline
        self.kv = KvBlocks(limits.kv_tokens, limits.block_tokens)
        self.waiting = AdmissionQueue(limits.admission)
        self.running: dict[int, Sequence] = {}
        """Admitted sequences in order of admission."""
        self.prefilling: dict[int, Sequence] = {}
        self.decode_count = 0
        self.decode_context_tokens = 0
        self.tick = 0
        self.arrived = 0
        self.ended_prompt_tokens = 0
        self.ended_prompt_pairs = 0.0
        self.ended_output_tokens = 0
        """Of all requests that were taken and have ended, with the query-key pairs of their prompts; a router
        learns from them how long requests are."""
        self.predicted_s = 0.0
        self.measured_s = 0.0
        """Of all iterations that were predicted; a router learns from them how wrong predictions are."""
        self.jobs = Jobs(jobs)
        self.adapter_versions: dict[str, int] = {}
        self._failed: set[str] = set()
        """Jobs that were given up."""
        self.memory: Any = None

        self._slos = slos
        self._recorder = recorder
        self._max_tokens = min(limits.max_sequence_tokens, self.kv.total * limits.block_tokens)
        self._requests: dict[int, Request] = {}
        self._finish_at: dict[int, list[Sequence]] = {}
        self._finish_tick: dict[int, int] = {}
        self._deadlines = TokenDeadlines()
        self._answers = AnswerPace()
        self._late = LateRequests()
        self._adapter_users: dict[str, int] = {}
        """Adapter -> decoding sequences that use it."""
        self._launched: deque[Launched] = deque()
        self._iterations = 0
        self._last_end_s = -math.inf
        self._last: Feedback | None = None
        self._victims = self.victims  # bound once: every view carries it

    # What others ask

    @property
    def unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self.running) + self.waiting.count

    @property
    def outstanding_tokens(self) -> int:
        """Known tokens of all requests waiting or running."""
        return (
            self.waiting.tokens
            + sum([s.known_tokens for s in self.prefilling.values()])
            + self.decode_context_tokens
            + self.decode_count
        )

    @property
    def free_s(self) -> float:
        """When all that was launched is expected to have ended."""
        end_s = self._last_end_s
        for _, predicted_s, launch_s, *_ in self._launched:
            end_s = max(end_s, launch_s) + self._expected_s(predicted_s)
        return end_s

    def expected_tokens(self, slo: str) -> int:
        """Tokens that most answers of a class with an end-to-end bound do not exceed; 0 without any."""
        return self._answers.expected_tokens(slo)

    def view(self, now_s: float) -> View:
        """What a policy sees; jobs whose time has come are active from now on."""
        if self.jobs.next_start_s <= now_s:
            self.jobs.start(now_s)
        tick, count, adapters = self.tick + 1, self.decode_count, self._adapter_users
        kv = self.kv
        start_s, deadline_s = now_s, self._deadlines.earliest_s(tick)
        if self._launched:
            start_s = self._expected_start_s(now_s)
            deadline_s = min(deadline_s, self._unstamped_deadline_s(start_s))
        return _new(
            View,
            (
                now_s,
                start_s,
                self.limits,
                _new(
                    Work,
                    (
                        _NONE,
                        count,
                        self.decode_context_tokens,
                        count,
                        _NONE,
                        _NONE,
                        _NONE,
                        0,
                        len(adapters),
                        False,
                    ),
                ),
                kv.growth(tick),
                kv.free,
                len(self.running),
                tuple(self.prefilling.values()) if self.prefilling else _NONE,
                self.waiting,
                self.jobs.views,
                adapters,
                deadline_s,
                self._answers.pace_s(self.tick, now_s),
                self._late.first_token_share,
                self._late.answer_share,
                self.arrived,
                self._last,
                self.memory,
                self._victims,
            ),
        )

    def _expected_start_s(self, now_s: float) -> float:
        """When the iteration that is planned now will start, with others still running."""
        start_s = now_s
        for _, predicted_s, *_ in self._launched:
            start_s += self._expected_s(predicted_s)
        return start_s

    def _unstamped_deadline_s(self, start_s: float) -> float:
        """As `TokenDeadlines.earliest_s`, of those whose prefill ends in what runs: at `start_s`, as is expected."""
        deadline_s = math.inf
        for _, _, _, _, _, sampled, *_ in self._launched:
            for sequence in sampled:
                if sequence.decoding:
                    first_s = start_s if sequence.first_token_s is None else sequence.first_token_s
                    tokens = sequence.generated_tokens + self.tick - sequence.start_tick
                    deadline_s = min(deadline_s, first_s + tokens * sequence.slo.tpot_s)
        return deadline_s

    def _expected_s(self, predicted_s: float | None) -> float:
        """Seconds of an iteration, for which the last one's stand when its policy does not predict."""
        if predicted_s is not None:
            return predicted_s
        return 0.0 if self._last is None else self._last.actual_s

    def victims(self) -> Iterator[Victim]:
        for sequence in reversed(self.running.values()):
            if sequence.decoding or sequence.id in self.prefilling:
                yield self.victim(sequence)

    def victim(self, sequence: Sequence) -> Victim:
        cached = self._cached_tokens(sequence)
        grows = sequence.decoding and cached % self.kv.block_tokens == 0
        blocks = self.kv.blocks_for(cached)
        return Victim(sequence.id, blocks, sequence.decoding, cached, grows, sequence.adapter)

    # Arrivals

    def arrive(self, request: Request) -> bool:
        """Queue a request. False, and a rejected row, when its prompt can never fit.

        Raises ValueError for a request without prompt or without output.
        """
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(
                f"request {request.id}: prompt_tokens and output_tokens must be at least 1, "
                f"got {request.prompt_tokens} and {request.output_tokens}"
            )
        self.arrived += 1
        slo = self._slos[request.slo]
        self._requests[request.id] = request
        sequence = Sequence(request.id, request.arrival_s, request.prompt_tokens, slo, request.adapter)
        if request.prompt_tokens >= self._max_tokens:
            self._record_request(sequence, Outcome.REJECTED)
            return False
        self.waiting.add(sequence)
        return True

    # Launching

    def apply(self, plan: Plan, now_s: float) -> Work:
        """Launch `plan` and return its Work. Raises IllegalPlan, and then nothing has changed."""
        moves = check_plan(self, plan)
        decode, prefills, preempted, slices, overlap, predicted_s, self.memory = plan
        segments = self._preempt(preempted) if preempted else _NONE

        count = context = adapters = 0
        named: Iterable[str] = _NONE
        finishing: list[Sequence] | tuple[Any, ...] = _NONE
        kv = self.kv
        if decode and self.decode_count:
            count, context = self.decode_count, self.decode_context_tokens
            adapters = len(self._adapter_users)
            if prefills:
                named = tuple(self._adapter_users)
            self.tick = tick = self.tick + 1
            kv.free -= kv.growth(tick)
            self.decode_context_tokens = context + count
            if tick in self._finish_at:
                finishing = self._finish_at.pop(tick)
                for sequence in finishing:
                    del self._finish_tick[sequence.id]
                    self._leave_decode(sequence)

        chunks: tuple[Chunk, ...] = _NONE
        scheduled: Iterable[Sequence] = _NONE
        sampled: list[Sequence] | tuple[Any, ...] = _NONE
        if prefills:
            chunks, scheduled, sampled = self._prefill(prefills)
            used = {*named, *[self.running[id].adapter for id, _ in prefills]}
            adapters = len(used) - (None in used)
            if sampled:
                finishing = [*finishing, *self._join_decode(sampled)]

        forward, backward, recompute, params, steps = self.jobs.run(moves) if moves else _NO_FINETUNING
        work = _new(
            Work,
            (
                chunks,
                count,
                context,
                count + len(sampled),
                forward,
                backward,
                recompute,
                params,
                adapters,
                overlap and bool(slices),
            ),
        )
        counts = (len(self.running), self.waiting.count, kv.total - kv.free, len(preempted))
        self._launched.append(
            (work, predicted_s, now_s, self.tick, scheduled, sampled, finishing, segments, steps, counts)
        )
        return work

    def _prefill(
        self, prefills: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[Chunk, ...], list[Sequence], list[Sequence]]:
        """Compute chunks, admitting who waits: (chunks, first scheduled here, ended here)."""
        chunks, scheduled, sampled = [], [], []
        kv = self.kv
        for id, tokens in prefills:
            sequence = self.prefilling.get(id)
            if sequence is None:
                sequence = self._admit()
            if sequence.scheduled_s is None:
                scheduled.append(sequence)
            done = sequence.computed_tokens
            kv.free -= kv.blocks_for(done + tokens) - kv.blocks_for(done)
            chunks.append(Chunk(tokens, done))
            sequence.computed_tokens = done + tokens
            if sequence.remaining_tokens == 0:
                sampled.append(sequence)
        return tuple(chunks), scheduled, sampled

    def _admit(self) -> Sequence:
        sequence = self.waiting.take()
        self.running[sequence.id] = self.prefilling[sequence.id] = sequence
        adapter = sequence.adapter
        if adapter is not None and sequence.preemptions == 0:
            sequence.adapter_version = self.adapter_versions.get(adapter, 0)
        return sequence

    def _join_decode(self, sampled: list[Sequence]) -> list[Sequence]:
        """Move sequences whose prefill ended to the decoding ones; return those that this token ends."""
        ended = []
        for sequence in sampled:
            del self.prefilling[sequence.id]
            sequence.generated_tokens += 1
            sequence.start_tick = self.tick
            left = self._target_tokens(sequence.id) - sequence.generated_tokens
            if left == 0:
                ended.append(sequence)
                continue
            sequence.decoding = True
            self.decode_count += 1
            self.decode_context_tokens += sequence.computed_tokens
            self.kv.join(sequence.computed_tokens, self.tick)
            if sequence.adapter is not None:
                self._adapter_users[sequence.adapter] = self._adapter_users.get(sequence.adapter, 0) + 1
            self._finish_tick[sequence.id] = finish = self.tick + left
            self._finish_at.setdefault(finish, []).append(sequence)
        return ended

    def _leave_decode(self, sequence: Sequence) -> None:
        """Take out of the aggregates and bring the sequence's own counts up to the current tick."""
        self.kv.leave(sequence.computed_tokens, sequence.start_tick)
        self._deadlines.remove(sequence)
        self._answers.remove(sequence)
        ticks = self.tick - sequence.start_tick
        sequence.computed_tokens += ticks
        sequence.generated_tokens += ticks
        sequence.decoding = False
        self.decode_count -= 1
        self.decode_context_tokens -= sequence.computed_tokens
        adapter = sequence.adapter
        if adapter is not None:
            self._adapter_users[adapter] -= 1
            if self._adapter_users[adapter] == 0:
                del self._adapter_users[adapter]

    def _preempt(self, ids: tuple[int, ...]) -> list[tuple[Sequence, int, int]]:
        """Put back at the queue's front; return the decode segments that end with it."""
        segments = []
        for id in ids:
            sequence = self.running[id]
            if sequence.decoding:
                segments.append((sequence, sequence.start_tick, self.tick))
            self._stop(sequence)
            sequence.computed_tokens = 0
            sequence.preemptions += 1
            self.waiting.put_back(sequence)
        return segments

    def _stop(self, sequence: Sequence) -> None:
        """Take a running sequence out and release its blocks."""
        if sequence.decoding:
            self._finish_at[self._finish_tick.pop(sequence.id)].remove(sequence)
            self._leave_decode(sequence)
        self.prefilling.pop(sequence.id, None)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence.id]
        self.kv.free += self.kv.blocks_for(sequence.computed_tokens)

    # Ending

    def busy_until(self, end_s: float) -> None:
        """The device did something else until then: the oldest launched iteration has begun no earlier."""
        self._last_end_s = max(self._last_end_s, end_s)

    def commit(
        self,
        end_s: float,
        ended: Iterable[int] = (),
        aborted: Iterable[int] = (),
        failed: tuple[str, ...] = (),
    ) -> list[int]:
        """Give the oldest launched iteration its end time; return the ids of requests that ended.

        `ended` lists sequences whose token of this iteration was their last by themselves (a stop
        token), `aborted` those whose client has gone, running or waiting, `failed` jobs whose step of this
        iteration publishes nothing. What an iteration launched meanwhile does for such a job is done in vain.
        """
        work, predicted_s, launch_s, tick, scheduled, sampled, finishing, segments, steps, counts = (
            self._launched.popleft()
        )
        start_s = launch_s if launch_s > self._last_end_s else self._last_end_s
        self._last_end_s = end_s
        index, recorder, pipeline = self._iterations, self._recorder, self.pipeline
        recorder.iterations.append(
            (
                pipeline,
                index,
                start_s,
                end_s,
                _NAN if predicted_s is None else predicted_s,
                *work_row(work),
                *counts,
            )
        )
        self._last = _new(Feedback, (index, work, predicted_s, end_s - start_s))
        if predicted_s is not None:
            self.predicted_s += predicted_s
            self.measured_s += end_s - start_s
        self._iterations = index + 1
        if work[1]:
            recorder.ticks.append((pipeline, end_s))
        gone: list[int] = []
        if scheduled:
            for sequence in scheduled:
                # With a lookahead its second chunk may have been launched before the first had its time.
                if sequence.scheduled_s is None:
                    sequence.scheduled_s = start_s
        if sampled:
            self._stamp_first_tokens(sampled, end_s)
        if segments:
            for sequence, start_tick, end_tick in segments:
                self._record_segment(sequence, start_tick, end_tick)
        if finishing:
            for sequence in finishing:
                if sequence.id in self.running:
                    self._record_segment(sequence, sequence.start_tick, tick)
                    self._record_request(sequence, Outcome.FINISHED, end_s)
                    self._release(sequence)
                    gone.append(sequence.id)
        if steps:
            for job, step, samples, tokens in steps:
                if job in self._failed:
                    continue  # launched before its job was given up
                lost = job in failed
                if not lost:
                    self.adapter_versions[job] = step
                recorder.steps.append((pipeline, recorder.jobs.code(job), step, samples, tokens, end_s, lost))
        if failed:
            self._give_up(failed, steps)
        if ended or aborted:
            gone += [id for id in ended if self._end_early(id, Outcome.FINISHED, tick, end_s)]
            gone += [id for id in aborted if self._end_early(id, Outcome.ABORTED, tick, end_s)]
        return gone

    def _give_up(self, failed: tuple[str, ...], steps: Iterable[PublishedStep]) -> None:
        assert set(failed) <= {step.job for step in steps}, f"{failed} have no step in this iteration"
        self._failed.update(failed)
        self.jobs.give_up(failed)

    def abort(self, ids: Iterable[int]) -> list[int]:
        """Drop requests whose client has gone while nothing runs; return the ids that were still here."""
        assert not self._launched
        return [id for id in ids if self._end_early(id, Outcome.ABORTED, self.tick, self._last_end_s)]

    def close(self) -> None:
        """Record what is still waiting or running when the run ends, with the tokens that it got."""
        assert not self._launched
        for sequence in [*self.running.values(), *self.waiting]:
            if sequence.decoding:
                start_tick = sequence.start_tick
                self._stop(sequence)
                self._record_segment(sequence, start_tick, self.tick)
            elif sequence.id in self.prefilling:
                self._stop(sequence)
            self._record_request(sequence, Outcome.UNFINISHED)

    def _end_early(self, id: int, outcome: Outcome, tick: int, end_s: float) -> bool:
        """End a request before its last token; False when it has ended already."""
        sequence = self.running.get(id)
        if sequence is None:
            # Waiting; if an iteration launched meanwhile has put it back, that one records its segment.
            sequence = next((s for s in self.waiting if s.id == id), None)
            if sequence is None:
                return False
            self.waiting.remove(sequence)
        else:
            prefilling, start_tick = id in self.prefilling, sequence.start_tick
            self._stop(sequence)
            # A token that an iteration launched meanwhile computes for it comes in vain.
            if any(sequence in sampled for _, _, _, _, _, sampled, *_ in self._launched):
                sequence.generated_tokens -= 1
            elif not prefilling:
                sequence.generated_tokens -= self.tick - tick
                self._record_segment(sequence, start_tick, tick)
        self._record_request(sequence, outcome, end_s if outcome is Outcome.FINISHED else None)
        return True

    # Small things

    def _cached_tokens(self, sequence: Sequence) -> int:
        ticks = self.tick - sequence.start_tick if sequence.decoding else 0
        return sequence.computed_tokens + ticks

    def _target_tokens(self, id: int) -> int:
        """Output tokens after which a sequence ends at the latest."""
        request = self._requests[id]
        return min(request.output_tokens, self._max_tokens - request.prompt_tokens)

    def _stamp_first_tokens(self, sampled: Iterable[Sequence], end_s: float) -> None:
        for sequence in sampled:
            sequence.segment_first_s = end_s
            if sequence.first_token_s is None:
                sequence.first_token_s = end_s
                self._late.first_token(sequence.slo, sequence.arrival_s, end_s)
            if sequence.decoding:
                self._deadlines.add(sequence)
                self._answers.add(sequence)

    def _record_segment(self, sequence: Sequence, start_tick: int, end_tick: int) -> None:
        slo = self._recorder.slos.code(sequence.slo.name)
        first_s = math.nan if sequence.segment_first_s is None else sequence.segment_first_s
        self._recorder.segments.append((sequence.id, self.pipeline, slo, first_s, start_tick, end_tick))

    def _record_request(
        self, sequence: Sequence, outcome: Outcome, last_token_s: float | None = None
    ) -> None:
        request = self._requests.pop(sequence.id)
        if outcome is not Outcome.REJECTED:
            self.ended_prompt_tokens += request.prompt_tokens
            self.ended_prompt_pairs += Chunk(request.prompt_tokens, 0).attention_pairs
            self.ended_output_tokens += sequence.generated_tokens
        if outcome is Outcome.FINISHED:
            self._answers.finished(sequence)
            assert sequence.first_token_s is not None and last_token_s is not None
            self._late.answer(
                sequence.slo,
                sequence.arrival_s,
                sequence.first_token_s,
                last_token_s,
                sequence.generated_tokens,
            )
        self._recorder.add_request(
            request,
            self.pipeline,
            outcome,
            scheduled_s=sequence.scheduled_s,
            first_token_s=sequence.first_token_s,
            last_token_s=last_token_s,
            generated_tokens=sequence.generated_tokens,
            preemptions=sequence.preemptions,
        )
