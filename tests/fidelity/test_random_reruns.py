"""Runs of one pipeline whose clock is as imprecise as a wall clock's, written as the engine writes them: replayed they
are the same to the last row, and simulated in the same world too where the clock was exact.

`python -m tests.fidelity.test_random_reruns FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from sim.assemble import Assembly, assemble
from sim.core.cost import CostModel
from sim.core.finetune import Job
from sim.core.loop import Command, Done, Execute, Horizon, Sleep, run_loop
from sim.core.plan import Policy
from sim.core.rows import Recorder, Table
from sim.core.state import PipelineState
from sim.cost.iteration import IterationCost
from sim.cost.noisy import NoisyCost
from sim.metrics import summarize
from sim.policy_node import policy_of
from sim.rerun import read_rerun, replay, rerun_of, same_plans, simulate, write_rerun
from sim.results import make_manifest, read_run, write_run
from tests.engine.mixtures import try_seeds
from tests.programs.test_random_simulations import Drawn, Refused, simulated

TABLES = ("requests", "iterations", "steps", "ticks", "segments")


class Drives:
    """Runs loops on a clock that is late by up to `late_s`."""

    def __init__(self, world: CostModel, late_s: float, random: np.random.Generator) -> None:
        self._world, self._late_s, self._random = world, late_s, random

    def run(self, loop: Generator[Command, Done, None]) -> None:
        now_s, free_s, reply = 0.0, -math.inf, None
        ends_s: deque[float] = deque()
        while True:
            try:
                command = loop.send(reply)  # type: ignore[arg-type]
            except StopIteration:
                return
            if isinstance(command, Execute):
                free_s = max(free_s, now_s) + self._world.iteration_s(command.work)
                ends_s.append(free_s)
                reply = Done(0.0)
                continue
            due_s = command.until_s if isinstance(command, Sleep) else ends_s.popleft()
            now_s = max(now_s, due_s) + self._late_s * float(self._random.random())
            reply = Done(now_s)


@dataclass
class Setting:
    """What is drawn, and built anew for each run."""

    config: dict[str, Any]
    assembly: Assembly
    predictor: IterationCost
    world: IterationCost
    seed: int

    def policy(self) -> Policy:
        node = {key: value for key, value in self.config["policy"].items() if key != "name"}
        return policy_of(node, self.predictor, self.assembly.slos)

    def noisy(self) -> CostModel:
        return NoisyCost(self.world, 0.1, (self.seed, 1))

    def run(self, jobs: list[Job], horizon: Horizon, drives: Drives) -> Recorder:
        recorder, limits = Recorder(), self.assembly.pipelines[0].limits
        state = PipelineState(limits=limits, slos=self.assembly.slos, recorder=recorder, jobs=jobs)
        drives.run(run_loop(state, self.policy(), self.assembly.workload.arrivals(), horizon))
        return recorder


def setting_of(seed: int, folder: Path) -> Setting:
    for attempt in itertools.count():
        drawn = Drawn(1000 * seed + attempt, folder)
        drawn.cluster = ["cluster=single"]
        try:
            config = simulated(folder / f"drawn{attempt}", *drawn.overrides).config
        except Refused:
            assert attempt < 20
            continue
        assembly = assemble(OmegaConf.create(config))
        (spec,) = assembly.pipelines
        if spec.policy.serves:
            predictor, world = (inmost(cost) for cost in (spec.predictor, spec.world))
            return Setting(config, assembly, predictor, world, seed)
    raise AssertionError


def inmost(cost: Any) -> IterationCost:
    """Without factors and noise."""
    while not isinstance(cost, IterationCost):
        cost = cost.inner
    return cost


def check(seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting, random = setting_of(seed, folder), np.random.default_rng((seed, 3))
        (spec,) = setting.assembly.pipelines
        lengths = {job.spec.id: int(random.integers(1, 400)) for job in spec.jobs}
        jobs = [Job(job.spec, repeat(lengths[job.spec.id])) for job in spec.jobs]
        late_s = float(random.choice([0.0, 1e-4, 1e-2]))
        horizon = setting.assembly.horizon
        if random.random() < 0.5:
            warm_up = Horizon(duration_s=float(random.uniform(0.1, 2)), drain_s=0.0)
            setting.run(jobs, warm_up, Drives(setting.noisy(), late_s, random))
        plain = rerun_of(spec.limits, jobs, lengths, setting.predictor)
        recorder = setting.run(jobs, horizon, Drives(setting.noisy(), late_s, random))
        run = folder / "run"
        summary = summarize(recorder, slos=setting.assembly.slos, duration_s=horizon.duration_s)
        config = setting.config | {"job": {}}
        manifest = make_manifest(seed=seed, device="cpu", wall_s=0.0, command=["a test"])
        write_run(run, recorder, summary, config=config, manifest=manifest, source="engine")
        write_rerun(run, plain)

        rerun = read_rerun(read_run(run))
        again = replay(rerun)
        assert same_plans(rerun.run.table("iterations"), again).all()
        assert_equal(recorder, again)
        if late_s == 0.0:
            assert_equal(recorder, simulate(rerun, setting.noisy()))


def assert_equal(one: Recorder, other: Recorder) -> None:
    """But for ids: of requests that were refused while nothing ran, a replay learns when the next iteration starts."""
    for name in TABLES:
        left, right = (rows_of(getattr(recorder, name)) for recorder in (one, other))
        np.testing.assert_array_equal(left, right, err_msg=name)


def rows_of(table: Table) -> np.ndarray:
    """Without the column `request`, in order of the columns."""
    columns = [values for key, values in table.arrays().items() if key != "request"]
    return np.column_stack(columns)[np.lexsort(columns)]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_again_is_the_run(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
