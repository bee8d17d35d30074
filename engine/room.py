"""Memory of an engine: what the K/V cache gets beside the weights and a sample in flight, by the simulator's formula.

What a sample holds is the compile plan's to say. Where both are open (`limits.kv_tokens: null`, `memory: auto`)
the plan may take as much of what is free as the simulator lets it, and the cache has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.assemble import TrainingJob, plan_jobs
from engine.machine import free_bytes
from engine.model import Model
from sim.compile.plan import CompilePlan
from sim.core.plan import Limits
from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.memory import RUNTIME_BYTES, kv_room_tokens, weight_bytes
from sim.cost.memory import free_bytes as room_bytes
from sim.errors import OutOfReach, keys_as
from sim.finetune_plans import AUTO_SHARE, FinetunePlans
from sim.settings import LimitSettings

ROOM_STEP_TOKENS = 4096


def limits_and_plans(
    model: Model, device: DeviceSpec, given: LimitSettings, jobs: Sequence[TrainingJob], utilization: float
) -> tuple[Limits, dict[str, CompilePlan]]:
    """The limits with the room that memory leaves where none is given, and the plan of each job by its id.

    Under tensor parallelism each device holds `kv_tokens`.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"memory_utilization must be in (0, 1], got {utilization}")
    shape, tp = model.whole.shape, model.group.size
    if given.kv_tokens is not None:
        limits = _limits(given, given.kv_tokens, shape)
        return limits, _by_id(jobs, plan_jobs(model, limits, jobs, device=device))
    if model.device.type == "cpu":
        raise ValueError("limits.kv_tokens must be given on a CPU: null is what a GPU's memory leaves")
    batch_tokens = given.max_tokens + max((job.max_sample_tokens for job in jobs), default=0)
    seen = device_of(device, shape, tp, free_bytes(model.device))
    free = room_bytes(
        device=seen,
        model=shape,
        tp=tp,
        utilization=utilization,
        batch_tokens=batch_tokens,
        batch_sequences=given.max_sequences,
    )
    none = _limits(given, given.block_tokens, shape)
    plans = _by_id(jobs, plan_jobs(model, none, jobs, free, AUTO_SHARE, device))
    try:
        room = kv_room_tokens(
            device=seen,
            model=shape,
            tp=tp,
            utilization=utilization,
            batch_tokens=batch_tokens,
            batch_sequences=given.max_sequences,
            finetune_bytes=FinetunePlans(plans=plans).held_bytes,
        )
    except OutOfReach as error:
        if not jobs:
            raise
        own = "job.sample_tokens, in a server's job cutoff_len"
        raise OutOfReach(f"{error}; shorter samples need less ({own})") from None
    return _limits(given, whole_steps(room), shape), plans


def _by_id(jobs: Sequence[TrainingJob], plans: Sequence[CompilePlan]) -> dict[str, CompilePlan]:
    return {job.id: plan for job, plan in zip(jobs, plans, strict=True)}


def device_of(device: DeviceSpec, shape: ModelShape, tp: int, free: int) -> DeviceSpec:
    """The device with the memory that is free beside the weights, which are there already."""
    return replace(device, memory_bytes=free + weight_bytes(shape, tp) + RUNTIME_BYTES)


def whole_steps(tokens: int) -> int:
    """So that runs of a sweep have the same room although not the same bytes are free."""
    return tokens - tokens % ROOM_STEP_TOKENS if tokens > ROOM_STEP_TOKENS else tokens


def _limits(given: LimitSettings, kv_tokens: int, shape: ModelShape) -> Limits:
    longest = given.max_sequence_tokens
    with keys_as({"cluster.": ""}):
        return given.of(kv_tokens, shape.max_context_tokens if longest is None else longest)
