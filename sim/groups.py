"""The pipelines of a cluster, in groups of equal ones: device, model, costs, plans, limits and policies of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from sim.checked import build
from sim.core.cost import CostModel, Predictor
from sim.core.plan import Limits, Policy
from sim.core.request import Slo
from sim.core.specs import DeviceSpec, ModelShape
from sim.core.work import Chunk, Work
from sim.cost.context import CostBuilder, CostContext
from sim.cost.memory import free_bytes, kv_bytes_per_token, kv_room_tokens
from sim.errors import OutOfReach, nearest
from sim.finetune_plans import FinetunePlans, plans_of, served_work
from sim.policy_node import assigned, policy_node, policy_of
from sim.routing import Router
from sim.settings import MOST_PIPELINES, ClusterSettings, CostSettings, GroupSettings
from sim.workload.finetune import Finetune

DEVICES = Path(__file__).resolve().parent.parent / "configs" / "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
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


def groups_of(config: DictConfig, seed: int) -> tuple[list[Group], Router]:
    """The groups of a config's cluster, and its router."""
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
            Group(
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
    known = sorted(path.stem for path in DEVICES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no device named {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return cast(DeviceSpec, build(DeviceSpec, OmegaConf.load(DEVICES / f"{name}.yaml"), f"device {name}"))


def check_possible(slos: Mapping[str, Slo], groups: list[Group]) -> None:
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
                    {f"slo.classes.{slo.name}.{key}": _rounded_up(fastest_s)}
                    if math.isfinite(fastest_s)
                    else None,
                )


def _rounded_up(seconds: float) -> float:
    """To two digits."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return float(f"{math.ceil(seconds / digit) * digit:.3g}")


def policies_of(config: DictConfig, groups: list[Group], slos: Mapping[str, Slo]) -> list[Policy]:
    """The policy of each pipeline, in order of their indices."""
    node = policy_node(config.policy)
    built = [policy_of(node, group.predictor, slos) for group in groups]
    whole = assigned(built[0], sum(len(group.members) for group in groups))
    if whole is not None:
        return whole
    return [policy for policy, group in zip(built, groups, strict=True) for _ in group.members]
