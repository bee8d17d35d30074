"""What is measured on the machine at hand before a run: a predictor, and the peak of finetuning.

The predictor is a table of the beginning of the design, timed for some seconds.

It is what `coserve profile collect` does at length and with more repeats of a point; `coserve bench predictor=FILE`
takes such a profile instead and needs no time for this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from engine.assemble import TrainingJob, assemble_engine
from engine.design import design
from engine.driver import Driver, GivenArrivals, WallClock
from engine.engine import Engine
from engine.machine import release
from engine.model import Model
from engine.rig import Rig
from sim.core.finetune import Job
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.rows import WORK_COLUMNS, Recorder, work_row
from sim.core.state import PipelineState
from sim.cost.fitted import FittedCost
from sim.cost.table import timed_table

LEAST_ROWS = 60
LONGER = 10
"""Times as long as asked for, if it takes that to get the least rows: kernels are still compiled now and then, and
machines are busy."""
FIRST_USES = 40
"""Points before time counts."""


def measure(
    model: Model,
    limits: Limits,
    jobs: Sequence[TrainingJob],
    seconds: float,
    assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine,
) -> FittedCost:
    """Time points for `seconds`, or for as long as the least of them take, and fit a table. `jobs` are used up;
    their adapters are thrown away.

    `assemble` makes the engine, as `assemble_engine` does. Raises ValueError when the time was too short for
    enough points.
    """
    rig = Rig(model, limits, jobs, assemble=assemble)
    _meet_kernels(model, rig)
    # Of two repeats one is without a kernel's first use.
    repeats = 2 if model.device.type == "cuda" else 1
    works: list[tuple[float, ...]] = []
    times: list[tuple[float, float, float]] = []
    started_s = time.perf_counter()
    for point in design(rig.space):
        passed_s = time.perf_counter() - started_s
        if passed_s > seconds and (len(works) >= LEAST_ROWS or passed_s > LONGER * seconds):
            break
        timed = rig.time(point, repeats, ahead=limits.lookahead == 1, warm_ups=repeats - 1)
        best = int(np.argmin(timed.seconds))
        works.append(work_row(timed.work))
        times.append((float(timed.seconds[best]), float(timed.host_s[best]), timed.ahead_s))
    if len(works) < LEAST_ROWS:
        raise ValueError(
            f"measure_s must allow {LEAST_ROWS} points, {LONGER} times {seconds} gave {len(works)}"
        )
    flat = np.array(works, dtype=np.float64)
    columns = {name: np.ascontiguousarray(flat[:, i]) for i, name in enumerate(WORK_COLUMNS)}
    taken_s, host_s, ahead_s = np.array(times).T
    return timed_table(columns, taken_s, host_s, ahead_s, limits.lookahead).model()


def first_uses(
    model: Model,
    limits: Limits,
    jobs: Sequence[TrainingJob],
    assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine,
) -> None:
    """What `measure` does besides, where a profile is given instead: on a GPU, kernels are compiled."""
    if model.device.type == "cuda":
        release()
        _meet_kernels(model, Rig(model, limits, jobs, assemble=assemble))


def _meet_kernels(model: Model, rig: Rig) -> None:
    """On a GPU a new variant of a kernel is compiled at its first use: meet most of them, before time counts."""
    for point in islice(design(rig.space), FIRST_USES if model.device.type == "cuda" else 0):
        rig.time(point, repeats=1, warm_ups=0)


def finetune_peak_tok_s(
    model: Model,
    limits: Limits,
    training: Sequence[TrainingJob],
    policy: Policy,
    seconds: float,
    assemble: Callable[..., tuple[Engine, list[Job]]] = assemble_engine,
) -> float:
    """Trained tokens per second of jobs alone under `policy`, between its first and its last optimizer step.

    Raises ValueError when the time was too short for two steps.
    """
    least = replace(limits, kv_tokens=limits.block_tokens)
    engine, jobs = assemble(model, least, training)
    recorder = Recorder()
    state = PipelineState(limits=least, slos={}, recorder=recorder, jobs=jobs)
    loop = run_loop(state, policy, GivenArrivals(), Horizon(duration_s=seconds, drain_s=0.0))
    Driver(engine, WallClock()).run(loop)
    steps = recorder.steps.arrays()
    if len(steps["end_s"]) < 2:
        raise ValueError(f"peak_s must allow 2 optimizer steps, {seconds} gave {len(steps['end_s'])}")
    return float(steps["tokens"][1:].sum() / (steps["end_s"][-1] - steps["end_s"][0]))
