"""From a resolved config to the parts of a run: pipelines, arrivals, router, bounds.

With `sim.groups` the only place that knows all config groups. Everything is checked while it is built, before anything
runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from sim.checked import build
from sim.cluster import PipelineSpec
from sim.core.finetune import Job
from sim.core.loop import Horizon
from sim.core.request import Slo
from sim.cost.architectures import measured_itself
from sim.cost.roofline import Roofline
from sim.errors import OutOfReach
from sim.groups import Group, check_possible, groups_of, policies_of
from sim.metrics import PipelineFacts
from sim.routing import Router
from sim.settings import RunSettings, seed_of, slos_of
from sim.ways_out import ways_out
from sim.workload.finetune import Finetune
from sim.workload.workload import Workload

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Everything that a run needs, fresh: jobs and random streams are used up by running."""

    pipelines: tuple[PipelineSpec, ...]
    facts: tuple[PipelineFacts, ...]
    workload: Workload
    router: Router
    slos: dict[str, Slo]
    horizon: Horizon
    labels: dict[str, object]
    unmeasured: tuple[str, ...] = ()
    """Devices whose seconds come from a roofline, with constants that were all measured on others."""


def assemble(config: DictConfig) -> Assembly:
    """Build a run from the config. Raises ValueError naming the key, the value and what is allowed; where it is too
    much for the devices, with what would not be."""
    try:
        return _assembly(config)
    except OutOfReach as error:
        ways = ways_out(config, _check_reach, CONFIGS / "model", error.bound)
        raise ValueError(f"{error}; {ways}") from None


def _assembly(config: DictConfig) -> Assembly:
    seed = seed_of(config)
    run = build(RunSettings, config.run, "run")
    slos = slos_of(config)
    workload = build(None, config.workload, "workload").build(seed, tuple(slos))
    horizon = Horizon(duration_s=workload.duration_s, drain_s=run.drain_s)
    groups, router = groups_of(config, seed)
    check_possible(slos, groups)
    policies = policies_of(config, groups, slos)
    finetune = build(None, config.finetune, "finetune")
    assert isinstance(finetune, Finetune)
    samples = finetune.samples(seed)
    pipelines, facts = [], []
    for group in groups:
        for index in group.members:
            specs = group.plans.settle(finetune).specs(group.model) if policies[index].finetunes else []
            limits = group.limits(policies[index])
            world = group.world(index)
            pipelines.append(
                PipelineSpec(
                    policy=policies[index],
                    world=world,
                    predictor=group.predictor,
                    limits=limits,
                    jobs=tuple(Job(spec, samples[spec.id]) for spec in specs),
                )
            )
            facts.append(
                PipelineFacts(
                    kv_blocks=limits.kv_tokens // limits.block_tokens,
                    device=group.device,
                    devices=group.context.tp,
                    measured=_region(world),
                )
            )
    asked_rps = config.workload.get("rate_rps")
    labels: dict[str, object] = {
        "name": run.name,
        "policy": config.policy.name,
        "model": config.model.name,
        "slo_set": config.slo.get("name"),
        "router": _router_name(str(config.cluster.router._target_)),
        "admission": config.cluster.limits.admission,
        "device": "+".join(dict.fromkeys(group.device.name for group in groups)),
        "workload": workload.name,
        "rate_rps": workload.rate_rps if asked_rps is None else float(asked_rps),
        "seed": seed,
        "source": "sim",
    }
    return Assembly(
        pipelines=tuple(pipelines),
        facts=tuple(facts),
        workload=workload,
        router=router,
        slos=slos,
        horizon=horizon,
        labels=checked_labels(labels),
        unmeasured=tuple(dict.fromkeys(group.device.name for group in groups if _is_unmeasured(group))),
    )


def checked_labels(labels: dict[str, object]) -> dict[str, object]:
    """`labels`; ValueError where a name by which tables tell runs apart is none."""
    for key in ("policy", "model", "workload", "device"):
        name = labels[key]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{key}.name must be text that is not empty, got {name!r}")
    return labels


def _check_reach(config: DictConfig) -> None:
    """Raise ValueError for what `assemble` would refuse of the pipelines, without the workload."""
    slos = slos_of(config)
    groups, _ = groups_of(config, seed_of(config))
    check_possible(slos, groups)
    policies = policies_of(config, groups, slos)
    for group in groups:
        for index in group.members:
            group.limits(policies[index])


def _router_name(target: str) -> str:
    """As `cluster/router=` has it: `sim.routing.LeastTokens` is least_tokens."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", target.rpartition(".")[2]).lower()


def _is_unmeasured(group: Group) -> bool:
    builder: object = group.world_builder
    while hasattr(builder, "of"):
        builder = builder.of
    return isinstance(builder, Roofline) and not measured_itself(group.device)


def _region(world: object) -> dict[str, tuple[float, float]] | None:
    """What a cost model knows seconds for; noise and factors change nothing of it."""
    while hasattr(world, "inner"):
        world = world.inner
    region: dict[str, tuple[float, float]] | None = getattr(world, "region", None)
    return region
