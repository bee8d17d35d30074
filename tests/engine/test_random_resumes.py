"""A mixture that is thrown away at any iteration: each of its jobs goes on from its own last checkpoint, beside others
and cut otherwise, and comes to the adapter of a job that was never stopped.

`python -m tests.engine.test_random_resumes FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import Progress, checkpoints, read_progress, restore, save_checkpoint
from engine.engine import Engine, StepRecord
from engine.lora import read_adapter
from sim.core.plan import Plan
from tests.engine.mixtures import mixture, try_seeds
from tests.engine.test_random_runs import WHOLE, together
from tests.engine.tiny import EngineRun, JobSetup, config_of, tiny_model
from tests.support import limits_of


class Thrown(Exception):
    """A run ends here."""


class Saving:
    """Watches an engine: writes checkpoints of some steps, goes on from the last, and may end it all."""

    def __init__(self, folder: Path, every: int, most: int) -> None:
        self._folder, self._every, self._most = folder, every, most

    def __call__(self, engine: Engine) -> None:
        for job in engine.trainers:
            for found in checkpoints(self._folder / job)[:1]:
                restore(found, engine, job)

        def on_step(record: StepRecord) -> None:
            if record.step % self._every == 0:
                progress = Progress(step=record.step, samples=record.step, settings={})
                save_checkpoint(self._folder / record.job, engine, record.job, progress, None)

        engine.on_step = on_step
        launch = engine.launch

        def launched(plan: Plan) -> None:
            if self._most == 0:
                raise Thrown
            self._most -= 1
            launch(plan)

        engine.launch = launched  # type: ignore[method-assign]


def left_of(job: JobSetup, folder: Path, shape: Any) -> JobSetup:
    """The job from its last checkpoint on."""
    for found in checkpoints(folder / job.id)[:1]:
        done = read_progress(found).step * job.accumulation
        adapter = read_adapter(found, shape)
        return replace(job, adapter=adapter, samples=[*job.samples][done:], start_s=0.0)
    return job


def check(seed: int) -> None:
    random, mixed = np.random.default_rng((seed, 3)), mixture(seed)
    model = tiny_model(mixed.family, torch.float64, **mixed.changes)
    shape = config_of(mixed.family, **mixed.changes).shape
    every = int(random.integers(1, 3))
    with TemporaryDirectory() as name:
        folder, run = Path(name), None
        for most in (*random.integers(2, 40, 3).tolist(), -1):
            jobs = [left_of(job, folder, shape) for job in mixed.jobs]
            with suppress(Thrown):
                run = together(mixed._replace(jobs=jobs), model, Saving(folder, every, most))
                break
        assert run is not None
        for job in mixed.jobs:
            plain = replace(job, plan=None, start_s=0.0)
            alone = EngineRun(model, WHOLE, limits_of(), {}, jobs=[plain]).engine
            assert run.engine.trainers[job.id].optimizer.steps == len(alone.steps)
            for step in run.engine.steps:
                if step.job == job.id:
                    assert step[1:] == pytest.approx(alone.steps[step.step - 1][1:], rel=1e-8)
            trained = (engine.adapter(job.id).tensors() for engine in (run.engine, alone))
            for tensor, wanted in zip(*trained, strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_jobs_that_are_thrown_away_go_on_as_if_nothing_had_happened(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
