"""`coserve simulate`: run one configuration, or a sweep with -m, and leave a run folder each.

    coserve simulate policy=coserving workload=azure_conv workload.rate_rps=5
    coserve simulate -m policy=coserving,temporal seed=0,1,2

A single run also simulates the two bounds, serving alone and finetuning alone, on the same traffic, so that
its table and figure say at once what co-serving costs and what it gains. `coserve compare` is the sweep over
all policies.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sim.assemble import CONFIGS, Assembly, assemble
from sim.checked import build, locate
from sim.cluster import simulate_cluster
from sim.core.finetune import Job
from sim.core.request import Slo
from sim.core.rows import Recorder
from sim.core.specs import ModelShape
from sim.core.work import Chunk, Work
from sim.errors import passed_over, warnings_as_notes
from sim.hydra_app import first_config, hydra_main, shipped
from sim.metrics import summarize
from sim.notes import (
    bound_notes,
    class_notes,
    data_notes,
    device_notes,
    extrapolation_notes,
    idle_notes,
    print_notes,
    request_notes,
    room_notes,
    slo_notes,
    step_notes,
    with_serving_alone,
)
from sim.policy_node import assigned, policy_node, policy_of
from sim.results import Run, distinction, finished_run, make_manifest, shown_path, write_run
from sim.settings import ClusterSettings, RunSettings, seed_of, slos_of
from sim.unread import check_bounds, check_effects
from sim.workload.workload import Workload


def main(argv: Sequence[str]) -> int:
    """`coserve simulate`."""
    return hydra_main(simulate, argv, prog="coserve simulate", at_start=tell_workload, at_end=show)


LOOKED_AT = {"--cfg", "-c", "--info", "-i", "--help", "-h"}
"""Flags with which nothing runs."""
GENERAL = ("separate", "temporal")
"""Policies that one with its number in the name stands for: separate_50, temporal_64."""


def all_policies() -> str:
    """What `policy=` takes to run each of them once; 64 comes before 128."""
    names = [path.stem for path in (CONFIGS / "policy").glob("*.yaml") if path.stem not in GENERAL]
    return ",".join(sorted(names, key=lambda name: re.sub(r"\d+", lambda digits: f"{digits[0]:0>4}", name)))


def fitting_policies(argv: Sequence[str]) -> str:
    """`all_policies` but for those of a whole cluster that cannot share out the pipelines that `argv` asks for; these
    are told in a note. With a sweep over clusters, or where the config cannot be made, all: runs say what is wrong."""
    names = all_policies().split(",")
    config = None if LOOKED_AT & set(argv) else first_config(argv, "cluster", "experiment")
    if config is None:
        return ",".join(names)
    try:
        cluster, slos = build(ClusterSettings, config.cluster, "cluster"), slos_of(config)
    except ValueError:
        return ",".join(names)
    pipelines = cluster.pipelines or sum(group.pipelines for group in cluster.groups or ())
    left_out = [name for name in names if not _shares_out(name, pipelines, slos)]
    if left_out:
        count = "1 pipeline" if pipelines == 1 else f"{pipelines} pipelines"
        told = f"{', '.join(left_out)} left out: {count} cannot be shared out so"
        print(f"note: {told}", file=sys.stderr)
    return ",".join(name for name in names if name not in left_out)


def _shares_out(name: str, pipelines: int, slos: Mapping[str, Slo]) -> bool:
    """Whether a shipped policy can be that of so many pipelines."""
    node = policy_node(shipped("policy", name))
    if not hasattr(locate(node["_target_"], "policy"), "assign"):
        return True
    try:
        assigned(policy_of(node, None, slos), pipelines)
    except ValueError:
        return False
    return True


def compare(argv: Sequence[str]) -> int:
    """`coserve compare`: every policy, or those of `policy=...`, on one configuration."""
    if not any(arg.startswith("policy=") for arg in argv):
        argv = [*argv, f"policy={fitting_policies(argv)}"]
    return hydra_main(
        simulate,
        swept(argv),
        prog="coserve compare",
        at_start=tell_workload,
        at_end=show,
        about="Simulate every policy, or those of policy=A,B, on the same traffic: a table and a figure.",
        example="coserve compare workload=azure_conv workload.rate_rps=16 workload.duration_s=600",
    )


def swept(argv: Sequence[str]) -> list[str]:
    """As a sweep; what only looks at a config, which sweeps cannot, gets that of the first run."""
    if LOOKED_AT & set(argv):
        return [arg.partition(",")[0] if re.match(r"[\w./@+~-]+=[^\[{('\"]*$", arg) else arg for arg in argv]
    return ["-m", *argv]


def simulate(config: DictConfig) -> dict[str, Any]:
    """Simulate one configuration, or with -m a sweep, and write a folder of each run.

    Returns the summary row, with `folder` and the resolved `config` in it.
    """
    build(ModelShape, config.model, "model")  # what is wrong with it comes before bounds that go by its name
    check_bounds(config)
    check_effects(config)
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    single = hydra.mode == RunMode.RUN
    resolved = _plain(config)
    run = build(RunSettings, config.run, "run")
    bounds = _bounds(config, folder) if single and run.bounds else {}
    done = finished_run(folder, resolved, resume=run.resume)
    others = {at: finished_run(at, _plain(bound), resume=run.resume) for at, bound in bounds.items()}
    if done is not None and None not in others.values():
        return _row_of(done)
    with warnings_as_notes(shown=single):
        assembly = assemble(config)
    if single:
        _print_workload_notes(assembly.workload)
    with warnings_as_notes(shown=False):
        peak_tok_s = finetune_peak_tok_s(assemble(_with_policy(config, "finetune_only")))
    if done is not None:
        row = _row_of(done)
    else:
        if assembly.labels["name"] is None:
            assembly.labels["name"] = distinction(hydra.overrides.task)
        with _progress(assembly, show=single) as on_progress:
            row = _run(assembly, config, folder, peak_tok_s, on_progress)
    for at, bound in bounds.items():
        if others[at] is None:
            _run_bound(bound, at, peak_tok_s)
    return row


def tell_workload(config: DictConfig, runs: int) -> None:
    """Before a sweep of `runs`: what there is to say of its trace, that of the first run, whose config this is."""
    if OmegaConf.select(config, "workload.file") is None:
        return
    with passed_over():
        with warnings_as_notes(shown=True):
            workload = build(None, config.workload, "workload").build(seed_of(config), tuple(slos_of(config)))
        _print_workload_notes(workload)


def _print_workload_notes(workload: Workload) -> None:
    """Before anything is simulated, which may take long."""
    for note in dict.fromkeys(workload.notes):
        print(f"note: {note}", file=sys.stderr)


def _row_of(done: Run) -> dict[str, Any]:
    """The row of a run that was there."""
    return {**done.summary, "folder": str(done.folder), "config": done.config}


def _bounds(config: DictConfig, folder: Path) -> dict[Path, DictConfig]:
    """Folder -> configuration of the bounds that a run in `folder` has beside it."""
    policies = [name for name in ("inference_only", "finetune_only") if name != config.policy.name]
    return {folder / "bounds" / name: _with_policy(config, name) for name in policies}


def _run_bound(config: DictConfig, folder: Path, peak_tok_s: float | None) -> None:
    with warnings_as_notes(shown=False):
        assembly = assemble(config)
    if assembly.labels["name"] is None:
        given = [o for o in HydraConfig.get().overrides.task if not o.startswith("policy.")]
        assembly.labels["name"] = distinction(given)
    with _progress(assembly, show=True) as on_progress:
        _run(assembly, config, folder, peak_tok_s, on_progress)


def run_assembly(assembly: Assembly, on_progress: Callable[[float], None] | None = None) -> Recorder:
    """Simulate what was assembled; the assembly is used up."""
    recorder = Recorder()
    with _few_collections():
        simulate_cluster(
            pipelines=assembly.pipelines,
            arrivals=assembly.workload.arrivals(),
            router=assembly.router,
            slos=assembly.slos,
            horizon=assembly.horizon,
            recorder=recorder,
            on_progress=on_progress,
        )
    return recorder


def finetune_peak_tok_s(assembly: Assembly) -> float | None:
    """Trained tokens per second of a cluster with every pipeline finetuning; None without jobs.

    Counted from the start to the end of the last optimizer step, so that it does not depend on where the
    run is cut; when a job's data ended, over no less than the whole run, as what it is compared with.
    """
    if not any(spec.jobs for spec in assembly.pipelines):
        return None
    alone = replace(assembly, horizon=replace(assembly.horizon, drain_s=0.0))
    recorder = run_assembly(alone)
    steps = recorder.steps.arrays()
    jobs: dict[str, list[Job]] = {}
    for spec in alone.pipelines:
        for job in spec.jobs:
            jobs.setdefault(job.spec.id, []).append(job)
    done = any(all(job.finished for job in own) for own in jobs.values())
    peak = 0.0
    for pipeline in range(len(alone.pipelines)):
        own = steps["pipeline"] == pipeline
        if own.any():
            until_s = max(steps["end_s"][own].max(), alone.horizon.duration_s if done else 0.0)
            peak += float(steps["tokens"][own].sum() / until_s)
    return peak or None


def _run(
    assembly: Assembly,
    config: DictConfig,
    folder: Path,
    peak_tok_s: float | None,
    on_progress: Callable[[float], None] | None,
) -> dict[str, Any]:
    started_s = time.perf_counter()
    step = _step(assembly)
    jobs = [job for spec in assembly.pipelines for job in spec.jobs]
    recorder = run_assembly(assembly, on_progress)
    wall_s = time.perf_counter() - started_s
    summary = summarize(
        recorder,
        slos=assembly.slos,
        duration_s=assembly.horizon.duration_s,
        pipelines=assembly.facts,
        peak_finetune_tok_s=peak_tok_s,
        jobs=jobs,
        labels=assembly.labels,
    )
    summary["notes"] = _notes(assembly, recorder, summary, jobs, step, config.policy)
    resolved = _plain(config)
    manifest = make_manifest(
        seed=config.seed, device=str(assembly.labels["device"]), wall_s=wall_s, command=sys.argv
    )
    write_run(folder, recorder, summary, config=resolved, manifest=manifest, source="sim")
    return {**summary, "folder": str(folder), "config": resolved}


def _notes(
    assembly: Assembly,
    recorder: Recorder,
    summary: Mapping[str, Any],
    jobs: Sequence[Job],
    step: str | None,
    policy: Mapping[str, Any],
) -> list[str]:
    """What the summary does not say; `jobs` are those of all pipelines, `step` is what an optimizer step is, `policy`
    its node."""
    limits = [s.limits for s in assembly.pipelines if s.policy.serves]
    notes = bound_notes(assembly.slos.values(), policy)
    notes += request_notes(recorder, limits, "cluster.limits")
    notes += room_notes(recorder, summary, limits, "cluster.limits")
    notes += class_notes(summary)
    finetuning = sum(bool(spec.jobs) and spec.policy.finetunes for spec in assembly.pipelines)
    idle = sum(spec.policy.finetunes and not (spec.policy.serves or spec.jobs) for spec in assembly.pipelines)
    notes += idle_notes(idle, len(assembly.pipelines))
    notes += [] if step is None else step_notes(recorder, summary, finetuning, step)
    notes += data_notes(recorder, jobs)
    notes += extrapolation_notes(recorder, summary, assembly.facts)
    notes += device_notes(assembly.unmeasured)
    tpot_s = min(slo.tpot_s for slo in assembly.slos.values())
    return notes + slo_notes(summary, _least_prefill(assembly), tpot_s)


def _least_prefill(assembly: Assembly) -> tuple[float, int] | None:
    """Predicted seconds of a decode beside the least chunk of a prompt, and its tokens, on the fastest pipeline;
    None where one that serves has no least chunk."""
    found = []
    for spec in assembly.pipelines:
        if not spec.policy.serves:
            continue
        tokens = getattr(spec.policy, "min_chunk_tokens", None)
        if tokens is None:
            return None
        tokens = min(tokens, spec.limits.max_tokens)
        work = Work(prefill=(Chunk(tokens, 0),), decode_count=1, decode_context_tokens=1, sampled_tokens=1)
        found.append((spec.predictor.iteration_s(work), tokens))
    return min(found, default=None)


def _step(assembly: Assembly) -> str | None:
    """What an optimizer step of a pipeline is; None when nothing is finetuned. To be asked before the run."""
    jobs = [job for spec in assembly.pipelines if spec.policy.finetunes for job in spec.jobs]
    if not jobs:
        return None
    samples = " or ".join(map(str, sorted({job.spec.accumulation for job in jobs})))
    mean_tokens = sum(job.sample_tokens for job in jobs) / len(jobs)
    return f"{samples} samples, the first of {mean_tokens:,.0f} tokens"


def _plain(config: DictConfig) -> dict[str, object]:
    return cast(dict[str, object], OmegaConf.to_container(config, resolve=True))


def _with_policy(config: DictConfig, policy: str) -> DictConfig:
    """The same configuration with another policy's own defaults."""
    node = OmegaConf.load(CONFIGS / "policy" / f"{policy}.yaml")
    changed = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(changed, DictConfig)
    changed.policy = node
    return changed


@contextmanager
def _progress(assembly: Assembly, show: bool) -> Iterator[Callable[[float], None] | None]:
    """A bar over simulated seconds on stderr, for a person who waits for a single run."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} simulated s [{elapsed}<{remaining}]"
    total_s = assembly.horizon.duration_s
    with tqdm(total=total_s, desc=str(assembly.labels["policy"]), bar_format=form, leave=False) as bar:

        def update(now_s: float) -> None:
            bar.update(min(now_s, total_s) - bar.n)

        yield update


@contextmanager
def _few_collections() -> Iterator[None]:
    """Collect garbage rarely while the loop runs: it makes many small tuples, no cycles (7 % of its time)."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The table of all rows, the figure that compares them, and where both are."""
    from analysis.figures.compare import write_compare
    from analysis.figures.sweep import write_sweep
    from analysis.runs import SCENE, row_of, varied
    from analysis.table import print_table
    from sim.results import read_run

    shown = list(rows)
    if folder == Path(rows[0]["folder"]):
        bounds = [row_of(read_run(path)) for path in sorted(folder.glob("bounds/*"))]
        shown = [with_serving_alone(rows[0], bounds), *bounds]
    print_table(shown)
    print_notes(shown)
    print(f"runs:   {shown_path(folder)}")
    scenes = varied(shown, SCENE)
    if scenes:
        print(f"figure: none, the runs differ in {', '.join(scenes)}; coserve report draws some of them")
        return
    write = write_sweep if varied(shown, ["rate_rps"]) else write_compare
    print(f"figure: {shown_path(write(shown, folder / 'compare.png'))}")
