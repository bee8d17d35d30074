"""Running the loop of a recorded run again: with its own times, or in the simulator with a cost model's.

Rows alone do not say under what a run was decided. What else it takes lies beside them in `rerun.json`: the
limits as they came out, where the finetuning jobs stood at time 0, and the predictor, number by number. With it

- a *replay* answers every wait with the recorded time: the same plans must come out, all of them;
- a *simulation* lets a cost model say how long iterations take: what would have been predicted.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sim.checked import build, check
from sim.cluster import NoArrivals, PipelineSpec, simulate_cluster
from sim.core.arrivals import Arrivals
from sim.core.cost import CostModel
from sim.core.finetune import Job, JobSpec, JobView
from sim.core.loop import Command, Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Limits, Policy
from sim.core.request import Slo
from sim.core.rows import WORK_COLUMNS, Recorder
from sim.core.state import PipelineState
from sim.cost.iteration import IterationCost
from sim.cost.saved import from_plain, to_plain
from sim.errors import keys_as, message
from sim.json_file import read_object, taken_apart
from sim.policy_node import policy_node, policy_of
from sim.results import CONFIG, Run
from sim.routing import LeastTokens
from sim.settings import seed_of, slos_of
from sim.workload.workload import Workload

FILE = "rerun.json"
COMPARED = (*WORK_COLUMNS, "predicted_s", "running", "waiting", "kv_blocks_used", "preempted")
"""Columns in which equal plans from equal states agree."""

GROUPS = ("device", "job", "model", "policy", "run", "slo", "workload")
"""Of the config of a run of the engine."""

_PROGRESS = ("accumulated_samples", "accumulated_tokens", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """A recorded run of one pipeline with all that it was decided under."""

    run: Run
    limits: Limits
    predictor: IterationCost
    slos: dict[str, Slo]
    workload: Workload
    horizon: Horizon
    _config: DictConfig
    _jobs: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return seed_of(self._config)

    def policy(self) -> Policy:
        with config_of(self.run) as config:
            return policy_of(policy_node(config.policy), self.predictor, self.slos)

    def jobs(self) -> list[Job]:
        """The jobs as they stood at time 0; anew each time, since running uses them up."""
        return [_job(plain, f"jobs[{n}]") for n, plain in enumerate(self._jobs)]


def rerun_of(
    limits: Limits,
    jobs: Iterable[Job],
    following_tokens: Mapping[str, int],
    predictor: IterationCost,
) -> dict[str, Any]:
    """What FILE holds, to be taken before the run moves the jobs on; `following_tokens` is the length of every
    sample that is still to come, by job."""
    return {
        "limits": asdict(limits),
        "jobs": [
            {
                "spec": asdict(job.spec),
                "following_tokens": following_tokens[job.spec.id],
                "view": job.view()._asdict(),
                "progress": {name: getattr(job, name) for name in _PROGRESS},
            }
            for job in jobs
            if not job.finished
        ],
        "predictor": to_plain(predictor),
    }


def write_rerun(folder: Path, plain: Mapping[str, Any]) -> None:
    """Write FILE, of `rerun_of`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(plain), encoding="utf-8")


def read_rerun(run: Run) -> Rerun:
    """ValueError when the run was not written by `coserve bench`."""
    path = run.folder / FILE
    if run.summary.get("source") != "engine":
        raise ValueError(
            f"{run.folder} is not a run of the engine: its source is {run.summary.get('source')}"
        )
    plain = read_object(path, "an older run; coserve bench writes it")
    missing = [key for key in ("limits", "jobs", "predictor") if key not in plain]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; coserve bench writes it")
    with config_of(run) as config:
        slos = slos_of(config)
        workload = build(None, config.workload, "workload").build(seed_of(config), tuple(slos))
        drain_s = check(config.run.drain_s, float, "run.drain_s")
        horizon = Horizon(duration_s=workload.duration_s, drain_s=drain_s)
    with taken_apart(path, "coserve bench"), keys_as({"": f"{path}: "}):
        limits: Limits = build(Limits, plain["limits"], "limits")
        predictor = from_plain(plain["predictor"])
        jobs = check(plain["jobs"], list[dict[str, Any]], "jobs")
        for n, job in enumerate(jobs):
            _job(job, f"jobs[{n}]")
    return Rerun(
        run=run,
        limits=limits,
        predictor=predictor,
        slos=slos,
        workload=workload,
        horizon=horizon,
        _config=config,
        _jobs=jobs,
    )


@contextmanager
def config_of(run: Run) -> Iterator[DictConfig]:
    """The run's config, to build from it; what is wrong inside is a ValueError that begins with its file."""
    try:
        for group in GROUPS:
            if not isinstance(run.config.get(group), dict):
                raise ValueError(f"{group} must be a group of keys, got {run.config.get(group)!r}")
        yield OmegaConf.create(run.config)
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{run.folder / CONFIG}: {message(error)}") from error


def replay(rerun: Rerun) -> Recorder:
    """The loop under the recorded times; it ends early where it asks for more than were recorded."""
    policy, recorder = rerun.policy(), Recorder()
    state = PipelineState(limits=rerun.limits, slos=rerun.slos, recorder=recorder, jobs=rerun.jobs())
    arrivals: Arrivals = rerun.workload.arrivals() if policy.serves else NoArrivals()
    loop = run_loop(state, policy, arrivals, rerun.horizon)
    rows = rerun.run.table("iterations")
    _answer(loop, rows["start_s"].tolist(), rows["end_s"].tolist())
    return recorder


def simulate(rerun: Rerun, world: CostModel) -> Recorder:
    """The same pipeline in the simulator, where `world` says how long an iteration takes."""
    recorder = Recorder()
    spec = PipelineSpec(
        policy=rerun.policy(),
        world=world,
        predictor=rerun.predictor,
        limits=rerun.limits,
        jobs=tuple(rerun.jobs()),
    )
    simulate_cluster(
        pipelines=[spec],
        arrivals=rerun.workload.arrivals(),
        router=LeastTokens(),
        slos=rerun.slos,
        horizon=rerun.horizon,
        recorder=recorder,
    )
    return recorder


def same_plans(recorded: Mapping[str, Any], again: Recorder) -> NDArray[np.bool_]:
    """For each recorded iteration, whether the one with its number is the same in `again`."""
    rows = again.iterations.arrays()
    count = len(recorded["iteration"])
    same = np.zeros(count, dtype=bool)
    both = min(count, len(again.iterations))
    own = np.column_stack([np.asarray(recorded[name], np.float64)[:both] for name in COMPARED])
    other = np.column_stack([rows[name][:both] for name in COMPARED])
    same[:both] = ((own == other) | (np.isnan(own) & np.isnan(other))).all(axis=1)
    return same


def _answer(loop: Generator[Command, Done, None], start_s: Sequence[float], end_s: Sequence[float]) -> None:
    """Every wait gets the next recorded end, every sleep the next start."""
    executed = waited = 0
    reply: Done | None = None
    while True:
        try:
            command = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            return
        if isinstance(command, Execute):
            executed += 1
            reply = Done(0.0)
        elif isinstance(command, Sleep):
            # A sleep on the wall clock ends a little after its time; where the plans part, at its time.
            recorded_s = start_s[executed] if executed < len(start_s) else command.until_s
            reply = Done(max(recorded_s, command.until_s))
        elif waited < len(end_s):
            reply = Done(end_s[waited])
            waited += 1
        else:
            return


def _job(plain: Mapping[str, Any], where: str) -> Job:
    view: JobView = build(JobView, plain["view"], f"{where}.view")
    following_tokens = check(plain["following_tokens"], int, f"{where}.following_tokens")
    spec: JobSpec = build(JobSpec, plain["spec"], f"{where}.spec")
    job = Job(spec, chain([view.sample_tokens], repeat(following_tokens)))
    job.stand(view, **check(plain["progress"], dict[str, int], f"{where}.progress"))
    return job
