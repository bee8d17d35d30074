"""Runs that nobody thought of: random jobs, requests, limits and policies in the same iterations. Every job trains as
if it were alone and cut nowhere, and every request gets the tokens that it gets alone.

`python -m tests.engine.test_random_runs FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from engine.lora import Adapter
from engine.optimizer import OptimizerSettings
from engine.sampling import Sampling
from sim.core.request import Request
from tests.engine.test_finetune_gradients import ALL, MODES, Splits
from tests.engine.tiny import CONFIGS, EngineRun, JobSetup, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import LinearCost, build_policy, limits_of

POLICIES = (
    "coserving",
    "coserving_slack",
    "coserving_static",
    "temporal",
    "temporal_limited",
    "spatial_limited",
)
WHOLE = Splits([1000], [1000])
FIXED = ("wide", "narrow")


class Scenario(NamedTuple):
    """What runs together."""

    family: str
    jobs: Sequence[JobSetup]
    adapters: dict[str, Adapter]
    prompts: dict[int, tuple[Request, list[int], Sampling]]
    limits: Any
    policy: Any


def scenario(seed: int) -> Scenario:
    random = np.random.default_rng(seed)

    def some(*choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    family = some(*CONFIGS)
    jobs = [_job(f"job{n}", family, random) for n in range(int(random.integers(1, 4)))]
    adapters = {
        name: adapter_of(family, int(random.integers(1, 9)), _targets(random), seed=seed + n)
        for n, name in enumerate(FIXED)
    }
    names = (None, *FIXED, *(job.id for job in jobs))
    prompts = {}
    for id in range(int(random.integers(0, 9))):
        length, outputs = int(random.integers(1, 40)), int(random.integers(1, 15))
        sampling = some(
            Sampling(),
            Sampling(temperature=0.9, seed=id),
            Sampling(temperature=1.5, top_k=9, top_p=0.8, seed=id),
        )
        sampling = replace(sampling, stop_tokens=some((), (5, 17, 40)))
        request = Request(id, float(random.uniform(0, 0.1)), length, outputs, "default", some(*names))
        prompts[id] = (request, tokens_of(length, seed=id), sampling)
    ordered = dict(sorted(prompts.items(), key=lambda item: item[1][0].arrival_s))
    limits = limits_of(
        block_tokens=some(4, 16),
        kv_tokens=some(64, 128, 4096),
        max_tokens=some(16, 48),
        max_sequences=some(3, 8),
        lookahead=some(0, 1),
    )
    if random.random() < 0.5:
        sizes = [[int(n) for n in random.integers(1, 14, 3)] for _ in "fb"]
        policy: Any = Splits(*sizes)
        limits = replace(limits, kv_tokens=4096, max_sequences=8)  # it preempts nothing
    else:
        predictor = LinearCost(forward_s=2.0**-10, backward_s=2.0**-11, optimizer_s=0.0)
        policy = build_policy(some(*POLICIES), predictor=predictor, budget_s=0.03)
    return Scenario(family, jobs, adapters, ordered, limits, policy)


def _job(name: str, family: str, random: np.random.Generator) -> JobSetup:
    order, memory = MODES[int(random.integers(len(MODES)))]
    adapter = adapter_of(family, int(random.integers(1, 9)), _targets(random), seed=int(random.integers(99)))
    return JobSetup(
        id=name,
        samples=[
            sample_of(int(random.integers(2, 40)), seed=int(random.integers(99)))
            for _ in range(int(random.integers(1, 6)))
        ],
        adapter=replace(
            adapter, dropout=float(random.choice([0.0, 0.3])), rslora=bool(random.random() < 0.3)
        ),
        optimizer=OptimizerSettings(
            learning_rate=1e-2, weight_decay=0.01, schedule="linear", warmup_steps=1, total_steps=9
        ),
        accumulation=int(random.integers(1, 4)),
        order=order,
        memory=memory,
        max_tokens=40,
        seed=int(random.integers(99)),
    )


def _targets(random: np.random.Generator) -> list[str]:
    return [str(t) for t in random.permutation(ALL)[: int(random.integers(1, 8))]]


def check(seed: int) -> None:
    family, jobs, adapters, prompts, limits, policy = scenario(seed)
    model = tiny_model(family, torch.float64)
    together = EngineRun(model, policy, limits, prompts, adapters=adapters, jobs=jobs)
    for job in jobs:
        alone = EngineRun(model, WHOLE, limits_of(), {}, jobs=[job])
        own = [(r.step, r.loss, r.grad_norm) for r in together.engine.steps if r.job == job.id]
        expected = [(r.step, r.loss, r.grad_norm) for r in alone.engine.steps]
        assert len(own) == len(expected) == -(-len(list(job.samples)) // job.accumulation)
        for mine, other in zip(own, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-8), (seed, job)
        trained = together.engine.trainers[job.id].masters.tensors()
        for tensor, wanted in zip(trained, alone.engine.trainers[job.id].masters.tensors(), strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-10)
    for id, (request, prompt, sampling) in prompts.items():
        if request.adapter is not None and request.adapter not in adapters:
            continue  # its adapter changes as it runs
        single = {id: (request._replace(arrival_s=0.0), prompt, sampling)}
        served = EngineRun(model, build_policy("inference_only"), limits_of(), single, adapters=adapters)
        assert together.tokens[id] == served.tokens[id], (seed, id)


@pytest.mark.parametrize("seed", range(6))
def test_what_runs_together_comes_out_as_if_alone(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    for number in range(first, first + count):
        try:
            check(number)
        except Exception as error:
            print(f"seed {number}: {type(error).__name__}: {str(error)[:600]}", flush=True)
