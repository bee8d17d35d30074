"""`coserve bench`: serve a workload and finetune beside it, for real, and leave a simulator's run folder.

    coserve bench model=tiny device=cpu
    coserve bench -m policy=coserving,temporal,inference_only
    coserve bench model=tiny device=cpu model.tp=2

The loop, the policies and the tables are the simulator's; what is new is that time passes. The predictor is
fitted to a few seconds of drawn work on the same machine before the run (`engine.measure`). The engine has
one stream, so where a policy plans finetuning beside inference (column `overlap`), it runs after it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from engine.assemble import TrainingJob
from engine.config import ModelConfig, read_config
from engine.driver import Driver, EngineArrivals, GivenArrivals, WallClock
from engine.engine import Engine
from engine.load import load_model, random_model
from engine.lora import new_adapter, write_adapter
from engine.measure import measure
from engine.model import Model
from engine.optimizer import OptimizerSettings
from engine.replica import Replica, replica
from engine.sampling import Sampling
from engine.text import BUNDLED, BYTES, byte_tokens, packed_samples, passes, read_text
from sim.assemble import CONFIGS as SIMULATOR
from sim.assemble import policy_of, seed_of, slos_of
from sim.checked import build, check
from sim.core.arrivals import Arrivals
from sim.core.finetune import Job
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.request import Request, Slo
from sim.core.rows import Outcome, Recorder
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.core.state import PipelineState
from sim.errors import FailedInPart
from sim.hydra_app import hydra_main
from sim.metrics import PipelineFacts, summarize
from sim.results import make_manifest, write_run
from sim.workload.workload import Workload

CONFIGS = Path(__file__).parent / "configs"
DTYPES = {2: torch.bfloat16, 4: torch.float32}
FIRST = "job"
"""Id of the job that the `job` node describes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The `run` node."""

    name: str | None
    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """The `job` node, or it with the changes of one of `more_jobs`."""

    weight: float
    data: str | None
    sample_tokens: int
    accumulation: int
    order: str
    memory: str
    lora: LoraSpec
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.sample_tokens < 2:
            raise ValueError(f"job.sample_tokens must be at least 2, got {self.sample_tokens}")
        if not self.weight > 0:
            raise ValueError(f"job.weight must be above 0, got {self.weight}")


def main(argv: Sequence[str]) -> int:
    """`coserve bench`."""
    OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
    return hydra_main(
        bench, argv, prog="coserve bench", config_name="bench", config_dir=CONFIGS, at_end=_show
    )


def bench(config: DictConfig) -> dict[str, Any]:
    """Serve and finetune for real on this machine, and write the run's folder."""
    device = build(DeviceSpec, config.device, "device")
    shape = _shape(config)
    with replica(shape.tp, _place(device)) as ranks:
        row, failures = _bench(config, ranks, shape, device)
    if failures:
        raise FailedInPart("; ".join(failures), row)
    return row


def _bench(
    config: DictConfig, ranks: Replica, shape: ModelShape, device: DeviceSpec
) -> tuple[dict[str, Any], list[str]]:
    """The summary row, and what failed."""
    started_s = time.perf_counter()
    seed = seed_of(config)
    run = build(RunSettings, config.run, "run")
    limits = build(Limits, config.limits, "limits")
    settings = _jobs(config)
    slos = slos_of(config)
    workload = build(None, config.workload, "workload").build(seed, tuple(slos))
    samples = {id: packed_samples(_tokens(config, job), job.sample_tokens) for id, job in settings.items()}
    model = _model(config, ranks, shape, seed)

    def training(id: str) -> TrainingJob:
        job = settings[id]
        return TrainingJob(
            id=id,
            samples=passes(samples[id], seed),
            max_sample_tokens=job.sample_tokens,
            adapter=new_adapter(job.lora, shape, model.compute, model.device, seed),
            optimizer=job.optimizer,
            accumulation=job.accumulation,
            weight=job.weight,
            order=job.order,
            memory=job.memory,
        )

    measure_s = check(config.measure_s, float, "measure_s")
    predictor = measure(model, limits, training(FIRST), measure_s, seed, ranks.assemble)
    policy = _policy(config, predictor, slos)
    names = [f"adapter_{n}" for n in range(config.workload.get("adapters", {}).get("count", 0))]
    adapters = {
        name: new_adapter(settings[FIRST].lora, shape, model.compute, model.device, seed + n)
        for n, name in enumerate(names, 1)
    }
    engine, jobs = ranks.assemble(model, limits, [training(id) for id in settings], adapters)
    horizon = Horizon(duration_s=workload.duration_s, drain_s=run.drain_s)
    recorder = _run(engine, jobs, policy, limits, workload, slos, horizon, seed)

    summary = summarize(
        recorder,
        slos=slos,
        duration_s=horizon.duration_s,
        pipelines=(
            PipelineFacts(kv_blocks=limits.kv_tokens // limits.block_tokens, device=device, devices=shape.tp),
        ),
        labels={
            "name": run.name,
            "policy": config.policy.name,
            "model": shape.name,
            "device": device.name,
            "workload": workload.name,
            "rate_rps": workload.rate_rps,
            "seed": seed,
            "source": "engine",
        },
    )
    folder = Path(HydraConfig.get().runtime.output_dir)
    resolved = cast(dict[str, object], OmegaConf.to_container(config, resolve=True))
    wall_s = time.perf_counter() - started_s
    manifest = make_manifest(seed=seed, device=device.name, wall_s=wall_s, command=sys.argv)
    write_run(folder, recorder, summary, config=resolved, manifest=manifest, source="engine", overwrite=True)
    for id in settings:
        write_adapter(engine.adapter(id), folder / _adapter_folder(id), config.weights)
    losses = {id: [record.loss for record in engine.steps if record.job == id] for id in settings}
    failures = [record.failure for record in engine.failures.values()]
    return {**summary, "folder": str(folder), "losses": losses}, failures


def _jobs(config: DictConfig) -> dict[str, JobSettings]:
    """Job -> its settings; the first is `job` itself."""
    found = {FIRST: build(JobSettings, config.job, "job")}
    for name, changes in (config.more_jobs or {}).items():
        if str(name) == FIRST or str(name).startswith("adapter_"):
            raise ValueError(f"more_jobs.{name}: a name must not be {FIRST}, nor begin with adapter_")
        if not isinstance(changes, DictConfig):
            raise ValueError(f"more_jobs.{name} must be a group of keys of job, got {changes!r}")
        node = OmegaConf.merge(OmegaConf.to_container(config.job, resolve=True), changes)
        found[str(name)] = build(JobSettings, node, f"more_jobs.{name}")
    return found


def _adapter_folder(job: str) -> str:
    return "adapter" if job == FIRST else f"adapter_{job}"


def _run(
    engine: Engine,
    jobs: list[Job],
    policy: Policy,
    limits: Limits,
    workload: Workload,
    slos: Mapping[str, Slo],
    horizon: Horizon,
    seed: int,
) -> Recorder:
    """One pipeline on the wall clock."""
    recorder = Recorder()
    state = PipelineState(limits=limits, slos=slos, recorder=recorder, jobs=jobs)
    vocab = engine.model.config.shape.vocab

    def prompt(request: Request) -> tuple[list[int], Sampling]:
        drawn = np.random.default_rng((seed, request.id)).integers(0, vocab, request.prompt_tokens)
        return drawn.tolist(), Sampling()

    arrivals: Arrivals = workload.arrivals() if policy.serves else GivenArrivals()
    source = EngineArrivals(arrivals, engine, prompt)
    Driver(engine, WallClock()).run(run_loop(state, policy, source, horizon))
    if not policy.serves:
        for request in workload.arrivals().due(horizon.duration_s):
            recorder.add_request(request, -1, Outcome.REJECTED)
    return recorder


def _shape(config: DictConfig) -> ModelShape:
    """The model's, checked against the folder of its weights, if they come from one."""
    shape: ModelShape = build(ModelShape, config.model, "model")
    shape.check_tp(shape.tp)
    if shape.dtype_bytes not in DTYPES:
        raise ValueError(f"model.dtype_bytes must be 2 (bfloat16) or 4 (float32), got {shape.dtype_bytes}")
    if config.weights is not None:
        read = read_config(config.weights).shape
        found = replace(read, name=shape.name, dtype_bytes=shape.dtype_bytes, tp=shape.tp)
        if found != shape:
            raise ValueError(f"weights: {config.weights} holds {found}, model is {shape}")
    return shape


def _place(device: DeviceSpec) -> str:
    if device.name == "cpu":
        # The operations are small: on a busy machine two threads were 3 to 10 times slower than one.
        torch.set_num_threads(1)
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(f"device {device.name} needs a CUDA device, and torch finds none; try device=cpu")
    return "cuda"


def _model(config: DictConfig, ranks: Replica, shape: ModelShape, seed: int) -> Model:
    dtype = DTYPES[shape.dtype_bytes]
    if config.weights is not None:
        return ranks.load(load_model, config.weights, dtype)
    family = "qwen2" if shape.qkv_bias else "llama"
    return ranks.load(random_model, ModelConfig(family=family, shape=shape), dtype, seed=seed)


def _tokens(config: DictConfig, settings: JobSettings) -> NDArray[np.int32]:
    """The job's text in tokens: the model's own, or bytes for random weights."""
    text = read_text(BUNDLED if settings.data is None else settings.data)
    if config.weights is None:
        if config.model.vocab < BYTES:
            raise ValueError(
                f"model.vocab must be at least {BYTES} for tokens of bytes, got {config.model.vocab}"
            )
        return byte_tokens(text)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.weights)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _policy(config: DictConfig, predictor: Any, slos: Mapping[str, Slo]) -> Policy:
    policy = policy_of({k: v for k, v in config.policy.items() if k != "name"}, predictor, slos)
    if not hasattr(policy, "plan"):
        raise ValueError(f"policy {config.policy.name} is for several pipelines; coserve bench runs one")
    return policy


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of all rows, what was learned, and where the folders are."""
    from analysis.table import print_table

    print_table([{k: v for k, v in row.items() if k != "losses"} for row in rows])
    for row in rows:
        for job, losses in row["losses"].items():
            if losses:
                name = row["name"] or row["policy"]
                who = name if len(row["losses"]) == 1 else f"{name}, {job}"
                print(f"loss:   {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps ({who})")
    folder = Path(rows[0]["folder"])
    print(f"runs:   {folder if len(rows) == 1 else folder.parent}")
