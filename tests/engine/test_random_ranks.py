"""A random mixture on two and four processes is the mixture on one: plans, tokens, losses, gradients, adapters and
optimizer states, wherever the jobs' compile plans place the bypasses and whatever they keep.

`python -m tests.engine.test_random_ranks FIRST COUNT [TP]` tries other seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.engine import Engine, StepRecord
from engine.replica import Replica, replica
from engine.saver import Frozen
from tests.engine.mixtures import Mixture, drawn_plan, mixture, try_seeds
from tests.engine.test_tensor_parallel import RanksRun, error, model_on


@pytest.fixture(scope="module")
def ranks() -> Iterator[Replica]:
    threads = torch.get_num_threads()
    with replica(2, "cpu") as started:
        yield started
    torch.set_num_threads(threads)


class Steps:
    """Watches an engine: every job's adapter and optimizer state after each of its steps."""

    def __init__(self) -> None:
        self.found: list[tuple[StepRecord, Frozen]] = []

    def __call__(self, engine: Engine) -> None:
        engine.on_step = lambda record: self.found.append((record, Frozen(engine, record.job)))


def run(ranks: Replica | None, mixed: Mixture, steps: Steps) -> RanksRun:
    return RanksRun(
        ranks,
        model_on(ranks, mixed.family, torch.float64, mixed.changes),
        mixed.policy(),
        mixed.limits,
        mixed.prompts,
        adapters=mixed.adapters,
        jobs=mixed.jobs,
        watch=steps,
    )


def placed(mixed: Mixture, random: np.random.Generator, tp: int) -> Mixture:
    """The same with plans of so many ranks, each bypass placed at random."""
    block = mixed.limits.block_tokens
    jobs = [
        replace(job, plan=drawn_plan(job, mixed.family, mixed.changes, block, random, tp))
        for job in mixed.jobs
    ]
    return mixed._replace(jobs=jobs)


def check(ranks: Replica, seed: int) -> None:
    mixed, steps, others = mixture(seed), Steps(), Steps()
    own = run(ranks, placed(mixed, np.random.default_rng((seed, 2)), ranks.group.size), steps)
    alone = run(None, mixed, others)
    assert own.policy.plans == alone.policy.plans
    assert own.tokens == alone.tokens
    for id, rows in alone.logits.items():
        if rows:
            assert error(torch.stack(own.logits[id]), torch.stack(rows)) < 1e-6
    for (step, mine), (other, theirs) in zip(steps.found, others.found, strict=True):
        assert step[:2] == other[:2]
        assert step[2:] == pytest.approx(other[2:], rel=1e-8)
        adapters = (frozen.adapter(step.job).tensors() for frozen in (mine, theirs))
        for tensor, wanted in zip(*adapters, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-8)
        states = (frozen.optimizer_state(step.job)["state"] for frozen in (mine, theirs))
        for values, expected in zip(*(state.values() for state in states), strict=True):
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_a_mixture_on_ranks_is_the_mixture_on_one(ranks: Replica, seed: int) -> None:
    check(ranks, seed)


if __name__ == "__main__":
    tp = int(sys.argv.pop()) if len(sys.argv) > 3 else 2
    with replica(tp, "cpu") as started:
        try_seeds(lambda seed: check(started, seed))
