"""From a model, limits and finetuning jobs to an engine: who gets which pages, one bank for all adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.finetune import Sample, SampleFeed, Trainer
from engine.lora import Adapter, AdapterBank
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.shares import own_adapter
from sim.core.finetune import Job, JobSpec
from sim.core.plan import Limits


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
    accumulation: int = 8
    weight: float = 1.0
    start_s: float = 0.0
    order: str = "layer_major"
    memory: str = "stash"


def assemble_engine(
    model: Model,
    limits: Limits,
    jobs: Sequence[TrainingJob] = (),
    adapters: Mapping[str, Adapter] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    make: Callable[..., Engine] = Engine,
) -> tuple[Engine, list[Job]]:
    """The engine, and the jobs as the loop counts them; they share their data.

    Inference has the first pages, every job its own after them. Adapters are whole, on any number of ranks.
    """
    own = {name: own_adapter(model, adapter) for name, adapter in (adapters or {}).items()}
    trained = [own_adapter(model, job.adapter) for job in jobs]
    blocks = limits.kv_tokens // limits.block_tokens
    ranges = []
    for job in jobs:
        count = -(-job.max_sample_tokens // limits.block_tokens)
        ranges.append(range(blocks, blocks + count))
        blocks += count
    pages = model.new_pages(blocks, limits.block_tokens)
    bank = _bank(model, [*own.values(), *trained])
    counted, trainers = [], []
    for job, adapter, pages_of in zip(jobs, trained, ranges, strict=True):
        assert bank is not None
        feed = job.samples if isinstance(job.samples, SampleFeed) else SampleFeed(job.samples)
        spec = _spec(job, model)
        counted.append(Job(spec, feed.lengths()))
        trainers.append(
            Trainer(
                spec=spec,
                model=model,
                pages=pages,
                blocks=pages_of,
                bank=bank,
                adapter=adapter,
                feed=feed,
                optimizer=job.optimizer,
            )
        )
    engine = make(
        model=model,
        pages=pages,
        limits=limits,
        bank=bank,
        adapters=own,
        trainers=trainers,
        on_token=on_token,
    )
    return engine, counted


def _bank(model: Model, adapters: Sequence[Adapter]) -> AdapterBank | None:
    """Room for the largest rank and for all linear layers that any adapter has."""
    if not adapters:
        return None
    targets = tuple(dict.fromkeys(target for adapter in adapters for target in adapter.targets))
    rank = max(adapter.rank for adapter in adapters)
    return AdapterBank(model.config.shape, targets, rank, model.dtype, model.device)


def _spec(job: TrainingJob, model: Model) -> JobSpec:
    return JobSpec(
        id=job.id,
        layers=model.config.shape.layers,
        optimizer_params=sum(tensor.numel() for tensor in job.adapter.tensors()),
        accumulation=job.accumulation,
        weight=job.weight,
        start_s=job.start_s,
        order=job.order,
        memory=job.memory,
    )
