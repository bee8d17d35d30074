"""What a bench runs on its device: one pipeline under one policy, or a static split into two.

Either can run several times, each time on a wall clock that starts at 0 and without requests; the finetuning
job goes on from where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from engine.assemble import TrainingJob, assemble_engine
from engine.driver import Driver, EngineArrivals, GivenArrivals, WallClock
from engine.engine import Engine
from engine.lora import Adapter
from engine.model import Model
from engine.sampling import Sampling
from engine.split import Gate, Part, SharedClock, SplitDriver
from sim.core.arrivals import Arrivals
from sim.core.finetune import Job
from sim.core.loop import Horizon, run_loop
from sim.core.plan import ClusterPolicy, Limits, Policy
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.core.specs import DeviceSpec
from sim.core.state import PipelineState
from sim.metrics import PipelineFacts
from sim.workload.workload import Workload

MOST_PIPELINES = 100
"""A static split is asked for shares of so many parts at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every pipeline of a bench is made of."""

    model: Model
    limits: Limits
    jobs: Sequence[TrainingJob]
    adapters: Mapping[str, Adapter]
    slos: Mapping[str, Slo]
    device: DeviceSpec
    seed: int
    assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine
    """Makes an engine, as `assemble_engine` does: with these launches, on these ranks."""

    def prompt(self, request: Request) -> tuple[list[int], Sampling]:
        """A request's tokens, drawn from the whole vocabulary."""
        random = np.random.default_rng((self.seed, request.id))
        return random.integers(0, self.model.config.shape.vocab, request.prompt_tokens).tolist(), Sampling()

    def engine(self, limits: Limits, trains: bool, serves: bool = True) -> tuple[Engine, list[Job]]:
        """An engine with the jobs, if it trains; with the requests' adapters and what it captures, if it serves."""
        jobs, adapters = self.jobs if trains else (), self.adapters if serves else None
        engine, counted = self.assemble(self.model, limits, jobs, adapters)
        if serves:
            engine.warm_up(adapters=bool(adapters))
        return engine, counted

    def facts(self, limits: Limits, share: float = 1.0) -> PipelineFacts:
        blocks, devices = limits.kv_tokens // limits.block_tokens, self.model.group.size
        return PipelineFacts(kv_blocks=blocks, device=self.device, devices=devices, share=share)


class Single:
    """One pipeline under one policy."""

    def __init__(self, setting: Setting, policy: Policy) -> None:
        self._setting = setting
        self._policy = policy
        self.trainer, self.jobs = setting.engine(setting.limits, trains=True, serves=policy.serves)
        """The engine that finetunes, and its jobs as they stand."""
        self.serves, self.finetunes = policy.serves, policy.finetunes
        self.facts = (setting.facts(setting.limits),)

    def run(self, workload: Workload, horizon: Horizon) -> Recorder:
        recorder, setting, policy = Recorder(), self._setting, self._policy
        state = PipelineState(limits=setting.limits, slos=setting.slos, recorder=recorder, jobs=self.jobs)
        arrivals: Arrivals = workload.arrivals() if policy.serves else GivenArrivals()
        source = EngineArrivals(arrivals, self.trainer, setting.prompt)
        Driver(self.trainer, WallClock()).run(run_loop(state, policy, source, horizon))
        source.abandon()
        if not policy.serves:
            for request in workload.arrivals().due(horizon.duration_s):
                recorder.add_request(request, -1, Outcome.REJECTED)
        return recorder


class Split:
    """Two pipelines on the same weights, one that serves and one that finetunes, each with its share."""

    serves = finetunes = True

    def __init__(
        self,
        setting: Setting,
        serving: Policy,
        training: Policy,
        share: float,
        new_clock: Callable[[], SharedClock] = WallClock,
    ) -> None:
        """`share` of the device's time is for serving, the rest for finetuning. A plan is made when its
        pipeline has the device, so none is made ahead."""
        self._setting = setting
        self._policies = serving, training
        self._share = share
        self._new_clock = new_clock
        self._limits = replace(setting.limits, lookahead=0)
        self._idle = replace(self._limits, kv_tokens=setting.limits.block_tokens)
        """The finetuning pipeline holds no requests."""
        self._server, _ = setting.engine(self._limits, trains=False)
        self.trainer, self.jobs = setting.engine(self._idle, trains=True, serves=False)
        self.facts = (setting.facts(self._limits, share), setting.facts(self._idle, 1 - share))
        self.used_s = (0.0, 0.0)
        """Device time of serving and finetuning in the last run."""

    def run(self, workload: Workload, horizon: Horizon) -> Recorder:
        recorder = Recorder()
        source = EngineArrivals(workload.arrivals(), self._server, self._setting.prompt)
        share = self._share
        parts = (
            self._part(0, self._server, self._limits, [], source, share, horizon, recorder),
            self._part(1, self.trainer, self._idle, self.jobs, GivenArrivals(), 1 - share, horizon, recorder),
        )
        SplitDriver(parts, self._new_clock()).run()
        source.abandon()
        self.used_s = parts[0].used_s, parts[1].used_s
        return recorder

    def _part(
        self,
        pipeline: int,
        engine: Engine,
        limits: Limits,
        jobs: list[Job],
        arrivals: Arrivals,
        share: float,
        horizon: Horizon,
        recorder: Recorder,
    ) -> Part:
        state = PipelineState(
            limits=limits, slos=self._setting.slos, recorder=recorder, jobs=jobs, pipeline=pipeline
        )
        gate = Gate(self._policies[pipeline])
        return Part(engine, state, gate, share, run_loop(state, gate, arrivals, horizon))


class Share(NamedTuple):
    """The serving side of a static split."""

    policy: Policy
    share: float


def share_of(policy: ClusterPolicy) -> Share:
    """What the policy assigns to the fewest pipelines. ValueError if no small number of them will do."""
    for count in range(2, MOST_PIPELINES + 1):
        try:
            assigned = policy.assign(count)
        except ValueError:
            continue
        serving = [one for one in assigned if one.serves]
        return Share(serving[0], len(serving) / count)
    raise ValueError(f"policy.inference_share must be a share of at most {MOST_PIPELINES} equal parts")
