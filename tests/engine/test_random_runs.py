"""What runs together comes out as if alone: random jobs, requests, limits, compile plans and policies in the same
iterations. Every job trains as if it were alone and cut nowhere, and every request gets the tokens that it gets alone,
on the version of its adapter that was published when it started.

`python -m tests.engine.test_random_runs FIRST COUNT` tries other seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.finetune import StepResult, Trainer
from engine.lora import Adapter
from engine.model import Model
from sim.core.plan import Plan
from tests.engine.mixtures import Mixture, mixture, try_seeds
from tests.engine.test_finetune_gradients import Splits
from tests.engine.tiny import EngineRun, JobSetup, tiny_model
from tests.support import build_policy, limits_of

WHOLE = Splits([1000], [1000])


class Versions:
    """Watches an engine: every version of every job's adapter, and on which one each request started."""

    def __init__(self) -> None:
        self.adapters: dict[str, list[Adapter]] = {}
        self.of_request: dict[int, int] = {}

    def __call__(self, engine: Engine) -> None:
        for name, trainer in engine.trainers.items():
            self.adapters[name] = [copied(trainer.masters)]
            trainer.step = self._step(name, trainer)  # type: ignore[method-assign]
        launch = engine.launch

        def launched(plan: Plan) -> None:
            for id, _ in plan.prefills:
                name = engine._live[id].adapter
                published = sum(step.job == name for step in engine.steps)
                self.of_request.setdefault(id, published)
            launch(plan)

        engine.launch = launched  # type: ignore[method-assign]

    def _step(self, name: str, trainer: Trainer) -> Any:
        step = trainer.step

        def stepped() -> StepResult:
            result = step()
            self.adapters[name].append(copied(trainer.masters))
            return result

        return stepped


def copied(adapter: Adapter) -> Adapter:
    a, b = ({t: half[t].clone() for t in adapter.targets} for half in (adapter.a, adapter.b))
    return replace(adapter, a=a, b=b)


def together(mixed: Mixture, model: Model, watch: Callable[[Engine], None]) -> EngineRun:
    return EngineRun(
        model,
        mixed.policy(),
        mixed.limits,
        mixed.prompts,
        adapters=mixed.adapters,
        jobs=mixed.jobs,
        watch=watch,
        keep_logits=False,
    )


def assert_trained_alone(run: EngineRun, job: JobSetup, model: Model, steps: int | None = None) -> None:
    """The job's steps, and its adapter after the first `steps` of them (None: all), are those of a run of its own,
    which keeps and cuts as little as can be."""
    plain = replace(job, plan=None, start_s=0.0)
    if steps is not None:
        plain.samples = [*job.samples][: steps * job.accumulation]
    alone = EngineRun(model, WHOLE, limits_of(), {}, jobs=[plain])
    own = [(r.step, r.loss, r.grad_norm) for r in run.engine.steps if r.job == job.id]
    expected = [(r.step, r.loss, r.grad_norm) for r in alone.engine.steps]
    assert len(own) == len(expected) == -(-len([*plain.samples]) // job.accumulation)
    for mine, other in zip(own, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-8), job.id
    trained = run.engine.trainers[job.id].masters.tensors()
    for tensor, wanted in zip(trained, alone.engine.trainers[job.id].masters.tensors(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=1e-8)


def served_alone(mixed: Mixture, model: Model, versions: Versions, id: int) -> list[int]:
    """A request's tokens without anybody else."""
    request, prompt, sampling = mixed.prompts[id]
    adapters = dict(mixed.adapters)
    if request.adapter in versions.adapters:
        adapters[request.adapter] = versions.adapters[request.adapter][versions.of_request[id]]
    single = {id: (request._replace(arrival_s=0.0), prompt, sampling)}
    limits = limits_of(max_sequence_tokens=min(1024, mixed.limits.kv_tokens))
    policy = build_policy("inference_only")
    return EngineRun(model, policy, limits, single, adapters=adapters, keep_logits=False).tokens[id]


def check(seed: int) -> None:
    mixed, versions = mixture(seed), Versions()
    model = tiny_model(mixed.family, torch.float64, **mixed.changes)
    run = together(mixed, model, versions)
    for job in mixed.jobs:
        assert_trained_alone(run, job, model)
    for id in mixed.prompts:
        assert run.tokens[id] == served_alone(mixed, model, versions, id), id


@pytest.mark.parametrize("seed", range(4))
def test_what_runs_together_comes_out_as_if_alone(seed: int) -> None:
    check(seed)


if __name__ == "__main__":
    try_seeds(check)
