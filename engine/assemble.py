"""From a model, limits and finetuning jobs to an engine: who gets which pages, one bank for all adapters, and
the compile plan of each job.

A plan is compiled from the shipped graph of the model's family, so nothing is captured here. With
`memory: auto` the free memory chooses it: most of what the device has left beside the weights, less the pages
of inference, in equal parts for the jobs that ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.engine import Engine
from engine.finetune import Sample, SampleFeed, Trainer
from engine.launching import Launching
from engine.lora import Adapter, AdapterBank
from engine.model import Model, Pages
from engine.optimizer import OptimizerSettings
from engine.placement import Placement, placements_of
from engine.shares import own_adapter
from sim.compile.compiler import REFERENCE, Analysis, serving_bypasses
from sim.compile.peft import PeftSpec
from sim.compile.plan import BypassPlan, CompilePlan
from sim.core.finetune import AUTO, MEMORIES, Job, JobSpec
from sim.core.plan import Limits
from sim.core.specs import DeviceSpec, ModelShape
from sim.cost.memory import kv_bytes_per_token
from sim.errors import NO_MEMORY, OutOfReach

USABLE = 0.9
"""Share of the free memory that `memory: auto` plans with; the rest is for what operators need as they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A finetuning job with its data."""

    id: str
    samples: Iterable[Sample] | SampleFeed
    """In training order; may be endless."""
    max_sample_tokens: int
    adapter: Adapter
    """What training starts from; not modified."""
    optimizer: OptimizerSettings
    seed: int = 0
    """Of the adapter's dropout."""
    accumulation: int = 8
    weight: float = 1.0
    start_s: float = 0.0
    order: str = "layer_major"
    memory: str = "stash"
    """stash, recompute, or auto: the plan that runs least again of those that fit the free memory."""
    plan: CompilePlan | None = None
    """Made before (`plan_jobs`); it decides instead of order and memory."""


def assemble_engine(
    model: Model,
    limits: Limits,
    jobs: Sequence[TrainingJob] = (),
    adapters: Mapping[str, Adapter] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    make: Callable[..., Engine] = Engine,
    launching: Launching = Launching(),  # noqa: B008 - a value without state
) -> tuple[Engine, list[Job]]:
    """The engine, and the jobs as the loop counts them; they share their data.

    Inference has the first pages, every job its own after them. Adapters are whole, on any number of ranks.
    Raises ValueError where no plan fits, OutOfReach where the pages do not.
    """
    blocks = limits.kv_tokens // limits.block_tokens
    ranges = []
    for job in jobs:
        count = -(-job.max_sample_tokens // limits.block_tokens)
        ranges.append(range(blocks, blocks + count))
        blocks += count
    plans = plan_jobs(model, limits, jobs)
    pages = _new_pages(model, limits, blocks)
    given = adapters or {}
    served = {name: _served_as(model, limits, adapter) for name, adapter in given.items()}
    trained = [_placed(model, plan.bypasses, job.adapter) for job, plan in zip(jobs, plans, strict=True)]
    bank = _bank(model, [*served.values(), *trained])
    slots = {}
    for name, placements in served.items():
        assert bank is not None
        slots[name] = bank.put(own_adapter(given[name], placements, model.group), placements)
    counted, trainers = [], []
    for job, placements, pages_of, plan in zip(jobs, trained, ranges, plans, strict=True):
        assert bank is not None
        feed = job.samples if isinstance(job.samples, SampleFeed) else SampleFeed(job.samples)
        spec = _spec(job, plan)
        counted.append(Job(spec, feed.lengths()))
        trainers.append(
            Trainer(
                spec=spec,
                plan=plan,
                model=model,
                pages=pages,
                blocks=pages_of,
                bank=bank,
                adapter=own_adapter(job.adapter, placements, model.group),
                placements=placements,
                feed=feed,
                optimizer=job.optimizer,
                seed=job.seed,
            )
        )
    engine = make(
        model=model,
        pages=pages,
        limits=limits,
        bank=bank,
        adapters=slots,
        trainers=trainers,
        on_token=on_token,
        launching=launching,
    )
    return engine, counted


def _new_pages(model: Model, limits: Limits, blocks: int) -> Pages:
    """Pages for `blocks` blocks, those of inference among them. OutOfReach where there is no memory for them."""
    tokens, free = blocks * limits.block_tokens, _unused_bytes(model.device)
    try:
        return model.new_pages(blocks, limits.block_tokens)
    except RuntimeError as error:
        if not any(said in str(error) for said in NO_MEMORY):
            raise
        inference = 2 * limits.kv_tokens > tokens
        what = f"limits.kv_tokens is {limits.kv_tokens:,}" if inference else "samples are too long"
        asked = f"K/V pages of {tokens:,} tokens need {tokens * _token_bytes(model) / 2**30:,.1f} GiB"
        unused = "" if free is None else f", free are {free / 2**30:,.1f}"
        raise OutOfReach(f"{what}: {asked} on a device{unused}") from None


def plan_jobs(
    model: Model,
    limits: Limits,
    jobs: Sequence[TrainingJob],
    memory_bytes: float | None = None,
    wanted_share: float = 1.0,
    device: DeviceSpec = REFERENCE,
) -> list[CompilePlan]:
    """The compile plan of each job, for samples up to a whole number of pages.

    `device` prices the placement of the bypasses. `memory_bytes` are left on the device beside the weights;
    unless given, the device is asked as soon as a job with `memory: auto` needs it. Such jobs take no more than
    `wanted_share` of it if they can.
    """
    for job in jobs:
        if job.memory not in (*MEMORIES, AUTO):
            allowed = ", ".join((*MEMORIES, AUTO))
            raise ValueError(f"finetune job {job.id}: memory must be one of {allowed}, got {job.memory!r}")
    plans = {
        job.id: job.plan or _plan(model, limits, job, device)
        for job in jobs
        if job.plan or job.memory != AUTO
    }
    asking = [job for job in jobs if job.id not in plans]
    if asking:
        free = free_memory_bytes(model.device) if memory_bytes is None else memory_bytes
        free -= limits.kv_tokens * _token_bytes(model)
        free -= sum(plan.total_bytes() + plan.adapter_bytes for plan in plans.values())
        plans |= {
            job.id: _plan(model, limits, job, device, free / len(asking), wanted_share) for job in asking
        }
    return [plans[job.id] for job in jobs]


def free_memory_bytes(device: torch.device) -> float:
    """What may be planned with of the memory that nobody uses now. ValueError where the system does not say."""
    unused = _unused_bytes(device)
    if unused is None:
        raise ValueError(
            "memory=auto: this system does not say how much memory is free; choose stash or recompute"
        )
    return USABLE * unused


def _unused_bytes(device: torch.device) -> int | None:
    """None where the system does not say."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except ValueError:
        return None


def _plan(
    model: Model,
    limits: Limits,
    job: TrainingJob,
    device: DeviceSpec,
    free_bytes: float | None = None,
    wanted_share: float = 1.0,
) -> CompilePlan:
    """The plan of one job: its own mode, or with `free_bytes` the one that these allow."""
    tokens = -(-job.max_sample_tokens // limits.block_tokens) * limits.block_tokens
    analysis = Analysis(
        _shape(model),
        _spec_of(job.adapter),
        seq_tokens=tokens,
        device=device,
        tp=model.group.size,
        accumulation=job.accumulation,
    )
    if free_bytes is None:
        return analysis.plan(job.memory, order=job.order)
    return analysis.plan_within(free_bytes, wanted_share, job.order)


def _spec_of(adapter: Adapter) -> PeftSpec:
    return PeftSpec(targets=adapter.targets, rank=adapter.rank, alpha=adapter.alpha, rslora=adapter.rslora)


def _placed(model: Model, bypasses: Iterable[BypassPlan], adapter: Adapter) -> dict[str, Placement]:
    return placements_of(bypasses, adapter.rank, model.group, model.whole.shape)


def _served_as(model: Model, limits: Limits, adapter: Adapter) -> dict[str, Placement]:
    """Where no job's plan says it: as the compiler places what is only served."""
    plans = serving_bypasses(_shape(model), _spec_of(adapter), model.group.size, limits.max_sequences)
    return _placed(model, plans, adapter)


def _token_bytes(model: Model) -> int:
    """Of the keys and values of a token on a device."""
    return kv_bytes_per_token(_shape(model), model.group.size)


def _shape(model: Model) -> ModelShape:
    """Of the whole model, with the bytes of the weights that it runs on."""
    return replace(model.whole.shape, dtype_bytes=model.dtype.itemsize)


def _bank(model: Model, placed: Sequence[Mapping[str, Placement]]) -> AdapterBank | None:
    """Room for adapters so placed, and for three more versions: a bank that grows moves, and what is captured of
    it must be captured again."""
    if not placed:
        return None
    every = [placement for placements in placed for placement in placements.values()]
    layers, slots = model.config.shape.layers, len(placed) + 3
    return AdapterBank(every, model.group, layers, model.dtype, model.device, slots)


def _spec(job: TrainingJob, plan: CompilePlan) -> JobSpec:
    return JobSpec(
        id=job.id,
        layers=plan.layers,
        optimizer_params=sum(tensor.numel() for tensor in job.adapter.tensors()),
        accumulation=job.accumulation,
        weight=job.weight,
        start_s=job.start_s,
        order=plan.order,
        memory=plan.mode,
    )
