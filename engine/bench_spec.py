"""What a run of the bench is asked to be: its config, read, checked and built before the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from engine.assemble import TrainingJob
from engine.bench_jobs import FIRST, JobSettings, jobs_of, samples_of
from engine.finetune import Sample
from engine.launching import LaunchSettings
from engine.lora import Adapter, new_adapter
from engine.machine import place_of, shape_of
from engine.model import Model
from engine.pipelines import Share, share_of
from engine.text import passes
from sim.assemble import checked_labels
from sim.checked import build, check, locate
from sim.compile.plan import CompilePlan
from sim.core.loop import Horizon
from sim.core.request import Slo
from sim.core.specs import DeviceSpec, ModelShape
from sim.errors import warnings_as_notes
from sim.policy_node import policy_node
from sim.settings import LimitSettings, seed_of, slos_of
from sim.workload.workload import Workload

A_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRunSettings:
    """The `run` node."""

    name: str | None
    drain_s: float
    warm_up_s: float
    resume: bool

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up_s < math.inf:
            raise ValueError(f"run.warm_up_s must be at least 0 seconds and end, got {self.warm_up_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """One run; running uses up nothing of it."""

    config: dict[str, object]
    """All of it, resolved, as the run's folder keeps it."""
    device: DeviceSpec
    place: str
    """`cpu` or `cuda`."""
    shape: ModelShape
    weights: str | None
    seed: int
    run: BenchRunSettings
    measure_s: float
    peak_s: float
    predictor: str | None
    """Profile that the predictor is fitted to; None: what this machine does in `measure_s`."""
    jobs: dict[str, JobSettings]
    samples: dict[str, list[Sample]]
    """What each job trains on."""
    launch: LaunchSettings
    limits: LimitSettings
    memory_utilization: float
    slos: dict[str, Slo]
    policy: dict[str, Any]
    """Its node, for `policy_of`."""
    split: Share | None
    """Who serves in a static split; None: the policy is that of one pipeline."""
    workload: Workload
    adapters: int
    """Adapters among the requests."""
    horizon: Horizon
    labels: dict[str, object]
    """Of the summary row."""

    def training(self, model: Model, seed: int, plans: Mapping[str, CompilePlan]) -> list[TrainingJob]:
        """The finetuning jobs from their beginning, each with its plan if there is one."""
        return [
            TrainingJob(
                id=id,
                samples=passes(self.samples[id], seed),
                max_sample_tokens=job.sample_tokens,
                adapter=new_adapter(job.lora, self.shape, model.compute, model.device, seed),
                optimizer=job.optimizer,
                accumulation=job.accumulation,
                weight=job.weight,
                order=job.order,
                memory=job.memory,
                plan=plans.get(id),
            )
            for id, job in self.jobs.items()
        ]

    def served(self, model: Model) -> dict[str, Adapter]:
        """The adapters that requests ask for."""
        lora = self.jobs[FIRST].lora
        return {
            f"adapter_{n}": new_adapter(lora, self.shape, model.compute, model.device, self.seed + n + 1)
            for n in range(self.adapters)
        }


def spec_of(config: DictConfig) -> BenchSpec:
    """Raises ValueError naming the key, the value and what is allowed."""
    device = build(DeviceSpec, config.device, "device")
    shape = shape_of(config.model, config.weights)
    place = place_of(device)
    seed = seed_of(config)
    run = build(BenchRunSettings, config.run, "run")
    measure_s, peak_s = seconds_of(config, "measure_s"), seconds_of(config, "peak_s")
    jobs = jobs_of(config)
    launch = build(LaunchSettings, config.launch, "launch")
    slos = slos_of(config)
    policy = policy_node(config.policy)
    split = _split_of(policy, config.policy.name, shape)
    with warnings_as_notes(shown=True):
        workload = build(None, config.workload, "workload").build(seed, tuple(slos))
    asked_rps = config.workload.get("rate_rps")
    return BenchSpec(
        config=cast(dict[str, object], OmegaConf.to_container(config, resolve=True)),
        device=device,
        place=place,
        shape=shape,
        weights=config.weights,
        seed=seed,
        run=run,
        measure_s=measure_s,
        peak_s=peak_s,
        predictor=check(config.predictor, str | None, "predictor"),
        jobs=jobs,
        samples={id: samples_of(config, job, shape) for id, job in jobs.items()},
        launch=launch,
        limits=build(LimitSettings, config.limits, "limits"),
        memory_utilization=check(config.memory_utilization, float, "memory_utilization"),
        slos=slos,
        policy=policy,
        split=split,
        workload=workload,
        adapters=config.workload.get("adapters", {}).get("count", 0),
        horizon=Horizon(duration_s=workload.duration_s, drain_s=run.drain_s),
        labels=checked_labels(
            {
                "name": run.name,
                "policy": config.policy.name,
                "model": shape.name,
                "slo_set": config.slo.get("name"),
                "admission": config.limits.admission,
                "device": device.name,
                "workload": workload.name,
                "rate_rps": workload.rate_rps if asked_rps is None else float(asked_rps),
                "seed": seed,
                "source": "engine",
            }
        ),
    )


def seconds_of(config: DictConfig, key: str) -> float:
    """A time that is spent before the first run."""
    seconds: float = check(config[key], float, key)
    if not 0 <= seconds <= A_DAY_S:
        raise ValueError(f"{key} must be at least 0 and at most {A_DAY_S:,} seconds, got {seconds}")
    return seconds


def _split_of(policy: dict[str, Any], name: str, shape: ModelShape) -> Share | None:
    """Who serves in a static split, for a policy that assigns whole pipelines; None for all others."""
    if not hasattr(locate(policy.get("_target_"), "policy"), "assign"):
        return None
    if shape.tp > 1:
        raise ValueError(f"policy {name} splits one device; model.tp must be 1, got {shape.tp}")
    return share_of(build(None, policy, "policy"))
