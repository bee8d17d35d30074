"""Exact fakes and small drivers that the tests of the core, the policies and the cluster share.

`LinearCost` is a cost model that can be solved by hand, `ListArrivals` a source that is a list, `drive` the
shortest possible driver of the shared loop, and `run` a whole single-pipeline run.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sim.policies
from sim.core.cost import CostModel, Fit
from sim.core.finetune import Job, JobSpec, JobView, backward_chunks, recompute_chunks
from sim.core.loop import Command, Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits, Plan, Policy
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder, Table
from sim.core.state import PipelineState
from sim.core.work import Chunk, Work

SLOS = {
    "default": Slo(),
    "chat": Slo(name="chat", ttft_s=1.0, tpot_s=0.05),
    "batch": Slo(name="batch", ttft_s=20.0, tpot_s=0.2),
    "report": Slo(name="report", e2e_s=5.0),
}
LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """Seconds linear in every count of Work; all coefficients are seconds per unit.

    The defaults are sums of powers of two, so that adding them up is exact in floating point.
    """

    host_s: float = 2.0**-8
    prefill_s: float = 2.0**-14
    pair_s: float = 0.0
    """Per query-key pair of prompts."""
    decode_s: float = 2.0**-14
    context_s: float = 0.0
    forward_s: float = 2.0**-14
    backward_s: float = 2.0**-16
    """Per layer-token."""
    recompute_s: float = 2.0**-14
    optimizer_s: float = 2.0**-20
    """Per parameter."""
    adapter_s: float = 0.0
    scale: float = 1.0

    def parts(self, work: Work) -> dict[str, float]:
        scale = self.scale
        return {
            "host": scale * self.host_s,
            "prefill": scale
            * (
                self.prefill_s * work.prefill_tokens
                + self.pair_s * sum(chunk.attention_pairs for chunk in work.prefill)
            ),
            "decode": scale
            * (self.decode_s * work.decode_count + self.context_s * work.decode_context_tokens),
            "forward": scale * self.forward_s * work.forward_tokens,
            "backward": scale * self.backward_s * work.backward_layer_tokens,
            "recompute": scale * self.recompute_s * work.recompute_tokens,
            "optimizer": scale * self.optimizer_s * work.optimizer_params,
            "adapters": scale * self.adapter_s * work.adapters,
        }

    def iteration_s(self, work: Work) -> float:
        return sum(self.parts(work).values())

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        def with_tokens(tokens: int) -> Work:
            return work._replace(prefill=(*work.prefill, Chunk(tokens, context)))

        return self._largest(work, with_tokens, 1, max_tokens, budget_s)[0]

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> Fit:
        def with_tokens(tokens: int) -> Work:
            return work._replace(forward=(*work.forward, Chunk(tokens, context)))

        return self._largest(work, with_tokens, 1, max_tokens, budget_s)

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> Fit:
        def with_layer_tokens(layer_tokens: int) -> Work:
            return work._replace(
                backward=work.backward + backward_chunks(job, layer_tokens),
                recompute=work.recompute + recompute_chunks(job, layer_tokens),
            )

        unit = job.layers if job.order == "window_major" else 1
        return self._largest(work, with_layer_tokens, unit, job.backward_left, budget_s)

    def _largest(self, work: Work, more: Callable[[int], Work], unit: int, most: int, budget_s: float) -> Fit:
        """Largest multiple of `unit` up to `most` within the budget: the linear solution, then made exact."""
        base_s = self.iteration_s(work)
        if base_s > budget_s or most < unit:
            return 0, base_s
        unit_s = self.iteration_s(more(unit)) - base_s
        units = most // unit
        if unit_s > 0 and budget_s < math.inf:
            units = min(units, int((budget_s - base_s) / unit_s))
        while units > 0 and self.iteration_s(more(units * unit)) > budget_s:
            units -= 1
        while (units + 1) * unit <= most and self.iteration_s(more((units + 1) * unit)) <= budget_s:
            units += 1
        return units * unit, self.iteration_s(more(units * unit)) if units else base_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention(LinearCost):
    """On two streams, after the optimizer steps, the shorter of inference and finetuning costs `contention` of
    its seconds, and a forward window `read_s`, for the weights that it no longer shares."""

    decode_s: float = 2.0**-9
    forward_s: float = 2.0**-11
    backward_s: float = 2.0**-13
    contention: float
    read_s: float = 0.0

    def iteration_s(self, work: Work) -> float:
        alone_s = LinearCost.iteration_s(self, work)
        if not work.overlap:
            return alone_s
        streams = (work.inference, work.finetuning._replace(optimizer_params=0))
        shorter_s = min(LinearCost.iteration_s(self, stream) for stream in streams)
        return alone_s - (1 - self.contention) * (shorter_s - self.host_s) + self.read_s * bool(work.forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantCost:
    """Every iteration takes the same time, whatever is in it."""

    seconds: float

    def iteration_s(self, work: Work) -> float:
        return self.seconds

    def parts(self, work: Work) -> dict[str, float]:
        return {"constant": self.seconds}

    def largest_prefill(self, work: Work, context: int, max_tokens: int, budget_s: float) -> int:
        return max_tokens if self.seconds <= budget_s else 0

    def largest_forward(self, work: Work, context: int, max_tokens: int, budget_s: float) -> Fit:
        return max_tokens if self.seconds <= budget_s else 0, self.seconds

    def largest_backward(self, work: Work, job: JobView, budget_s: float) -> Fit:
        return job.backward_left if self.seconds <= budget_s else 0, self.seconds


class ListArrivals:
    """Requests known in advance."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = deque(sorted(requests, key=lambda r: (r.arrival_s, r.id)))
        self.ended_ids: list[int] = []

    def next_s(self) -> float | None:
        return self._requests[0].arrival_s if self._requests else None

    def due(self, now_s: float) -> Seq[Request]:
        found = []
        while self._requests and self._requests[0].arrival_s <= now_s:
            found.append(self._requests.popleft())
        return found

    def ended(self, request_id: int, now_s: float) -> None:
        self.ended_ids.append(request_id)


class ClosedLoop:
    """`clients` clients, each sending its next request `think_s` after its last one ended, `total` in all."""

    def __init__(
        self, *, clients: int, total: int, think_s: float, prompt_tokens: int = 20, output_tokens: int = 5
    ) -> None:
        self._total = total
        self._think_s = think_s
        self._shape = (prompt_tokens, output_tokens)
        self._planned: list[float] = [0.0] * min(clients, total)
        self.sent = 0
        self.in_service: set[int] = set()

    def next_s(self) -> float | None:
        if self._planned:
            return min(self._planned)
        return math.inf if self.in_service else None

    def due(self, now_s: float) -> Seq[Request]:
        due_s = sorted(t for t in self._planned if t <= now_s)
        self._planned = [t for t in self._planned if t > now_s]
        found = []
        for arrival_s in due_s:
            found.append(Request(self.sent, arrival_s, *self._shape))
            self.in_service.add(self.sent)
            self.sent += 1
        return found

    def ended(self, request_id: int, now_s: float) -> None:
        self.in_service.remove(request_id)
        if self.sent + len(self._planned) < self._total:
            self._planned.append(now_s + self._think_s)


def requests_of(
    count: int,
    *,
    rate_rps: float,
    prompt_tokens: int | tuple[int, int] = 100,
    output_tokens: int | tuple[int, int] = 50,
    slo: str = "default",
    adapters: Seq[str | None] = (None,),
    seed: int = 0,
) -> list[Request]:
    """Poisson arrivals; lengths fixed, or uniform in a closed range."""
    random = np.random.default_rng(seed)

    def draw(length: int | tuple[int, int]) -> int:
        return length if isinstance(length, int) else int(random.integers(length[0], length[1] + 1))

    times_s = np.cumsum(random.exponential(1 / rate_rps, count)).tolist()
    return [
        Request(i, t, draw(prompt_tokens), draw(output_tokens), slo, adapters[i % len(adapters)])
        for i, t in enumerate(times_s)
    ]


def job_of(
    lengths: Iterable[int] | int,
    *,
    id: str = "job",
    accumulation: int = 2,
    layers: int = LAYERS,
    weight: float = 1.0,
    start_s: float = 0.0,
    order: str = "layer_major",
    memory: str = "stash",
) -> Job:
    """A job over these sample lengths; one number is an endless supply of that length."""
    supply: Iterator[int] = itertools.repeat(lengths) if isinstance(lengths, int) else iter(lengths)
    spec = JobSpec(
        id=id,
        layers=layers,
        optimizer_params=64,
        accumulation=accumulation,
        weight=weight,
        start_s=start_s,
        order=order,
        memory=memory,
    )
    return Job(spec, supply)


def limits_of(**changes: Any) -> Limits:
    """Small limits: 4096 cached tokens, 16 sequences, 256 tokens an iteration."""
    values: dict[str, Any] = {
        "kv_tokens": 4096,
        "block_tokens": 16,
        "max_sequences": 16,
        "max_tokens": 256,
        "max_sequence_tokens": 1024,
    }
    return Limits(**(values | changes))


# Policies, found by listing


def policy_classes() -> dict[str, type]:
    """Module name -> the class of every policy in `sim/policies` that plans for one pipeline."""
    found: dict[str, type] = {}
    for file in sorted(Path(next(iter(sim.policies.__path__))).glob("*.py")):
        module = importlib.import_module(f"sim.policies.{file.stem}")
        for member in vars(module).values():
            own = inspect.isclass(member) and member.__module__ == module.__name__
            if own and hasattr(member, "serves") and hasattr(member, "plan"):
                found[file.stem] = member
    return found


POLICIES = policy_classes()
SERVING = [name for name, cls in POLICIES.items() if cls.serves]
FINETUNING = [name for name in POLICIES if name != "inference_only"]


def build_policy(
    name: str, *, predictor: CostModel | None = None, budget_s: float = 0.05, **more: Any
) -> Policy:
    """The policy with what its constructor asks for by name."""
    cls = POLICIES[name]
    given = {"predictor": predictor or LinearCost(), "budget_s": budget_s, "ttft_s": 10 * budget_s}
    wanted = inspect.signature(cls).parameters
    policy: Policy = cls(**({k: v for k, v in given.items() if k in wanted} | more))
    return policy


# Driving the loop


class Answer(NamedTuple):
    """What the fake device adds to the end of an iteration."""

    ended: tuple[int, ...] = ()
    aborted: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass
class Log:
    """All that went through the loop."""

    plans: list[Plan] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    sleeps: list[float] = field(default_factory=list)


def drive(
    loop: Generator[Command, Done, None],
    iteration_s: Callable[[int, Work], float],
    *,
    start_s: float = 0.0,
    answer: Callable[[int], Answer] | None = None,
    on_execute: Callable[[Execute, float], None] | None = None,
    on_done: Callable[[Done], None] | None = None,
) -> Log:
    """Drive the loop to its end on a virtual clock. `iteration_s(index, work)` says how long one takes,
    `answer(index)` which requests ended by themselves or were aborted with it,
    and which jobs failed."""
    log = Log()
    ends: deque[float] = deque()
    now_s = free_s = start_s
    waited = 0
    reply: Any = None
    while True:
        try:
            command = loop.send(reply)
        except StopIteration:
            return log
        if isinstance(command, Execute):
            free_s = max(free_s, now_s) + iteration_s(len(log.plans), command.work)
            ends.append(free_s)
            log.plans.append(command.plan)
            log.works.append(command.work)
            if on_execute is not None:
                on_execute(command, now_s)
            reply = Done(now_s)
        elif isinstance(command, Sleep):
            assert not ends, "slept with an iteration in flight"
            assert now_s < command.until_s < math.inf, "slept for nothing or for ever"
            log.sleeps.append(command.until_s)
            now_s = command.until_s
            reply = Done(now_s)
        else:
            now_s = ends.popleft()
            log.end_s.append(now_s)
            reply = Done(now_s, *(answer(waited) if answer is not None else ()))
            waited += 1
            if on_done is not None:
                on_done(reply)


@dataclass
class Run:
    """A finished run of one pipeline."""

    state: PipelineState
    recorder: Recorder
    log: Log

    def table(self, name: str) -> dict[str, np.ndarray]:
        table: Table = getattr(self.recorder, name)
        return table.arrays()

    def outcomes(self) -> dict[int, Outcome]:
        rows = self.table("requests")
        pairs = zip(rows["request"].tolist(), rows["outcome"].tolist(), strict=True)
        return {int(id): Outcome(int(outcome)) for id, outcome in pairs}

    def request(self, id: int) -> dict[str, float]:
        """The one row of a request."""
        rows = self.table("requests")
        (index,) = np.flatnonzero(rows["request"] == id)
        return {name: float(column[index]) for name, column in rows.items()}


def run(
    policy: Policy,
    requests: Iterable[Request] = (),
    *,
    jobs: Iterable[Job] = (),
    limits: Limits | None = None,
    world: CostModel | None = None,
    horizon: Horizon | None = None,
    answer: Callable[[int], Answer] | None = None,
    slos: dict[str, Slo] | None = None,
) -> Run:
    """One pipeline to its end."""
    recorder = Recorder()
    state = PipelineState(limits=limits or limits_of(), slos=slos or SLOS, recorder=recorder, jobs=jobs)
    loop = run_loop(state, policy, ListArrivals(requests), horizon or Horizon())
    cost = world or LinearCost()
    return Run(state, recorder, drive(loop, lambda _, work: cost.iteration_s(work), answer=answer))


def token_times(recorder: Recorder, pipeline: int = 0) -> dict[int, list[float]]:
    """Request -> the end times of its tokens, rebuilt from the segments and ticks tables."""
    ticks = recorder.ticks.arrays()
    ends_s = ticks["end_s"][ticks["pipeline"] == pipeline].tolist()
    segments = recorder.segments.arrays()
    own = np.flatnonzero(segments["pipeline"] == pipeline)
    times: dict[int, list[float]] = {}
    for i in own.tolist():
        start, end = int(segments["start_tick"][i]), int(segments["end_tick"][i])
        assert start <= end, "a segment ends before it starts"
        id = int(segments["request"][i])
        times.setdefault(id, []).extend([float(segments["first_s"][i]), *ends_s[start:end]])
    return times
