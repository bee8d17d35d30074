"""A replica on several devices: one process for each, of which this one leads.

Rank 0 runs the loop, the policy and the clock. What it does to its engine it first tells the others, in
order, and they do the same to theirs: load a model, assemble an engine, take a request with its prompt, a
drawn sample, a plan. Nobody else reads data or decides; tensors meet in the collectives of `engine.parallel`.
On one device there are no others, and the engine is the plain one.

    with replica(2, "cpu") as ranks:
        model = ranks.load(load_model, folder, torch.float32)
        engine, jobs = ranks.assemble(model, limits, [job])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from engine.assemble import TrainingJob, assemble_engine, plan_jobs
from engine.engine import Collected, Engine
from engine.finetune import Sample, SampleFeed
from engine.launching import Launching
from engine.lora import Adapter
from engine.model import Model
from engine.parallel import ALONE, Group
from engine.ranks import Tell, start_ranks
from engine.sampling import Sampling
from sim.core.finetune import Job
from sim.core.plan import Limits, Plan
from sim.core.request import Request


@contextmanager
def replica(tp: int, device: str) -> Iterator[Replica]:
    """A replica on `tp` devices of this machine (`cpu` or `cuda`), until the block ends.

    Raises ValueError for more ranks than devices, RankFailed when a rank fails within the block.
    """
    if tp == 1:
        yield Replica(ALONE, torch.device(device))
        return
    with start_ranks(tp, device, _Follower) as (group, place, tell):
        yield Replica(group, place, tell)


class Replica:
    """All ranks, as rank 0 commands them."""

    def __init__(self, group: Group, device: torch.device, tell: Tell | None = None) -> None:
        """`tell` reaches the other ranks; None: there are none."""
        self.group = group
        self.device = device
        self._tell = tell

    def load(self, make: Callable[..., Model], *args: Any, **options: Any) -> Model:
        """`make(*args, device=, group=)` on every rank; `make` is a function of a module."""
        if self._tell is not None:
            self._tell("load", make, args, options)
        return make(*args, **options, device=self.device, group=self.group)

    def assemble(
        self,
        model: Model,
        limits: Limits,
        jobs: Sequence[TrainingJob] = (),
        adapters: Mapping[str, Adapter] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        launching: Launching = Launching(),  # noqa: B008 - a value without state
    ) -> tuple[Engine, list[Job]]:
        """As `assemble_engine`, on every rank, for the model that was loaded last."""
        tell = self._tell
        if tell is None:
            return assemble_engine(model, limits, jobs, adapters, on_token, launching=launching)
        assert launching == Launching(), "ranks launch one kernel after the other"
        # This rank's free memory decides for all.
        plans = plan_jobs(model, limits, jobs)
        jobs = [replace(job, plan=plan) for job, plan in zip(jobs, plans, strict=True)]
        told = [replace(job, samples=(), adapter=_on_host(job.adapter)) for job in jobs]
        tell("assemble", limits, told, {n: _on_host(a) for n, a in (adapters or {}).items()})
        jobs = [replace(job, samples=_telling(tell, job)) for job in jobs]
        make = functools.partial(Leader, tell)
        return assemble_engine(model, limits, jobs, adapters, on_token, make)


class Leader(Engine):
    """The engine of rank 0: what it is made to do, the others are told."""

    def __init__(self, tell: Tell, **given: Any) -> None:
        super().__init__(**given)
        self._tell = tell

    def arrive(self, request: Request, tokens: Sequence[int], sampling: Sampling) -> None:
        super().arrive(request, tokens, sampling)
        self._tell("engine", "arrive", request, list(tokens), sampling)

    def ended(self, id: int) -> None:
        super().ended(id)
        self._tell("engine", "ended", id)

    def launch(self, plan: Plan) -> None:
        # Memory is the policy's, which no engine reads.
        self._tell("engine", "launch", plan._replace(memory=None))
        super().launch(plan)

    def collect(self) -> Collected:
        self._tell("engine", "collect")
        return super().collect()

    def adapter(self, job: str) -> Adapter:
        self._tell("engine", "adapter", job)
        return super().adapter(job)

    def optimizer_state(self, job: str) -> dict[str, Any]:
        self._tell("engine", "optimizer_state", job)
        return super().optimizer_state(job)

    def restore(self, job: str, state: dict[str, Any], steps: int) -> None:
        self._tell("engine", "restore", job, state, steps)
        super().restore(job, state, steps)

    def mean_loss(self, job: str, samples: Sequence[Sample]) -> float:
        self._tell("engine", "mean_loss", job, samples)
        return super().mean_loss(job, samples)

    def fill(self) -> None:
        self._tell("engine", "fill")
        super().fill()

    def skip(self, plan: Plan) -> None:
        self._tell("engine", "skip", plan)
        super().skip(plan)

    def stand(
        self, job: str, sample: Sample, forward_tokens: int, backward_layer_tokens: int, fresh: bool
    ) -> None:
        self._tell("engine", "stand", job, sample, forward_tokens, backward_layer_tokens, fresh)
        super().stand(job, sample, forward_tokens, backward_layer_tokens, fresh)


class _Follower:
    """What a rank that does not lead has; its methods are the commands that it takes."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._model: Model | None = None
        self._engine: Engine | None = None
        self._feeds: dict[str, SampleFeed] = {}

    def load(self, make: Callable[..., Model], args: Iterable[Any], options: Mapping[str, Any]) -> None:
        self._engine = self._model = None
        self._model = make(*args, **options, device=self._device, group=self._group)

    def assemble(self, limits: Limits, jobs: Sequence[TrainingJob], adapters: Mapping[str, Adapter]) -> None:
        assert self._model is not None
        self._engine = None
        self._feeds = {job.id: SampleFeed(()) for job in jobs}
        jobs = [replace(job, samples=self._feeds[job.id]) for job in jobs]
        self._engine, _ = assemble_engine(self._model, limits, jobs, adapters)

    def sample(self, job: str, sample: Sample) -> None:
        self._feeds[job].put(sample)

    def engine(self, method: str, *args: Any) -> None:
        getattr(self._engine, method)(*args)


def _telling(tell: Tell, job: TrainingJob) -> Iterator[Sample]:
    """The job's samples, each told to the others as it is drawn: before the plan that needs it."""
    assert not isinstance(job.samples, SampleFeed)
    for sample in job.samples:
        tell("sample", job.id, sample)
        yield sample


def _on_host(adapter: Adapter) -> Adapter:
    a, b = ({k: t.detach().cpu() for k, t in tensors.items()} for tensors in (adapter.a, adapter.b))
    return replace(adapter, a=a, b=b)
