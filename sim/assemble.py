"""From a resolved config to the parts of a run: pipelines, arrivals, router, bounds.

The only place that knows all config groups. Everything is checked while it is built, before anything runs.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sim.checked import build, check, locate
from sim.cluster import PipelineSpec
from sim.core.cost import CostModel, Predictor
from sim.core.finetune import Job
from sim.core.loop import Horizon, PolicyError
from sim.core.plan import ClusterPolicy, Limits, Policy
from sim.core.request import Slo
from sim.core.specs import DeviceSpec, ModelShape
from sim.core.work import Chunk, Work
from sim.cost.context import CostBuilder, CostContext
from sim.cost.memory import free_bytes, kv_bytes_per_token, kv_room_tokens
from sim.errors import OutOfReach, keys_as, nearest
from sim.finetune_plans import FinetunePlans, plans_of, served_work
from sim.metrics import PipelineFacts
from sim.policies.finetune_only import FinetuneOnly
from sim.routing import Router
from sim.ways_out import ways_out
from sim.workload.finetune import Finetune
from sim.workload.workload import Workload

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MOST_PIPELINES = 4096
"""Of a cluster: the noise of each has a seed of its own among so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """`cluster.limits`, as `Limits` with what the model and the device decide left open."""

    kv_tokens: int | None
    block_tokens: int
    max_sequences: int
    max_tokens: int
    max_sequence_tokens: int | None
    admission: str
    lookahead: int

    def __post_init__(self) -> None:
        room = max(1, self.block_tokens) if self.kv_tokens is None else self.kv_tokens
        with keys_as({"cluster.limits.": ""}):
            self.of(room, 1 if self.max_sequence_tokens is None else self.max_sequence_tokens)

    def of(self, kv_tokens: int, max_sequence_tokens: int) -> Limits:
        """With what is left open."""
        return Limits(
            kv_tokens=kv_tokens,
            block_tokens=self.block_tokens,
            max_sequences=self.max_sequences,
            max_tokens=self.max_tokens,
            max_sequence_tokens=max_sequence_tokens,
            admission=self.admission,
            lookahead=self.lookahead,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """One entry of `cluster.groups`: equal pipelines on one kind of device."""

    pipelines: int
    device: str | None = None
    """None is the `device` group's."""
    tp: int | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """The `cluster` group."""

    pipelines: int | None
    tp: int | None
    groups: tuple[GroupSettings, ...] | None
    router: Router
    memory_utilization: float
    limits: LimitSettings

    def __post_init__(self) -> None:
        if (self.pipelines is None) == (self.groups is None):
            raise ValueError(
                "cluster.pipelines (equal pipelines) or cluster.groups (unequal ones) must be given and the "
                f"other null, got {self.pipelines} and {'null' if self.groups is None else 'groups'}"
            )
        counts = {"cluster.pipelines": self.pipelines} if self.groups is None else {}
        counts |= {f"cluster.groups[{i}].pipelines": g.pipelines for i, g in enumerate(self.groups or ())}
        for where, count in counts.items():
            if count is not None and not 1 <= count <= MOST_PIPELINES:
                raise ValueError(f"{where} must be in 1..{MOST_PIPELINES}, got {count}")
        together = sum(group.pipelines for group in self.groups or ())
        if together > MOST_PIPELINES:
            raise ValueError(
                f"cluster.groups must have at most {MOST_PIPELINES} pipelines together, got {together}"
            )
        if self.groups is not None and not self.groups:
            raise ValueError("cluster.groups must be null or name at least one group, got []")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"cluster.memory_utilization must be in (0, 1], got {self.memory_utilization}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    """The `slo` group."""

    name: str | None = None
    """Shown in titles of tables and figures."""
    classes: Mapping[str, Mapping[str, Any]]
    """Name -> bounds, as `Slo` has them; null is none."""
    tpot_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> a bound that classes may refer to."""

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("slo.classes must name at least one class, got {}")
        for model, bound_s in self.tpot_s.items():
            if not bound_s > 0:
                raise ValueError(f"slo.tpot_s.{model} must be above 0 seconds, got {bound_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """The `cost` group: what an iteration takes, and what policies believe that it takes."""

    world: CostBuilder
    predictor: CostBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The `run` node."""

    name: str | None
    drain_s: float
    bounds: bool
    resume: bool = False


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

    def finetune_only(self) -> Assembly:
        """The same cluster with every pipeline finetuning and none serving."""
        policy = FinetuneOnly()
        return replace(
            self,
            pipelines=tuple(replace(spec, policy=policy) for spec in self.pipelines),
            labels=self.labels | {"policy": "finetune_only"},
        )


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
    groups, router = _groups(config, seed)
    count = sum(len(group.members) for group in groups)
    _check_possible(slos, groups)
    policies = _policies(config, groups, slos)
    finetune = build(None, config.finetune, "finetune")
    assert isinstance(finetune, Finetune)
    pipelines, facts = [], []
    for group in groups:
        for index in group.members:
            jobs = group.plans.settle(finetune).build(group.model, index, seed, count)
            limits = group.limits(policies[index])
            world = group.world(index)
            pipelines.append(
                PipelineSpec(
                    policy=policies[index],
                    world=world,
                    predictor=group.predictor,
                    limits=limits,
                    jobs=tuple(Job(spec, samples) for spec, samples in jobs),
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
    groups, _ = _groups(config, seed_of(config))
    _check_possible(slos, groups)
    policies = _policies(config, groups, slos)
    for group in groups:
        for index in group.members:
            group.limits(policies[index])


def _router_name(target: str) -> str:
    """As `cluster/router=` has it: `sim.routing.LeastTokens` is least_tokens."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", target.rpartition(".")[2]).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Equal pipelines: they share a predictor, and each has a world with a noise of its own."""

    members: range
    device: DeviceSpec
    model: ModelShape
    context: CostContext
    predictor: Predictor
    cluster: ClusterSettings
    kv_tokens: int | None
    plans: FinetunePlans
    world_builder: CostBuilder

    def limits(self, policy: Policy) -> Limits:
        """What a pipeline of this group can hold under `policy`; only one that finetunes keeps room for it."""
        limits, kv_tokens = self.cluster.limits, self.kv_tokens
        if kv_tokens is None and not policy.serves:
            kv_tokens = limits.block_tokens
        if kv_tokens is None:
            kv_tokens = kv_room_tokens(
                device=self.device,
                model=self.model,
                tp=self.context.tp,
                utilization=self.cluster.memory_utilization,
                batch_tokens=limits.max_tokens,
                batch_sequences=limits.max_sequences,
                finetune_bytes=self.plans.held_bytes if policy.finetunes else 0.0,
            )
        longest = limits.max_sequence_tokens
        return limits.of(kv_tokens, self.model.max_context_tokens if longest is None else longest)

    def world(self, index: int) -> CostModel:
        return self.world_builder.build(
            replace(self.context, seed=self.context.seed * MOST_PIPELINES + index)
        )


def _region(world: object) -> dict[str, tuple[float, float]] | None:
    """What a cost model knows seconds for; noise and factors change nothing of it."""
    while hasattr(world, "inner"):
        world = world.inner
    region: dict[str, tuple[float, float]] | None = getattr(world, "region", None)
    return region


def seed_of(config: DictConfig) -> int:
    """The seed of a run. Raises ValueError for what is none."""
    seed = config.seed
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    return seed


def slos_of(config: DictConfig) -> dict[str, Slo]:
    """The SLO classes by name."""
    settings = build(SloSettings, config.slo, "slo")
    slos = {}
    for name, bounds in settings.classes.items():
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        slos[name] = build(Slo, given, f"slo.classes.{name}", name=name)
    return slos


def _check_possible(slos: Mapping[str, Slo], groups: list[_Group]) -> None:
    """Raise OutOfReach for a bound that a request alone on the cluster would miss."""
    decode = Work(decode_count=1, decode_context_tokens=1, sampled_tokens=1)
    prefill = Work(prefill=(Chunk(1, 0),), sampled_tokens=1)
    for key, work in (("tpot_s", decode), ("ttft_s", prefill), ("e2e_s", prefill)):
        fastest_s = min(group.predictor.iteration_s(work) for group in groups)
        for slo in slos.values():
            if getattr(slo, key) < fastest_s:
                raise OutOfReach(
                    f"slo.classes.{slo.name}.{key} cannot be kept: a single request alone is "
                    f"predicted to take {fastest_s:.4g} s on {groups[0].model.name}, got {getattr(slo, key)}",
                    {f"slo.classes.{slo.name}.{key}": _rounded_up(fastest_s)},
                )


def _rounded_up(seconds: float) -> float:
    """To two digits."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return float(f"{math.ceil(seconds / digit) * digit:.3g}")


def _groups(config: DictConfig, seed: int) -> tuple[list[_Group], Router]:
    model = build(ModelShape, config.model, "model")
    cluster = build(ClusterSettings, config.cluster, "cluster")
    device = build(DeviceSpec, config.device, "device")
    finetune = build(None, config.finetune, "finetune")
    cost = build(CostSettings, config.cost, "cost")
    members = cluster.groups or (GroupSettings(pipelines=cluster.pipelines or 0),)
    groups, first = [], 0
    for settings in members:
        own = device if settings.device is None else _named_device(settings.device)
        tp = cluster.tp if settings.tp is None else settings.tp
        tp = model.tp if tp is None else tp
        kv_tokens = cluster.limits.kv_tokens if settings.kv_tokens is None else settings.kv_tokens
        plans = _plans(finetune, model, own, tp, cluster, kv_tokens)
        context = CostContext(
            device=own,
            model=model,
            tp=tp,
            lora=finetune.lora,
            seed=seed,
            lookahead=cluster.limits.lookahead,
            again_gemm=plans.again_gemm,
            again_attention=plans.again_attention,
            trained=plans.trained,
            served=served_work(model, finetune.lora, tp, cluster.limits.max_sequences),
        )
        groups.append(
            _Group(
                members=range(first, first + settings.pipelines),
                device=own,
                model=model,
                context=context,
                predictor=cost.predictor.build(context),
                cluster=cluster,
                kv_tokens=kv_tokens,
                plans=plans,
                world_builder=cost.world,
            )
        )
        first += settings.pipelines
    return groups, cluster.router


def _plans(
    finetune: Finetune,
    model: ModelShape,
    device: DeviceSpec,
    tp: int,
    cluster: ClusterSettings,
    kv_tokens: int | None,
) -> FinetunePlans:
    """What finetuning may hold depends on what serving needs."""
    model.check_tp(tp)
    free = free_bytes(
        device=device,
        model=model,
        tp=tp,
        utilization=cluster.memory_utilization,
        batch_tokens=cluster.limits.max_tokens,
        batch_sequences=cluster.limits.max_sequences,
    )
    kv_bytes = None if kv_tokens is None else float(kv_tokens * kv_bytes_per_token(model, tp))
    return plans_of(finetune, model, device, tp, free, kv_bytes)


def _named_device(name: str) -> DeviceSpec:
    folder = CONFIGS / "device"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no device named {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return cast(DeviceSpec, build(DeviceSpec, OmegaConf.load(folder / f"{name}.yaml"), f"device {name}"))


def _policies(config: DictConfig, groups: list[_Group], slos: Mapping[str, Slo]) -> list[Policy]:
    """The policy of each pipeline, in order of their indices."""
    node = {key: value for key, value in config.policy.items() if key != "name"}
    built = [policy_of(node, group.predictor, slos) for group in groups]
    count = sum(len(group.members) for group in groups)
    first = built[0]
    if not hasattr(first, "assign"):
        return [policy for policy, group in zip(built, groups, strict=True) for _ in group.members]
    with _told_of(type(first)):
        assigned = cast(ClusterPolicy, first).assign(count)
        if len(assigned) != count:
            told = f"assign({count}) must return as many policies, got {len(assigned)}"
            raise ValueError(f"policy {type(first).__name__} in {_file(type(first))}: {told}")
    return [_checked_policy(policy) for policy in assigned]


def policy_of(node: dict[str, Any], predictor: Predictor | None, slos: Mapping[str, Slo]) -> Policy:
    """Build a policy, giving it what it asks for by name: `predictor` (None is for one that does not), and where they
    are null the tightest bounds of the SLO classes, `budget_s` of TPOT and `ttft_s` of TTFT.

    Raises ValueError for a node that makes no policy, PolicyError for what else its constructor raises.
    """
    target = locate(node.get("_target_"), "policy")
    parameters = inspect.signature(target).parameters
    given: dict[str, object] = {}
    if "predictor" in parameters:
        given["predictor"] = predictor
    for key, bound in (("budget_s", "tpot_s"), ("ttft_s", "ttft_s")):
        if key in parameters and node.get(key) is None:
            node = {name: value for name, value in node.items() if name != key}
            given[key] = min(getattr(slo, bound) for slo in slos.values())
        elif key in parameters and not check(node[key], float, f"policy.{key}") > 0:
            raise ValueError(f"policy.{key} must be above 0 seconds, got {node[key]}")
    with _told_of(target):
        policy = build(None, node, "policy", **given)
    return cast(Policy, policy) if hasattr(policy, "assign") else _checked_policy(policy)


@contextmanager
def _told_of(target: Callable[..., Any]) -> Iterator[None]:
    """What goes wrong inside is told with the lines of the target's own file; a ValueError is for the user as it is."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        told = f"policy {target.__name__}: {type(error).__name__}: {error}".removesuffix(": ")
        raise PolicyError(told, _file(target)) from error


def _checked_policy(policy: object) -> Policy:
    """`policy`, or ValueError for what it lacks to be one."""
    lacks = [
        f"{key} = True or False"
        for key in ("serves", "finetunes")
        if not isinstance(getattr(policy, key, None), bool)
    ]
    lacks += [] if callable(getattr(policy, "plan", None)) else ["a method plan(view) -> Plan"]
    if lacks:
        kind = type(policy)
        raise ValueError(f"policy {kind.__name__} in {_file(kind)} needs {', '.join(lacks)}")
    return cast(Policy, policy)


def _file(target: Callable[..., Any]) -> str:
    """Where a class or function stands."""
    return getattr(sys.modules.get(target.__module__), "__file__", None) or target.__module__
