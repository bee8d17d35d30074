"""The engine under failure: a spoilt job, blocks that run out, clients that go. No request is ever lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.bench import main as bench
from engine.engine import StepRecord
from engine.optimizer import OptimizerSettings
from engine.sampling import Sampling
from sim.core.plan import Plan
from sim.core.request import Request
from sim.core.rows import Outcome
from sim.core.state import PipelineState
from sim.results import read_run
from tests.engine.tiny import EngineRun, JobSetup, adapter_of, sample_of, tiny_model, tokens_of
from tests.support import LinearCost, build_policy, limits_of

WORLD = LinearCost(forward_s=2.0**-11, backward_s=2.0**-12, context_s=2.0**-16, optimizer_s=2.0**-24)


def served(count: int, adapters: tuple[str | None, ...] = (None,), output: int = 12) -> dict[int, Any]:
    found = {}
    for id in range(count):
        prompt = tokens_of(5 + (id * 13) % 30, seed=id)
        request = Request(id, 0.02 * id, len(prompt), output, "default", adapters[id % len(adapters)])
        found[id] = (request, prompt, Sampling())
    return found


def jobs_of(**changes: Any) -> list[JobSetup]:
    return [
        JobSetup(
            id=name,
            samples=[sample_of(9 + 4 * n, seed=seed + n) for n in range(8)],
            adapter=adapter_of("llama", 2, ("q_proj", "down_proj"), seed=seed),
            **(changes if name == "bad" else {}),
        )
        for seed, name in ((1, "bad"), (2, "good"))
    ]


class Spoilt(EngineRun):
    """Its job "bad" is spoilt right after its first step."""

    spoil: Callable[[Any], object]

    def _build(self, *given: Any) -> None:
        super()._build(*given)
        self.kept: list[torch.Tensor] = []

        def on_step(record: StepRecord) -> None:
            trainer = self.engine.trainers["bad"]
            if (record.job, record.step) == ("bad", 1):
                self.kept = [t.clone() for t in trainer.masters.tensors()]
                type(self).spoil(trainer)

        self.engine.on_step = on_step


SPOILS: dict[str, Callable[[Any], object]] = {
    "loss nan": lambda trainer: trainer._loss.fill_(float("nan")),
    "loss inf": lambda trainer: trainer._loss.fill_(float("inf")),
    "gradient norm nan": lambda trainer: trainer._grads.a["q_proj"][0, 0].fill_(float("nan")),
    "gradient norm inf": lambda trainer: trainer._grads.b["down_proj"].fill_(3e38),
}


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("kind", list(SPOILS))
def test_a_spoilt_job_is_given_up_and_all_else_goes_on(kind: str, lookahead: int) -> None:
    family, prompts = "llama", served(12, (None, "bad", "good"))
    limits = limits_of(block_tokens=4, max_tokens=32, lookahead=lookahead)

    def run(cls: type[EngineRun], traffic: dict[int, Any], jobs: list[JobSetup]) -> EngineRun:
        policy = build_policy("coserving", predictor=WORLD, budget_s=0.03)
        return cls(tiny_model(family), policy, limits, traffic, jobs=jobs, world=WORLD)

    spoilt = run(type("Run", (Spoilt,), {"spoil": staticmethod(SPOILS[kind])}), prompts, jobs_of())
    assert isinstance(spoilt, Spoilt)
    (failure,) = spoilt.engine.failures.values()
    assert (failure.job, failure.step) == ("bad", 2)
    assert "job bad: step 2 gave" in failure.failure and kind in failure.failure
    steps, names = spoilt.recorder.steps.arrays(), spoilt.recorder.jobs.names
    bad = steps["job"] == names.index("bad")
    assert steps["failed"][bad].tolist() == [0, 1] and not steps["failed"][~bad].any()

    # What is served under its name, and what would be written, is its last good version.
    engine, trainer = spoilt.engine, spoilt.engine.trainers["bad"]
    bank, slot = engine._bank, engine._versions["bad"]
    assert bank is not None
    for kept, now in zip(spoilt.kept, trainer.masters.tensors(), strict=True):
        assert torch.equal(kept, now)
    for target in trainer.masters.targets:
        rank = trainer.masters.rank
        (shelf,) = bank.shelves[target]
        assert torch.equal(shelf.a[:, slot, :rank], trainer.masters.a[target])
        assert torch.equal(shelf.b[:, slot, :, :rank], trainer.masters.b[target])

    outcomes = spoilt.recorder.requests.arrays()["outcome"]
    assert (outcomes == Outcome.FINISHED).all() and len(outcomes) == 12
    assert all(len(tokens) == 12 for tokens in spoilt.tokens.values())
    assert all(row.isfinite().all() for rows in spoilt.logits.values() for row in rows)
    sound = run(EngineRun, prompts, jobs_of())
    for id in range(0, 12, 3):
        assert spoilt.tokens[id] == sound.tokens[id], "requests of the base model"
    alone = run(EngineRun, {}, jobs_of()[1:])
    own = [record.loss for record in spoilt.engine.steps if record.job == "good"]
    assert own == pytest.approx([record.loss for record in alone.engine.steps], rel=1e-4) and len(own) == 4
    assert spoilt.engine.tables.free == sound.engine.tables.free
    # Held: one slot served and one trained on for each job, which may be the same.
    assert sum(bank._users) == 4


def test_weights_that_overflow_are_never_published() -> None:
    """Loss and gradient of the step are finite; what it makes of the weights is not."""
    sgd = OptimizerSettings(kind="sgd", learning_rate=3.4e38, schedule="constant", max_grad_norm=None)
    run = EngineRun(
        tiny_model("llama"), build_policy("finetune_only"), limits_of(), {}, jobs=jobs_of(optimizer=sgd)
    )
    failure = run.engine.failures["bad"]
    assert failure.step == 1 and np.isfinite([failure.loss, failure.grad_norm]).all()
    assert "weights that are not finite" in failure.failure
    before = jobs_of()[0].adapter.tensors()
    assert all(torch.equal(a, b) for a, b in zip(before, run.trainers[0].masters.tensors(), strict=True))
    assert [record.job for record in run.engine.steps] == ["good"] * 4


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_step_launched_meanwhile_by_a_failed_job_is_dropped(lookahead: int) -> None:
    """Of one sample each, steps come in successive iterations: with a lookahead the next is under way."""
    job = JobSetup(
        id="bad",
        samples=[sample_of(9, seed=n) for n in range(6)],
        adapter=adapter_of("llama", 2, ("q_proj", "down_proj")),
        accumulation=1,
    )
    limits = limits_of(lookahead=lookahead)
    cls = type("Run", (Spoilt,), {"spoil": staticmethod(SPOILS["loss nan"])})
    run = cls(tiny_model("llama"), build_policy("finetune_only"), limits, {}, jobs=[job])
    stepping = [any(type(s).__name__ == "Step" for s in plan.finetune) for plan in run.policy.plans]
    assert sum(stepping) == 2 + 2 * lookahead
    assert [record.step for record in run.engine.steps] == list(range(1, 2 + lookahead))
    assert list(run.engine.failures) == ["bad"]
    assert run.recorder.steps.arrays()["failed"].tolist() == [0] * (1 + lookahead) + [1]
    assert sum(run.engine._bank._users) == 2


def test_requests_survive_blocks_that_run_out_beside_finetuning() -> None:
    """A third of the blocks that the traffic needs: each request is served as if it were alone."""
    prompts = served(14, (None, "good"), output=24)

    def run(traffic: dict[int, Any], kv_tokens: int, jobs: list[JobSetup]) -> EngineRun:
        return EngineRun(
            tiny_model("llama"),
            build_policy("coserving", predictor=WORLD, budget_s=0.05),
            limits_of(block_tokens=4, kv_tokens=kv_tokens, max_tokens=32),
            traffic,
            jobs=jobs,
            adapters={} if jobs else {"good": jobs_of()[1].adapter},
            world=WORLD,
        )

    short = run(prompts, 96, jobs_of())
    rows = short.recorder.requests.arrays()
    assert (rows["outcome"] == Outcome.FINISHED).all() and len(rows["outcome"]) == 14
    assert rows["preemptions"].sum() > 5
    assert len(short.engine.steps) == 8
    for id in range(0, 14, 2):
        assert short.tokens[id] == run({id: prompts[id]}, 4096, []).tokens[id]
    assert short.engine.tables.free == 96 // 4


def stage(state: PipelineState, id: int) -> str:
    """Where request 5 stands."""
    sequence = state.running.get(id)
    if sequence is None:
        waiting = next((s for s in state.waiting if s.id == id), None)
        return "not here" if waiting is None else "preempted" if waiting.preemptions else "waiting"
    if sequence.decoding:
        return "decoding"
    return "prefilling" if 0 < sequence.computed_tokens < sequence.known_tokens else "starting"


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "preempted"])
def test_a_client_that_goes_gives_back_blocks_and_adapter(when: str, lookahead: int) -> None:
    prompts = served(8, ("good", None), output=24)
    prompts = {id: (r._replace(arrival_s=0.0), p, s) for id, (r, p, s) in prompts.items()}
    limits = limits_of(block_tokens=4, kv_tokens=96, max_sequences=6, max_tokens=8, lookahead=lookahead)

    class Run(EngineRun):
        gone: str | None = None

        def _launch(self, launch: Any) -> Any:
            inner = super()._launch(launch)

            def wrapped(plan: Plan) -> None:
                inner(plan)
                for id in (4, 2):
                    if self.gone is None and stage(self.state, id) == when:
                        self.gone = when
                        self.aborted = id
                        self.driver.abort(id)

            return wrapped

    def run(cls: type[EngineRun]) -> Any:
        policy = build_policy("coserving", predictor=WORLD, budget_s=0.05)
        return cls(tiny_model("llama"), policy, limits, prompts, jobs=jobs_of(), world=WORLD)

    left, whole = run(Run), run(EngineRun)
    assert left.gone == when
    rows = left.recorder.requests.arrays()
    by_id = dict(zip(rows["request"].tolist(), rows["outcome"].tolist(), strict=True))
    assert by_id.pop(left.aborted) == Outcome.ABORTED
    assert set(by_id.values()) == {Outcome.FINISHED} and len(by_id) == 7
    for id in range(1, 8, 2):
        assert left.tokens[id] == whole.tokens[id]
    (generated,) = rows["generated_tokens"][rows["outcome"] == Outcome.ABORTED]
    assert len(left.tokens[left.aborted]) == generated < 24
    assert left.engine.tables.free == 96 // 4 and not left.engine._live
    assert left.engine._bank is not None and sum(left.engine._bank._users) == 4


def test_a_bench_with_a_spoilt_job_serves_on_writes_everything_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["workload.duration_s=2", "run.drain_s=10", "measure_s=3", "job.sample_tokens=32"]
    short += ["policy=temporal", "policy.interval=4"]  # finetunes on the slowest machine
    spoilt = ["job.optimizer.kind=sgd", "job.optimizer.learning_rate=1.0e+37", "job.optimizer.warmup_steps=0"]
    assert bench([*short, *spoilt, "hydra.run.dir=out"]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1 and "error: job job: step 2 gave loss" in errors[0]
    assert "met %" in said.out, "the table is shown all the same"
    run = read_run("out")
    assert run.summary["jobs_failed"] == 1
    assert run.summary["finished"] == run.summary["requests"] > 2
    assert run.table("steps")["failed"].tolist() == [False, True]
    assert run.table("iterations")["decode_count"].gt(0).any()
    tensors = load_file("out/adapter/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
