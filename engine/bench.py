"""`coserve bench`: serve a workload and finetune beside it, for real, and leave a simulator's run folder.

    coserve bench model=tiny device=cpu
    coserve bench model=llama_3_1_8b device=h200 workload=builtin workload.rate_rps=5 job/lora=down_proj
    coserve bench -m policy=coserving,temporal,inference_only
    coserve bench experiment=gpu_paper
    coserve bench model=tiny device=cpu model.tp=2

The loop, the policies and the tables are the simulator's; what is new is that time passes. The predictor is
fitted to a few seconds of designed work on the same machine before the run (`engine.measure`), or with
predictor=FILE to a profile that `coserve profile collect` has measured there at length; the peak of finetuning
is what the same engine does alone. Finetuning that a policy plans beside inference (column `overlap`) runs on
a stream of its own on CUDA, and after inference with launch.streams=1 and on the CPU.

The warm-up serves the same traffic with the same engine before time 0 and drops what is left of it, so that a
measured run begins empty, as a simulated one does; only the finetuning job goes on from where it stands.

A static split (`policy=separate_25`) is two pipelines on the device, each with its share of the device's time.
Splits, graphs and a second stream are for one device: with model.tp=2 the first are refused, and kernels are
launched one after the other.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.assemble import TrainingJob
from engine.before import Before, before_runs
from engine.bench_jobs import FIRST, adapter_folder, jobs_of, samples_of
from engine.engine import Engine
from engine.launching import LaunchSettings
from engine.lora import new_adapter, write_adapter
from engine.machine import model_of, place_of, release, shape_of
from engine.measure import finetune_peak_tok_s, measure
from engine.model import Model
from engine.pipelines import Setting, Share, Single, Split, share_of
from engine.replica import Replica, replica
from engine.room import limits_and_plans
from engine.text import passes
from sim.assemble import CONFIGS as SIMULATOR
from sim.assemble import LimitSettings, policy_of, seed_of, slos_of
from sim.checked import build, check, locate
from sim.compile.plan import CompilePlan
from sim.core.finetune import Job
from sim.core.loop import Horizon
from sim.core.plan import Limits, Policy
from sim.core.request import Slo
from sim.core.specs import DeviceSpec, LoraSpec, ModelShape
from sim.cost.context import CostContext
from sim.cost.fitted import FittedCost
from sim.cost.iteration import IterationCost
from sim.errors import FailedInPart, warnings_as_notes
from sim.hydra_app import hydra_main
from sim.metrics import summarize
from sim.notes import print_notes, request_notes, step_notes
from sim.rerun import rerun_of, write_rerun
from sim.results import distinction, finished_run, make_manifest, shown_path, write_run

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The `run` node."""

    name: str | None
    drain_s: float
    warm_up_s: float
    resume: bool

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up_s < math.inf:
            raise ValueError(f"run.warm_up_s must be at least 0 seconds and end, got {self.warm_up_s}")


def main(argv: Sequence[str]) -> int:
    """`coserve bench`."""
    OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
    return hydra_main(
        bench,
        argv,
        prog="coserve bench",
        config_name="bench",
        config_dir=CONFIGS,
        at_start=_tell_plan,
        at_end=_show,
    )


def bench(config: DictConfig) -> dict[str, Any]:
    """Serve and finetune for real on this machine, and write the run's folder."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    resolved = cast(dict[str, object], OmegaConf.to_container(config, resolve=True))
    resume = check(config.run.resume, bool, "run.resume")
    done = finished_run(folder, resolved, resume=resume, sweep=hydra.mode == RunMode.MULTIRUN)
    if done is not None:
        return {**done.summary, "folder": str(folder), "config": done.config, "losses": {}, "plans": {}}
    device = build(DeviceSpec, config.device, "device")
    shape = shape_of(config.model, config.weights)
    try:
        with replica(shape.tp, place_of(device)) as ranks:
            row, failures = _bench(config, resolved, folder, ranks, shape, device)
    except Exception as error:
        # The error is kept until the sweep ends, its frames with it: they must not hold the pages.
        traceback.clear_frames(error.__traceback__)
        release()
        raise
    if failures:
        raise FailedInPart("; ".join(failures), row)
    return row


def _bench(
    config: DictConfig,
    resolved: dict[str, object],
    folder: Path,
    ranks: Replica,
    shape: ModelShape,
    device: DeviceSpec,
) -> tuple[dict[str, Any], list[str]]:
    """The summary row, and what failed."""
    started_s = time.perf_counter()
    seed = seed_of(config)
    run = build(RunSettings, config.run, "run")
    measure_s, peak_s = _seconds(config, "measure_s"), _seconds(config, "peak_s")
    settings = jobs_of(config, shape)
    launch = build(LaunchSettings, config.launch, "launch")
    slos = slos_of(config)
    split = _split_of(config, shape)
    with warnings_as_notes(shown=True):
        workload = build(None, config.workload, "workload").build(seed, tuple(slos))
    samples = {id: samples_of(config, job, shape) for id, job in settings.items()}
    model = model_of(shape, device, config.weights, ranks)
    given = build(LimitSettings, config.limits, "limits")

    def training(of_seed: int, plans: Mapping[str, CompilePlan]) -> list[TrainingJob]:
        return [
            TrainingJob(
                id=id,
                samples=passes(samples[id], of_seed),
                max_sample_tokens=job.sample_tokens,
                adapter=new_adapter(job.lora, shape, model.compute, model.device, of_seed),
                optimizer=job.optimizer,
                accumulation=job.accumulation,
                weight=job.weight,
                order=job.order,
                memory=job.memory,
                plan=plans.get(id),
            )
            for id, job in settings.items()
        ]

    utilization = check(config.memory_utilization, float, "memory_utilization")
    limits, plans = limits_and_plans(model, device, given, training(0, {}), utilization)
    assemble = partial(ranks.assemble, launching=launch.on(model))

    def measured() -> Before:
        predictor = _predictor(config, model, limits, device, training(0, plans)[0], measure_s, assemble)
        if not peak_s:
            return Before(predictor, None)
        release()
        alone = _policy(_named_policy("finetune_only"), predictor, slos)
        return Before(
            predictor, finetune_peak_tok_s(model, limits, training(0, plans), alone, peak_s, assemble)
        )

    parts = (
        "model",
        "weights",
        "device",
        "limits",
        "memory_utilization",
        "job",
        "more_jobs",
        "launch",
        "predictor",
        "measure_s",
        "peak_s",
    )
    told = [plan.describe() for plan in plans.values()]
    key = json.dumps([*(resolved[part] for part in parts), *told])
    before = before_runs(key, measured, _sweep_folder(), run.resume)
    release()
    names = [f"adapter_{n}" for n in range(config.workload.get("adapters", {}).get("count", 0))]
    adapters = {
        name: new_adapter(settings[FIRST].lora, shape, model.compute, model.device, seed + n)
        for n, name in enumerate(names, 1)
    }
    setting = Setting(
        model=model,
        limits=limits,
        jobs=training(seed, plans),
        adapters=adapters,
        slos=slos,
        device=device,
        seed=seed,
        assemble=assemble,
    )
    policy = None if split is not None else _policy(config.policy, before.predictor, slos)
    if policy is not None:
        bench: Single | Split = Single(setting, policy)
    else:
        assert split is not None
        sliced = _policy(_named_policy("temporal_limited"), before.predictor, slos)
        bench = Split(setting, split.policy, sliced, split.share)
    if run.warm_up_s:
        bench.run(workload, Horizon(duration_s=run.warm_up_s, drain_s=0.0))
    rerun = None
    if isinstance(bench, Single):
        following = {id: job.sample_tokens for id, job in settings.items()}
        rerun = rerun_of(limits, bench.jobs, following, before.predictor)
    horizon = Horizon(duration_s=workload.duration_s, drain_s=run.drain_s)
    recorder = bench.run(workload, horizon)

    asked_rps = config.workload.get("rate_rps")
    summary = summarize(
        recorder,
        slos=slos,
        duration_s=horizon.duration_s,
        pipelines=bench.facts,
        peak_finetune_tok_s=before.peak_tok_s,
        labels={
            "name": distinction(HydraConfig.get().overrides.task) if run.name is None else run.name,
            "policy": config.policy.name,
            "model": shape.name,
            "device": device.name,
            "workload": workload.name,
            "rate_rps": workload.rate_rps if asked_rps is None else float(asked_rps),
            "seed": seed,
            "source": "engine",
        },
    )
    wall_s = time.perf_counter() - started_s
    manifest = make_manifest(seed=seed, device=device.name, wall_s=wall_s, command=sys.argv)
    if rerun is not None:
        write_rerun(folder, rerun)
    write_run(folder, recorder, summary, config=resolved, manifest=manifest, source="engine", overwrite=True)
    trainer = bench.trainer
    for id in settings:
        write_adapter(trainer.adapter(id), folder / adapter_folder(id), config.weights)
    losses = {id: [record.loss for record in trainer.steps if record.job == id] for id in settings}
    first = settings[FIRST]
    memory = {id: plan.describe() for id, plan in plans.items()}
    failures = [record.failure for record in trainer.failures.values()]
    notes = request_notes(recorder, [limits] if policy is None or policy.serves else [], "limits")
    if policy is None or policy.finetunes:
        notes += step_notes(summary, f"{first.accumulation} samples of {first.sample_tokens} tokens")
    notes += _peak_notes(summary, before.peak_tok_s, peak_s)
    notes += [ON_A_CPU] if device.name == "cpu" else []
    own = {"folder": str(folder), "config": resolved, "losses": losses, "plans": memory, "notes": notes}
    return {**summary, **own}, failures


ON_A_CPU = "SLO bounds are those of a GPU; on a CPU the share of requests that meet them says nothing"


def _peak_notes(summary: Mapping[str, Any], peak_tok_s: float | None, peak_s: float) -> list[str]:
    """Of a run that does more beside requests than was measured without."""
    done_tok_s = summary["finetune_tok_s"]
    if peak_tok_s is None or not done_tok_s > peak_tok_s:
        return []
    return [
        f"finetuning alone was measured at {peak_tok_s:,.0f} tok/s for {peak_s:g} s before the run, which did "
        f"{done_tok_s:,.0f}: the machine was busier then, or peak_s is too short"
    ]


def _sweep_folder() -> Path | None:
    """Of all runs of a sweep; None for a run of its own."""
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None


def _seconds(config: DictConfig, key: str) -> float:
    """A time that is spent before the first run."""
    seconds: float = check(config[key], float, key)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{key} must be at least 0 seconds and end, got {seconds}")
    return seconds


def _split_of(config: DictConfig, shape: ModelShape) -> Share | None:
    """Who serves in a static split, for a policy that assigns whole pipelines; None for all others.

    Its other side finetunes in slices within the latency budget, so that serving never waits for it longer
    than for a token of its own.
    """
    node = {str(key): value for key, value in config.policy.items() if key != "name"}
    if not hasattr(locate(node.get("_target_"), "policy"), "assign"):
        return None
    if shape.tp > 1:
        raise ValueError(f"policy {config.policy.name} splits one device; model.tp must be 1, got {shape.tp}")
    return share_of(build(None, node, "policy"))


def _named_policy(name: str) -> Any:
    return OmegaConf.load(SIMULATOR / "policy" / f"{name}.yaml")


def _predictor(
    config: DictConfig,
    model: Model,
    limits: Limits,
    device: DeviceSpec,
    job: TrainingJob,
    measure_s: float,
    assemble: Callable[..., tuple[Engine, list[Job]]],
) -> FittedCost:
    """A table of the profile in `predictor`, or of what this machine does in `measure_s`."""
    path = check(config.predictor, str | None, "predictor")
    if path is None:
        return measure(model, limits, job, measure_s, assemble)
    from profiles.table_file import TableFile

    lora = build(LoraSpec, config.job.lora, "job.lora")
    context = CostContext(
        device=device,
        model=model.whole.shape,
        tp=model.group.size,
        lora=lora,
        seed=0,
        lookahead=limits.lookahead,
    )
    return TableFile(path=path).build(context)


def _policy(node: Any, predictor: IterationCost, slos: Mapping[str, Slo]) -> Policy:
    return policy_of({str(k): v for k, v in node.items() if k != "name"}, predictor, slos)


def _tell_plan(config: DictConfig, runs: int) -> None:
    """What a sweep will take, before it starts: with empty pipelines at the end, and with none."""
    arrivals_s = config.workload.get("duration_s")
    measure_s = config.measure_s if config.predictor is None else 0.0
    times = (arrivals_s, measure_s, config.peak_s, config.run.warm_up_s, config.run.drain_s)
    if arrivals_s is not None and not all(isinstance(time, int | float) for time in times):
        return  # each run says what is wrong with it
    before_s = measure_s + config.peak_s
    if arrivals_s is None:
        print(f"plan:   {runs} runs, each as long as its trace", file=sys.stderr)
        return
    least_s = config.run.warm_up_s + arrivals_s
    most_s = least_s + config.run.drain_s
    print(
        f"plan:   {runs} runs of {least_s:g} to {most_s:g} s after {before_s:g} s of measuring: "
        f"{(before_s + runs * least_s) / 60:.1f} to {(before_s + runs * most_s) / 60:.1f} minutes",
        file=sys.stderr,
    )


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of all rows, what was learned, the figure that compares them, and where they are."""
    from analysis.figures.compare import write_compare
    from analysis.figures.sweep import write_sweep
    from analysis.repeats import run_names
    from analysis.runs import SCENE, varied
    from analysis.table import print_table

    print_table([{k: v for k, v in row.items() if k not in ("losses", "plans", "notes")} for row in rows])
    print_notes(rows)
    for row, name in zip(rows, run_names(rows), strict=True):
        for job, losses in row["losses"].items():
            if losses:
                who = name if len(row["losses"]) == 1 else f"{name}, {job}"
                print(f"loss:   {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps ({who})")
    for text in dict.fromkeys(text for row in rows for text in row["plans"].values()):
        print(f"memory: {text}")
    folder = Path(rows[0]["folder"])
    folder = folder if len(rows) == 1 else folder.parent
    print(f"runs:   {shown_path(folder)}")
    if scenes := varied(rows, SCENE):
        print(f"figure: none, the runs differ in {', '.join(scenes)}; coserve report draws some of them")
        return
    write = write_sweep if varied(rows, ["rate_rps"]) else write_compare
    print(f"figure: {shown_path(write(rows, folder / 'compare.png'))}")
