"""A slow second implementation of a pipeline's state: every sequence and every cell one by one.

It follows the loop's commands (plans, and the answers of the driver) with per-sequence counts only: no
aggregates, no ticks, no histograms. `Referee` compares it with `PipelineState` at every view, and checks at
the same time that the policy is pure and that every plan has work.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import pytest

from sim.core.answers import EVERY, GOES_ON, NEARLY_ALL, REMEMBERED
from sim.core.finetune import Backward, Forward, Job
from sim.core.loop import Done, Execute
from sim.core.plan import Limits, Plan, Policy, View
from sim.core.request import Request, Slo
from sim.core.rows import Outcome
from sim.core.state import PipelineState
from sim.core.work import Chunk, Work

SNAPSHOT_EVERY = 8
"""Views between two deep comparisons of the state before and after planning; one takes a millisecond."""


@dataclass
class Item:
    """One request, served token by token."""

    request: Request
    slo: Slo
    target: int
    """Output tokens after which it ends."""
    cached: int = 0
    generated: int = 0
    admitted: bool = False
    decoding: bool = False
    full: bool = False
    """Has reached its target; holds its blocks until the iteration ends."""
    joined: int = -1
    """How many had begun to decode before, when it last did."""
    preemptions: int = 0
    version: int | None = None
    scheduled_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def known(self) -> int:
        return self.request.prompt_tokens + self.generated


@dataclass
class Flight:
    """An iteration that was launched: who got computed and who got a token in it."""

    launch_s: float
    computed: list[int]
    sampled: list[int]
    joined: list[int]
    """Those of `sampled` whose prefill ended here."""
    steps: list[str]


class ReferenceJob:
    """One finetuning job, cell by cell: (layer, token) cells of backward, tokens of forward."""

    def __init__(self, job: Job, lengths: Seq[int]) -> None:
        self.spec = job.spec
        self.lengths = list(lengths)
        self.sample = 0
        self.forward: list[int] = []
        self.backward: list[tuple[int, int]] = []
        self.pending: list[int] = []
        """Samples done that no optimizer step has used."""
        self.steps: list[list[int]] = []

    @property
    def length(self) -> int:
        return self.lengths[self.sample] if self.sample < len(self.lengths) else 0

    def cells(self) -> list[tuple[int, int]]:
        """The cells of the present sample in the order of a layer-major backward."""
        return [(n, t) for n in reversed(range(self.spec.layers)) for t in reversed(range(self.length))]

    def advance(self, piece: Any) -> tuple[float, float, float]:
        """Do one slice; returns query-key pairs of forward, backward and recomputed forward."""
        due = len(self.pending) == self.spec.accumulation or (not self.length and bool(self.pending))
        if isinstance(piece, Forward):
            assert not due
            start = len(self.forward)
            new = list(range(start, start + piece.tokens))
            assert new and new[-1] < self.length, "forward past the end of the sample"
            self.forward += new
            return float(sum(t + 1 for t in new)), 0.0, 0.0
        if isinstance(piece, Backward):
            assert not due and len(self.forward) == self.length, "backward before the forward is done"
            cells = self._take(piece.layer_tokens)
            self.backward += cells
            tokens = {t for _, t in cells}
            if len(self.backward) == self.length * self.spec.layers:
                self._check_sample()
            recomputed = sum(t + 1 for t in tokens) if self.spec.memory == "recompute" else 0
            return 0.0, float(sum(t + 1 for _, t in cells)), float(recomputed)
        assert due, "an optimizer step that is not due"
        self.steps.append(self.pending)
        self.pending = []
        return 0.0, 0.0, 0.0

    def _take(self, count: int) -> list[tuple[int, int]]:
        if self.spec.order == "layer_major":
            return self.cells()[len(self.backward) :][:count]
        window, rest = divmod(count, self.spec.layers)
        assert rest == 0
        right = self.length - len(self.backward) // self.spec.layers
        tokens = range(right - window, right)
        assert tokens.start >= 0
        return [(n, t) for n in reversed(range(self.spec.layers)) for t in reversed(tokens)]

    def _check_sample(self) -> None:
        assert self.forward == list(range(self.length))
        assert sorted(self.backward) == sorted(self.cells()), "each cell goes backward exactly once"
        self.pending.append(self.length)
        self.sample += 1
        self.forward, self.backward = [], []


class Reference:
    """A pipeline in the slowest obvious way."""

    def __init__(self, limits: Limits, slos: dict[str, Slo], jobs: Iterable[ReferenceJob] = ()) -> None:
        self.limits = limits
        self.slos = slos
        self.total_blocks = limits.kv_tokens // limits.block_tokens
        self.room = min(limits.max_sequence_tokens, self.total_blocks * limits.block_tokens)
        self.items: dict[int, Item] = {}
        self.running: list[int] = []
        self.prefilling_order: list[int] = []
        self.flights: deque[Flight] = deque()
        self.versions: dict[str, int] = {}
        self.jobs = {job.spec.id: job for job in jobs}
        self.last_end_s = -math.inf
        self.ticks = 0
        self.answers: dict[str, list[int]] = {}
        """Tokens of the finished requests of each class, in order of their ends."""
        self.joined = 0
        self.late: dict[str, dict[str, list[bool]]] = {"first_tokens": {}, "answers": {}}
        """Of the first tokens and of the finished requests of each class, in order."""
        self._look_at = 0
        self._pace_s = math.inf

    def arrive(self, request: Request) -> None:
        target = min(request.output_tokens, self.room - request.prompt_tokens)
        item = self.items[request.id] = Item(request, self.slos[request.slo], target)
        if request.prompt_tokens >= self.room:
            item.outcome = Outcome.REJECTED

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.limits.block_tokens)

    @property
    def used_blocks(self) -> int:
        return sum(self.blocks(self.items[id].cached) for id in self.running)

    @property
    def decoding(self) -> list[Item]:
        return [self.items[id] for id in self.running if self.items[id].decoding]

    def execute(self, plan: Plan, work: Work, now_s: float) -> None:
        """Do the plan sequence by sequence, and check `work` on the way."""
        for id in plan.preempted:
            item = self.items[id]
            assert id in self.running and not item.full
            self._stop(item)
            item.cached = 0
            item.preemptions += 1
        decoded = self.decoding if plan.decode else []
        self.ticks += len(decoded) > 0
        assert work.decode_count == len(decoded)
        assert work.decode_context_tokens == sum(item.cached for item in decoded)
        sampled: list[int] = []
        for item in decoded:
            item.cached += 1
            self._sample(item, sampled)
        chunks = []
        for id, tokens in plan.prefills:
            item = self.items[id]
            if not item.admitted:
                item.admitted = True
                self.running.append(id)
                if item.version is None:
                    item.version = self.versions.get(item.request.adapter or "", 0)
            chunks.append(Chunk(tokens, item.cached))
            item.cached += tokens
            assert item.cached <= item.known
            if item.cached == item.known:
                item.joined = self.joined
                self.joined += 1
                self._sample(item, sampled)
        assert work.prefill == tuple(chunks)
        computed = [*decoded, *(self.items[id] for id, _ in plan.prefills)]
        assert work.adapters == len({item.request.adapter for item in computed} - {None})
        assert work.sampled_tokens == len(sampled)
        assert self.used_blocks <= self.total_blocks, "more K/V blocks in use than there are"
        assert len(self.running) <= self.limits.max_sequences
        assert len(decoded) + work.prefill_tokens <= self.limits.max_tokens
        assert decoded or chunks or plan.finetune, "an iteration without work"
        steps = self._finetune(plan, work)
        self.flights.append(
            Flight(now_s, [id for id, _ in plan.prefills], sampled, sampled[len(decoded) :], steps)
        )

    def _sample(self, item: Item, sampled: list[int]) -> None:
        item.generated += 1
        sampled.append(item.request.id)
        item.full = item.generated == item.target
        item.decoding = not item.full

    def _stop(self, item: Item) -> None:
        self.running.remove(item.request.id)
        item.admitted = item.decoding = False

    def _finetune(self, plan: Plan, work: Work) -> list[str]:
        pairs = [0.0, 0.0, 0.0]
        steps = []
        for piece in plan.finetune:
            for i, some in enumerate(self.jobs[piece.job].advance(piece)):
                pairs[i] += some
            if not isinstance(piece, Forward | Backward):
                steps.append(piece.job)
        assert pairs[0] == sum(c.attention_pairs for c in work.forward)
        assert pairs[1] == sum(c.attention_pairs for c in work.backward)
        assert pairs[2] == sum(c.attention_pairs for c in work.recompute)
        assert work.forward_tokens == sum(p.tokens for p in plan.finetune if isinstance(p, Forward))
        layer_tokens = sum(p.layer_tokens for p in plan.finetune if isinstance(p, Backward))
        assert work.backward_layer_tokens == layer_tokens
        assert work.optimizer_params == sum(self.jobs[job].spec.optimizer_params for job in steps)
        return steps

    def done(self, done: Done) -> None:
        """The oldest iteration has ended: stamp its tokens, end who is to end."""
        flight = self.flights.popleft()
        start_s = max(flight.launch_s, self.last_end_s)
        self.last_end_s = done.now_s
        for id in flight.computed:
            if self.items[id].scheduled_s is None:
                self.items[id].scheduled_s = start_s
        for id in flight.sampled:
            item = self.items[id]
            if item.outcome is not None:
                continue  # computed in vain: it had ended while this iteration was planned
            item.token_s.append(done.now_s)
            if len(item.token_s) == 1:
                waited_s = done.now_s - item.request.arrival_s
                self._count("first_tokens", item, waited_s > min(item.slo.ttft_s, item.slo.e2e_s))
        sampled = [self.items[id] for id in flight.sampled]
        for item in sorted(sampled, key=lambda item: item.joined):
            if item.outcome is None and len(item.token_s) == item.target:
                self._end(item, Outcome.FINISHED)
        for job in flight.steps:
            self.versions[job] = self.versions.get(job, 0) + 1
        for id in done.ended:
            if self.items[id].outcome is None:
                self._end(self.items[id], Outcome.FINISHED)
        for id in done.aborted:
            if id in self.items and self.items[id].outcome is None:
                self._end(self.items[id], Outcome.ABORTED)

    def _end(self, item: Item, outcome: Outcome) -> None:
        item.outcome = outcome
        if outcome is Outcome.FINISHED:
            self.answers.setdefault(item.request.slo, []).append(len(item.token_s))
            last_s, gaps = item.token_s[-1], len(item.token_s) - 1
            slow = gaps > 0 and last_s - item.token_s[0] > gaps * item.slo.tpot_s
            self._count("answers", item, slow or last_s - item.request.arrival_s > item.slo.e2e_s)
        if item.admitted:
            self._stop(item)

    def _count(self, what: str, item: Item, late: bool) -> None:
        self.late[what].setdefault(item.request.slo, []).append(late)

    def late_share(self, what: str) -> float:
        """Of the worst class: each of its requests weighs 2 % less than the next."""
        return max(
            (
                sum(0.02 * 0.98**age for age, late in enumerate(reversed(all)) if late)
                for all in self.late[what].values()
            ),
            default=0.0,
        )

    @property
    def stamped(self) -> list[Item]:
        """The decoding sequences whose last prefill's token has its time."""
        unstamped = {id for flight in self.flights for id in flight.joined}
        return [item for item in self.decoding if item.request.id not in unstamped]

    def token_deadline_s(self, start_s: float) -> float:
        """Earliest deadline of the next token of any; a first one that is under way comes at `start_s`."""
        firsts = [(item, item.token_s[0] if item.token_s else start_s) for item in self.decoding]
        return min((first_s + item.generated * item.slo.tpot_s for item, first_s in firsts), default=math.inf)

    def answer_pace_s(self, now_s: float) -> float:
        """Seconds per token that the answers with an end-to-end bound have left, looked at every so many ticks."""
        bounded = [item for item in self.stamped if item.slo.e2e_s < math.inf]
        if not bounded:
            self._look_at = self.ticks
            return math.inf
        if self.ticks >= self._look_at:
            self._look_at = self.ticks + EVERY
            self._pace_s = math.inf
            for item in bounded:
                lengths = sorted(self.answers.get(item.request.slo, [])[-REMEMBERED:])
                expected = lengths[int(NEARLY_ALL * (len(lengths) - 1))] if lengths else 0
                left = max(expected - item.generated, GOES_ON * item.generated)
                left_s = item.request.arrival_s + item.slo.e2e_s - now_s
                if left_s > 0:
                    self._pace_s = min(self._pace_s, left_s / left)
        return self._pace_s


class Referee:
    """A policy that asks another one twice, and compares state and reference before it answers."""

    def __init__(self, policy: Policy, state: PipelineState, reference: Reference) -> None:
        self.serves = policy.serves
        self._policy = policy
        self._state = state
        self.reference = reference
        self.views = 0

    def plan(self, view: View) -> Plan:
        self.views += 1
        self._compare(view)
        deep = self.views % SNAPSHOT_EVERY == 0
        before = snapshot(self._state) if deep else None
        plan = self._policy.plan(view)
        assert self._policy.plan(view) == plan, "the same view gave another plan"
        if deep:
            assert snapshot(self._state) == before, "planning changed the state"
        return plan

    def on_execute(self, command: Execute, now_s: float) -> None:
        self.reference.execute(command.plan, command.work, now_s)

    def _compare(self, view: View) -> None:
        reference = self.reference
        block = reference.limits.block_tokens
        decoding = reference.decoding
        assert view.decode_count == len(decoding)
        assert view.decode_context_tokens == sum(item.cached for item in decoding)
        assert view.adapters == Counter(i.request.adapter for i in decoding if i.request.adapter is not None)
        assert view.growth_blocks == sum(item.cached % block == 0 for item in decoding)
        assert view.free_blocks == reference.total_blocks - reference.used_blocks
        assert view.running == len(reference.running)
        assert view.token_deadline_s == pytest.approx(reference.token_deadline_s(view.start_s), rel=1e-12)
        assert view.answer_pace_s == pytest.approx(reference.answer_pace_s(view.now_s), rel=1e-12)
        assert view.late_first_tokens == pytest.approx(reference.late_share("first_tokens"), rel=1e-9)
        assert view.late_answers == pytest.approx(reference.late_share("answers"), rel=1e-9)
        assert view.arrived == len(reference.items)
        prefilling = [
            id
            for id in reference.running
            if not reference.items[id].decoding and not reference.items[id].full
        ]
        assert [s.id for s in view.prefilling] == prefilling
        waiting = {id for id, item in reference.items.items() if item.outcome is None and not item.admitted}
        assert {s.id for s in view.waiting} == waiting
        assert view.waiting.tokens == sum(reference.items[id].known for id in waiting)
        self._compare_victims(view)
        for id in reference.running:
            item = reference.items[id]
            assert item.request.adapter is None or self._state.running[id].adapter_version == item.version

    def _compare_victims(self, view: View) -> None:
        reference = self.reference
        block = reference.limits.block_tokens
        running = [reference.items[id] for id in reversed(reference.running)]
        expected = [
            (
                item.request.id,
                reference.blocks(item.cached),
                item.decoding,
                item.cached,
                item.decoding and item.cached % block == 0,
                item.request.adapter,
            )
            for item in running
            if not item.full
        ]
        assert [tuple(v) for v in view.victims()] == expected


_PLAIN = (int, float, str, bool, type(None))


def snapshot(value: Any) -> Any:
    """Everything reachable from `value` through fields and containers, as plain comparable values."""
    return _freeze(value, set())


def _freeze(value: Any, path: set[int]) -> Any:
    if isinstance(value, _PLAIN) or callable(value):
        return value if isinstance(value, _PLAIN) else "callable"
    if id(value) in path:
        return "above"
    path = path | {id(value)}
    if isinstance(value, dict):
        return ("dict", [(k, _freeze(v, path)) for k, v in value.items()])
    if isinstance(value, list | tuple | deque):
        return (type(value).__name__, [_freeze(v, path) for v in value])
    names = slots_of(value)
    if names:
        return (type(value).__name__, [(n, _freeze(getattr(value, n), path)) for n in names])
    if hasattr(value, "tobytes"):
        return value.tobytes()
    return type(value).__name__


def slots_of(value: Any) -> list[str]:
    """Names of the instance's fields, slotted or not."""
    slots = [n for cls in type(value).__mro__ for n in getattr(cls, "__slots__", ()) if hasattr(value, n)]
    return [*slots, *getattr(value, "__dict__", {})]


def reachable(value: Any) -> list[Any]:
    """Every object that ordinary attributes and containers lead to from `value`; no dunder attributes."""
    found: dict[int, Any] = {}
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, _PLAIN) or id(one) in found:
            continue
        found[id(one)] = one
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | deque):
            todo += list(one)
        if not callable(one):
            todo += [getattr(one, name) for name in slots_of(one) if not name.startswith("__")]
    return list(found.values())
