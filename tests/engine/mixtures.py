"""Mixtures that nobody thought of: jobs, requests, limits and a policy, all drawn from one seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine.lora import Adapter
from engine.optimizer import OptimizerSettings
from engine.sampling import Sampling
from sim.compile import compiler
from sim.compile.bypass import Bypass
from sim.compile.compiler import Analysis
from sim.compile.parallel import Composition
from sim.compile.peft import PeftSpec
from sim.compile.plan import CompilePlan
from sim.core.plan import Limits, Policy
from sim.core.request import Request
from tests.engine.test_finetune_gradients import ALL, MODES
from tests.engine.tiny import CONFIGS, JobSetup, adapter_of, config_of, sample_of, tokens_of
from tests.engine.wild import Wild, one_of
from tests.support import LinearCost, build_policy, limits_of

POLICIES = (
    "coserving",
    "coserving_slack",
    "coserving_static",
    "spatial",
    "spatial_limited",
    "spatial_stream",
    "temporal",
    "temporal_dynamic",
    "temporal_limited",
)
CHANGES: dict[str, tuple[dict[str, int], ...]] = {"llama": ({},), "qwen2": ({}, {"kv_heads": 1, "vocab": 99})}
"""Of the models: one key and value head, and a vocabulary that nothing divides."""
FIXED = ("wide", "narrow")
"""Adapters that nothing trains."""
OPTIMIZERS = (
    OptimizerSettings(
        learning_rate=1e-2, weight_decay=0.01, schedule="linear", warmup_steps=1, total_steps=9
    ),
    OptimizerSettings(learning_rate=1e-2, schedule="constant", max_grad_norm=None),
    OptimizerSettings(kind="sgd", learning_rate=0.1, momentum=0.9, schedule="cosine", total_steps=7),
)
LONGEST = 40
Prompts = dict[int, tuple[Request, list[int], Sampling]]


class Mixture(NamedTuple):
    """What runs together."""

    family: str
    changes: dict[str, int]
    jobs: Sequence[JobSetup]
    adapters: Mapping[str, Adapter]
    prompts: Prompts
    limits: Limits
    policy: Callable[[], Policy]
    """A new one for every run."""


def mixture(seed: int, most_jobs: int = 3) -> Mixture:
    random = np.random.default_rng(seed)
    family = one_of(random, *CONFIGS)
    changes = one_of(random, *CHANGES[family])
    limits = limits_of(
        block_tokens=one_of(random, 1, 4, 16),
        kv_tokens=one_of(random, 64, 96, 4096),
        max_tokens=one_of(random, 16, 48),
        max_sequences=one_of(random, 3, 8),
        admission=one_of(random, "fcfs", "shortest"),
        lookahead=one_of(random, 0, 1),
    )
    count = int(random.integers(1, most_jobs + 1))
    jobs = [_job(f"job{n}", family, changes, limits, random) for n in range(count)]
    adapters = {
        name: adapter_of(family, int(random.integers(1, 9)), _targets(random), seed=seed + n, **changes)
        for n, name in enumerate(FIXED)
    }
    prompts = _prompts((None, *FIXED, *(job.id for job in jobs)), random)
    return Mixture(family, changes, jobs, adapters, prompts, limits, _policy(random))


def drawn_plan(
    job: JobSetup,
    family: str,
    changes: Mapping[str, int],
    block_tokens: int,
    random: np.random.Generator,
    tp: int = 1,
) -> CompilePlan:
    """Any point of the compiler's list in the job's order and mode, any legal placement of each bypass."""
    usual = compiler.compositions

    def price(bypass: Bypass, *given: Any) -> list[Composition]:
        return [one_of(random, *usual(bypass, *given))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compositions", price)
        analysis = Analysis(
            replace(config_of(family, **changes).shape, dtype_bytes=8),
            PeftSpec(
                targets=job.adapter.targets,
                rank=job.adapter.rank,
                alpha=job.adapter.alpha,
                rslora=job.adapter.rslora,
            ),
            seq_tokens=-(-job.max_tokens // block_tokens) * block_tokens,
            tp=tp,
            window_tokens=int(random.integers(1, 20)),
            loss_chunk_tokens=one_of(random, 1, 5, 64),
            accumulation=job.accumulation,
        )
    share = one_of(random, None, math.inf, *(p.extra_flops / analysis.step_flops for p in analysis.points))
    return analysis.plan(job.memory, share, job.order)


def _job(
    name: str,
    family: str,
    changes: Mapping[str, int],
    limits: Limits,
    random: np.random.Generator,
) -> JobSetup:
    order, memory = one_of(random, *MODES)
    rank, seed = int(random.integers(1, 9)), int(random.integers(99))
    rslora, scale = bool(random.random() < 0.3), one_of(random, 1.0, 2.0)
    # A scale that single precision holds, as banks do: what is run again takes the number itself.
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    lengths = random.integers(2, LONGEST, int(random.integers(1, 7))).tolist()
    job = JobSetup(
        id=name,
        samples=[
            sample_of(length, seed=int(random.integers(99)), ignored=one_of(random, 0, 0, length // 2))
            for length in lengths
        ],
        adapter=replace(
            adapter_of(family, rank, _targets(random), seed=seed, alpha=alpha, **changes),
            dropout=one_of(random, 0.0, 0.3),
            rslora=rslora,
        ),
        optimizer=one_of(random, *OPTIMIZERS),
        accumulation=int(random.integers(1, 4)),
        order=order,
        memory=memory,
        max_tokens=LONGEST,
        seed=seed,
        weight=one_of(random, 1.0, 3.0),
        start_s=one_of(random, 0.0, float(random.uniform(0, 0.1))),
    )
    if random.random() < 0.6:
        job.plan = drawn_plan(job, family, changes, limits.block_tokens, random)
    return job


def _targets(random: np.random.Generator) -> list[str]:
    return [str(t) for t in random.permutation(ALL)[: int(random.integers(1, 8))]]


def _prompts(names: Sequence[str | None], random: np.random.Generator) -> Prompts:
    prompts = {}
    for id in range(int(random.integers(0, 14))):
        length, outputs = int(random.integers(1, LONGEST)), int(random.integers(1, 15))
        sampling = one_of(
            random,
            Sampling(),
            Sampling(temperature=0.9, seed=id),
            Sampling(temperature=1.5, top_k=9, top_p=0.8, seed=id),
        )
        sampling = replace(sampling, stop_tokens=frozenset(one_of(random, (), (5, 17, 40))))
        request = Request(
            id, float(random.uniform(0, 0.1)), length, outputs, "default", one_of(random, *names)
        )
        prompts[id] = (request, tokens_of(length, seed=id), sampling)
    return dict(sorted(prompts.items(), key=lambda item: item[1][0].arrival_s))


def _policy(random: np.random.Generator) -> Callable[[], Policy]:
    seed = int(random.integers(1 << 30))
    if random.random() < 0.6:
        return lambda: Wild(seed)
    predictor = LinearCost(forward_s=2.0**-10, backward_s=2.0**-11, optimizer_s=0.0)
    name = one_of(random, *POLICIES)
    given = {"forward_tokens": 9} if name == "spatial_stream" else {}
    return lambda: build_policy(name, predictor=predictor, budget_s=0.03, **given)


def try_seeds(check: Callable[[int], object]) -> None:
    """The program: `python -m MODULE FIRST COUNT` says which of so many seeds fail."""
    first, count = map(int, sys.argv[1:])
    for seed in range(first, first + count):
        try:
            check(seed)
        except Exception as error:
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:600]}", flush=True)
