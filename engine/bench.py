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

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.before import before_runs
from engine.bench_jobs import FIRST, adapter_folder
from engine.bench_loaded import load_bench
from engine.bench_spec import BenchRunSettings, BenchSpec, spec_of
from engine.lora import write_adapter
from engine.machine import release, take_model_of_folder
from engine.pipelines import Single
from engine.replica import Replica, replica
from sim.checked import build
from sim.core.loop import Horizon
from sim.errors import FailedInPart
from sim.hydra_app import hydra_main
from sim.metrics import summarize
from sim.notes import bound_notes, class_notes, data_notes, print_notes, request_notes, room_notes, step_notes
from sim.rerun import rerun_of, write_rerun
from sim.results import distinction, finished_run, make_manifest, shown_path, write_run
from sim.unread import check_bounds, check_effects, refuse_needless

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str]) -> int:
    """`coserve bench`."""
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
    take_model_of_folder(config)
    check_bounds(config)
    check_effects(config)
    refuse_needless(config)
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    resolved = cast(dict[str, object], OmegaConf.to_container(config, resolve=True))
    run = build(BenchRunSettings, config.run, "run")
    done = finished_run(folder, resolved, resume=run.resume)
    if done is not None:
        return {**done.summary, "folder": str(folder), "config": done.config, "losses": {}, "plans": {}}
    spec = spec_of(config)
    if spec.run.name is None:
        spec.labels["name"] = distinction(hydra.overrides.task)
    try:
        with replica(spec.shape.tp, spec.place) as ranks:
            row, failures = _bench(spec, ranks, folder)
    except Exception as error:
        # The error is kept until the sweep ends, its frames with it: they must not hold the pages.
        traceback.clear_frames(error.__traceback__)
        release()
        raise
    if failures:
        raise FailedInPart("; ".join(failures), row)
    return row


def _bench(spec: BenchSpec, ranks: Replica, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The summary row, and what failed."""
    started_s = time.perf_counter()
    loaded = load_bench(spec, ranks)
    before = before_runs(loaded.key, loaded.measured, loaded.first_uses, _sweep_folder(), spec.run.resume)
    release()
    pipelines = loaded.pipelines(before.predictor)
    if spec.run.warm_up_s:
        pipelines.run(spec.workload, Horizon(duration_s=spec.run.warm_up_s, drain_s=0.0))
    rerun = None
    if isinstance(pipelines, Single):
        following = {id: job.sample_tokens for id, job in spec.jobs.items()}
        rerun = rerun_of(loaded.limits, pipelines.jobs, following, before.predictor)
    recorder = pipelines.run(spec.workload, spec.horizon)

    summary = summarize(
        recorder,
        slos=spec.slos,
        duration_s=spec.horizon.duration_s,
        pipelines=pipelines.facts,
        peak_finetune_tok_s=before.peak_tok_s,
        jobs=pipelines.jobs,
        labels=spec.labels,
    )
    limits = [loaded.limits] if pipelines.serves else []
    notes = bound_notes(spec.slos.values(), cast(dict[str, Any], spec.config["policy"]))
    notes += request_notes(recorder, limits, "limits")
    notes += room_notes(recorder, summary, limits, "limits")
    notes += class_notes(summary)
    if pipelines.finetunes:
        first = spec.jobs[FIRST]
        notes += step_notes(
            recorder, summary, 1, f"{first.accumulation} samples of {first.sample_tokens} tokens"
        )
    notes += data_notes(recorder, pipelines.jobs)
    notes += _peak_notes(summary, before.peak_tok_s, spec.peak_s)
    notes += [ON_A_CPU] if spec.device.name == "cpu" else []
    summary["notes"] = notes
    wall_s = time.perf_counter() - started_s
    manifest = make_manifest(seed=spec.seed, device=spec.device.name, wall_s=wall_s, command=sys.argv)
    if rerun is not None:
        write_rerun(folder, rerun)
    write_run(folder, recorder, summary, config=spec.config, manifest=manifest, source="engine")
    trainer = pipelines.trainer
    for id in spec.jobs:
        write_adapter(trainer.adapter(id), folder / adapter_folder(id), spec.weights)

    own = {
        "folder": str(folder),
        "config": spec.config,
        "losses": {id: [record.loss for record in trainer.steps if record.job == id] for id in spec.jobs},
        "plans": {id: plan.describe() for id, plan in loaded.plans.items()},
    }
    return {**summary, **own}, [record.failure for record in trainer.failures.values()]


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


def _show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table of all rows, what was learned, the figure that compares them, and where they are."""
    from analysis.figures.compare import write_compare
    from analysis.figures.sweep import write_sweep
    from analysis.repeats import run_names
    from analysis.runs import SCENE, varied
    from analysis.table import print_table

    print_table(rows)
    print_notes(rows)
    for row, name in zip(rows, run_names(rows), strict=True):
        for job, losses in row["losses"].items():
            if losses:
                who = name if len(row["losses"]) == 1 else f"{name}, {job}"
                print(f"loss:   {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps ({who})")
    for text in dict.fromkeys(text for row in rows for text in row["plans"].values()):
        print(f"memory: {text}")
    print(f"runs:   {shown_path(folder)}")
    if scenes := varied(rows, SCENE):
        print(f"figure: none, the runs differ in {', '.join(scenes)}; coserve report draws some of them")
        return
    write = write_sweep if varied(rows, ["rate_rps"]) else write_compare
    print(f"figure: {shown_path(write(rows, folder / 'compare.png'))}")
