"""Gradients and training are those of peft and autograd on the whole sample, while requests are served."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from engine.dropout import Dropout, sample_key
from engine.finetune import Sample
from engine.lora import ATTENTION, Adapter, read_adapter, write_adapter
from engine.optimizer import OptimizerSettings
from engine.parallel import ALONE
from engine.sampling import Sampling
from sim.core.finetune import Backward, Forward, Slice, Step
from sim.core.plan import Plan, View
from sim.core.request import Request
from tests.engine.tiny import CONFIGS, EngineRun, JobSetup, adapter_of, sample_of, tiny_model, tokens_of, twin
from tests.support import LinearCost, build_policy, limits_of

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = [("layer_major", "stash"), ("window_major", "stash"), ("window_major", "recompute")]


class Splits:
    """Serves whatever runs, and cuts finetuning into the given window sizes, in turn.

    Backward sizes are in tokens of a window for window-major, in layer-tokens for layer-major.
    """

    serves = True

    def __init__(self, forward: Sequence[int], backward: Sequence[int]) -> None:
        self._forward = itertools.cycle(forward)
        self._backward = itertools.cycle(backward)

    def plan(self, view: View) -> Plan:
        prefills, free, left = [], view.free_blocks - view.growth_blocks, view.limits.max_tokens
        left -= view.decode_count
        for sequence in (*view.prefilling, *view.waiting):
            tokens = min(sequence.remaining_tokens, 7, left)
            blocks = -(-(sequence.computed_tokens + tokens) // view.limits.block_tokens)
            blocks -= -(-sequence.computed_tokens // view.limits.block_tokens)
            if tokens < 1 or blocks > free or view.running + len(prefills) >= view.limits.max_sequences:
                break
            prefills.append((sequence.id, tokens))
            free, left = free - blocks, left - tokens
        pieces: list[Slice] = []
        for job in view.jobs:
            if job.step_due:
                pieces.append(Step(job.id))
            elif job.forward_left:
                pieces.append(Forward(job.id, min(next(self._forward), job.forward_left)))
            else:
                unit = job.layers if job.order == "window_major" else 1
                pieces.append(Backward(job.id, min(next(self._backward) * unit, job.backward_left)))
        return Plan(decode=view.decode_count > 0, prefills=tuple(prefills), finetune=tuple(pieces))


def traffic(count: int = 4, adapters: Sequence[str | None] = (None,)) -> dict[int, Any]:
    found = {}
    for id in range(count):
        prompt = tokens_of(5 + 9 * id, seed=id)
        request = Request(id, 0.001 * id, len(prompt), 12, "default", adapters[id % len(adapters)])
        found[id] = (request, prompt, Sampling())
    return found


def peft_of(family: str, adapter: Adapter, dtype: torch.dtype, folder: Path) -> Any:
    """The same adapter on the same model in peft, trainable."""
    from peft import PeftModel

    write_adapter(adapter, folder)
    base = twin(family, dtype)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).to(dtype).train()


def summed_loss(model: Any, sample: Sample) -> torch.Tensor:
    logits = model(torch.from_numpy(sample.tokens).long()[None]).logits[0]
    return F.cross_entropy(logits[:-1], torch.from_numpy(sample.labels[1:]), reduction="sum")


def peft_grads(model: Any) -> Iterator[tuple[str, int, str, torch.Tensor]]:
    """(target, layer, A or B, gradient)"""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            kind = next(p for p in parts if p.startswith("lora_"))
            yield (
                parts[parts.index(kind) - 1],
                int(parts[parts.index("layers") + 1]),
                kind[-1],
                parameter.grad,
            )


def gradients(
    family: str,
    adapter: Adapter,
    dtype: torch.dtype,
    samples: Sequence[Sample],
    forward: Sequence[int],
    backward: Sequence[int],
    mode: tuple[str, str],
    seed: int = 0,
) -> tuple[EngineRun, Adapter]:
    """Gradients summed over `samples`, read when the step is due, with requests in the same batches."""
    taken: list[Adapter] = []

    class Watch(Splits):
        def plan(self, view: View) -> Plan:
            plan = super().plan(view)
            if plan.finetune and isinstance(plan.finetune[0], Step):
                grads = run_of[0].trainers[0]._grads
                taken.append(
                    Adapter(
                        rank=grads.rank,
                        alpha=grads.alpha,
                        a={k: v.clone() for k, v in grads.a.items()},
                        b={k: v.clone() for k, v in grads.b.items()},
                    )
                )
            return plan

    run_of: list[EngineRun] = []

    class Run(EngineRun):
        def _build(self, *given: Any) -> None:
            super()._build(*given)
            run_of.append(self)

    order, memory = mode
    job = JobSetup(
        samples=samples,
        adapter=adapter,
        accumulation=len(samples),
        order=order,
        memory=memory,
        max_tokens=48,
        seed=seed,
    )
    run = Run(
        tiny_model(family, dtype),
        Watch(forward, backward),
        limits_of(block_tokens=4, max_sequences=8, max_tokens=32),
        traffic(adapters=(None, "job")),
        jobs=[job],
    )
    (grads,) = taken
    return run, grads


SPLITS = [
    ([1000], [1000]),
    ([1], [1]),
    ([5, 1, 9], [3, 11, 2]),
    ([16], [7]),
]


@pytest.mark.parametrize(("forward", "backward"), SPLITS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_gradients_of_every_split_equal_autograd(
    family: str,
    mode: tuple[str, str],
    forward: list[int],
    backward: list[int],
    dtype: torch.dtype,
    tolerance: float,
    tmp_path: Path,
) -> None:
    adapter = adapter_of(family, 4, ALL)
    samples = [sample_of(37, seed=1, ignored=6), sample_of(10, seed=2)]
    run, grads = gradients(family, adapter, dtype, samples, forward, backward, mode)
    assert_equal_grads(family, adapter, dtype, samples, grads, tolerance, tmp_path)
    assert all(len(run.tokens[id]) == 12 for id in run.tokens), "requests shared the iterations"
    fused = [p for p in run.policy.plans if any(isinstance(s, Forward) for s in p.finetune) and p.prefills]
    assert fused, "a window and inference tokens were in one batch"


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize(
    "targets",
    [
        ("down_proj",),
        ("q_proj", "v_proj"),
        ATTENTION,
        ("gate_proj", "up_proj", "down_proj"),
        ("k_proj", "up_proj"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_gradients_of_every_subset_of_layers_equal_autograd(
    family: str, targets: tuple[str, ...], mode: tuple[str, str], tmp_path: Path
) -> None:
    # A rank whose scale, 8 / 2, is exact: the bank's scales are float32.
    adapter = adapter_of(family, 2, targets)
    samples = [sample_of(29, seed=3)]
    _, grads = gradients(family, adapter, torch.float64, samples, [8, 3], [6, 13], mode)
    assert set(grads.a) == set(targets)
    assert_equal_grads(family, adapter, torch.float64, samples, grads, 1e-9, tmp_path)


def assert_equal_grads(
    family: str,
    adapter: Adapter,
    dtype: torch.dtype,
    samples: Sequence[Sample],
    grads: Adapter,
    tolerance: float,
    folder: Path,
) -> None:
    """Relative to the largest gradient of each tensor."""
    expected_of = reference_grads(family, adapter, dtype, samples, folder)
    for (target, layer, kind), expected in expected_of.items():
        own = (grads.a if kind == "A" else grads.b)[target][layer]
        assert expected.abs().max() > 0
        error = (own - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (target, layer, kind, float(error))
    assert len(expected_of) == 2 * len(adapter.targets) * CONFIGS[family].shape.layers


class Masked(torch.nn.Module):
    """peft's dropout of one linear layer, with the engine's masks."""

    def __init__(self, target: str, layer: int) -> None:
        super().__init__()
        self.target, self.layer = target, layer
        self.dropout: Dropout | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.dropout is not None
        return x * self.dropout(torch.ones_like(x[0]), self.target, self.layer, 0)


@pytest.mark.parametrize(("forward", "backward"), SPLITS[:3:2], ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_gradients_with_dropout_equal_autograd_with_the_same_masks(
    family: str, mode: tuple[str, str], forward: list[int], backward: list[int], tmp_path: Path
) -> None:
    adapter = replace(adapter_of(family, 4, ALL), dropout=0.3)
    samples = [sample_of(37, seed=1, ignored=6), sample_of(10, seed=2)]
    _, grads = gradients(family, adapter, torch.float64, samples, forward, backward, mode, seed=5)

    model = peft_of(family, adapter, torch.float64, tmp_path)
    masked = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            assert module.lora_dropout["default"].p == 0.3, "as the written adapter says"
            parts = name.split(".")
            masked.append(Masked(parts[-1], int(parts[parts.index("layers") + 1])))
            module.lora_dropout["default"] = masked[-1]
    for index, sample in enumerate(samples):
        for module in masked:
            module.dropout = Dropout(0.3, sample_key(5, 0, index), ALL, ALONE)
        summed_loss(model, sample).backward()
    for target, layer, kind, expected in peft_grads(model):
        own = (grads.a if kind == "A" else grads.b)[target][layer]
        assert (own - expected).abs().max() < 1e-9 * expected.abs().max(), (target, layer, kind)


def test_every_sample_layer_and_step_has_masks_of_its_own() -> None:
    ones = torch.ones(4, 64)
    masks = [
        Dropout(0.5, sample_key(seed, step, sample), ALL, ALONE)(ones, target, layer, position)
        for seed, step, sample in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
        for target, layer, position in (
            ("q_proj", 0, 0),
            ("k_proj", 0, 0),
            ("q_proj", 1, 0),
            ("q_proj", 0, 4),
        )
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


REFERENCES: dict[Any, dict[tuple[str, int, str], torch.Tensor]] = {}
"""By what they depend on: no split, order or mode is among it."""


def reference_grads(
    family: str, adapter: Adapter, dtype: torch.dtype, samples: Sequence[Sample], folder: Path
) -> dict[tuple[str, int, str], torch.Tensor]:
    """Autograd's gradients of the summed loss of whole samples, through peft and transformers."""
    key = (family, dtype, adapter.targets, adapter.rank, tuple(len(s.tokens) for s in samples))
    if key not in REFERENCES:
        model = peft_of(family, adapter, dtype, folder)
        for sample in samples:
            summed_loss(model, sample).backward()
        REFERENCES[key] = {(target, layer, kind): grad for target, layer, kind, grad in peft_grads(model)}
    return REFERENCES[key]


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_fifty_steps_have_the_loss_curve_of_peft_while_serving(
    mode: tuple[str, str], schedule: str, tmp_path: Path
) -> None:
    """Same data order, AdamW, clipping, warmup and schedule; half of the requests use the job's adapter."""
    from transformers import get_scheduler

    family, steps = "llama", 50
    adapter = adapter_of(family, 4, ("q_proj", "v_proj", "down_proj"))
    samples = [sample_of(8 + 5 * (i % 5), seed=i % 7, ignored=i % 3) for i in range(2 * steps)]
    settings = OptimizerSettings(
        learning_rate=5e-3,
        weight_decay=0.01,
        schedule=schedule,
        warmup_steps=5,
        total_steps=None if schedule == "constant" else steps,
    )
    order, memory = mode
    job = JobSetup(samples=samples, adapter=adapter, optimizer=settings, order=order, memory=memory)
    model = tiny_model(family)
    before = frozen_bytes_of(model)
    prompts = {}
    for id in range(40):
        prompt = tokens_of(4 + id % 20, seed=id)
        request = Request(id, 0.02 * id, len(prompt), 10, "default", (None, "job")[id % 2])
        prompts[id] = (request, prompt, Sampling())
    limits = limits_of(block_tokens=4, max_tokens=32)
    run = EngineRun(model, Splits([9, 4, 16], [11, 5]), limits, prompts, jobs=[job])
    assert frozen_bytes_of(model) == before
    assert len(run.engine.steps) == steps
    overlap = sum(bool(p.finetune) and (p.decode or bool(p.prefills)) for p in run.policy.plans)
    assert overlap > 50

    reference = peft_of(family, adapter, torch.float32, tmp_path / "start")
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.01)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=steps)
    for index, record in enumerate(run.engine.steps):
        pair = samples[2 * index : 2 * index + 2]
        count = sum(int((s.labels[1:] != -100).sum()) for s in pair)
        loss = sum(summed_loss(reference, s) for s in pair) / count  # type: ignore[misc]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert record.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert record.grad_norm == pytest.approx(float(norm), rel=2e-3)
        assert record.learning_rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert run.engine.steps[-1].loss < 0.8 * run.engine.steps[0].loss, "it has learned"

    # What comes out works in peft, and gives the logits of the weights that were trained there.
    write_adapter(run.trainers[0].masters, tmp_path / "trained")
    written = peft_of(
        family, read_adapter(tmp_path / "trained", model.config.shape), torch.float32, tmp_path / "b"
    )
    ids = torch.tensor([tokens_of(30, seed=5)])
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, reference(ids).logits, atol=1e-3, rtol=1e-3)


def frozen_bytes_of(model: Any) -> list[bytes]:
    w = model.weights
    tensors = [w.embed, w.norm, w.head, *(t for layer in w.layers for t in layer if t is not None)]
    return [t.numpy().tobytes() for t in tensors]


def test_a_request_keeps_the_version_that_it_started_with(tmp_path: Path) -> None:
    """Steps are published while it runs."""
    family = "qwen2"
    adapter = adapter_of(family, 2, ("q_proj", "down_proj"))
    versions: list[Adapter] = [adapter]
    started: dict[int, int] = {}

    class Run(EngineRun):
        def _build(self, *given: Any) -> None:
            super()._build(*given)
            trainer, step = self.trainers[0], self.trainers[0].step

            def stepped() -> Any:
                result = step()
                write_adapter(trainer.masters, tmp_path / str(len(versions)))
                versions.append(read_adapter(tmp_path / str(len(versions)), CONFIGS[family].shape))
                return result

            trainer.step = stepped  # type: ignore[method-assign]

        def _launch(self, launch: Any) -> Any:
            inner = super()._launch(launch)

            def wrapped(plan: Plan) -> None:
                for id, _ in plan.prefills:
                    started.setdefault(id, len(self.engine.steps))
                inner(plan)

            return wrapped

    prompts = {}
    for id in range(6):
        prompt = tokens_of(6 + 3 * id, seed=id)
        request = Request(id, 0.01 * id, len(prompt), 16, "default", "job")
        prompts[id] = (request, prompt, Sampling())
    settings = OptimizerSettings(learning_rate=2e-2, schedule="constant")
    job = JobSetup(
        samples=[sample_of(12, seed=i) for i in range(30)],
        adapter=adapter,
        optimizer=settings,
        accumulation=1,
    )
    limits = limits_of(block_tokens=4, max_tokens=32)
    run = Run(tiny_model(family), Splits([12], [24]), limits, prompts, jobs=[job])
    assert len(set(started.values())) > 2
    for id, (_, prompt, _) in prompts.items():
        model = peft_of(family, versions[started[id]], torch.float32, tmp_path / f"own{id}").eval()
        with torch.no_grad():
            ids = torch.tensor([prompt + run.tokens[id]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(run.logits[id]), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory", ["stash", "recompute"])
def test_two_jobs_train_in_the_same_iterations_as_if_alone(memory: str) -> None:
    """One of them without dropout, and perhaps without anything that it keeps."""
    family = "llama"
    setups = {
        name: {
            "samples": [sample_of(9 + 4 * i, seed=seed + i) for i in range(6)],
            "adapter": replace(adapter_of(family, rank, targets, seed=seed), dropout=dropout),
            "order": order,
            "memory": kept,
            "id": name,
        }
        for name, rank, targets, seed, order, kept, dropout in (
            ("one", 2, ("v_proj", "down_proj"), 2, "window_major", memory, 0.0),
            ("two", 4, ("q_proj", "down_proj"), 1, "layer_major", "stash", 0.2),
        )
    }
    both = EngineRun(
        tiny_model(family, torch.float64),
        Splits([4], [5]),
        limits_of(),
        traffic(),
        jobs=[JobSetup(**s) for s in setups.values()],
    )
    assert any(len(plan.finetune) == 2 for plan in both.policy.plans)
    for name, setup in setups.items():
        alone = EngineRun(
            tiny_model(family, torch.float64),
            Splits([1000], [1000]),
            limits_of(),
            {},
            jobs=[JobSetup(**setup)],
        )
        own = [record.loss for record in both.engine.steps if record.job == name]
        assert own == pytest.approx([record.loss for record in alone.engine.steps], rel=1e-12)
        assert len(own) == 3
        trained = both.engine.trainers[name].masters.tensors()
        for tensor, other in zip(trained, alone.engine.trainers[name].masters.tensors(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12)


def test_the_simulators_own_policy_drives_the_same_training() -> None:
    """The hybrid token scheduler decides every split; the losses are those of whole samples."""
    family = "llama"
    samples = [sample_of(11 + 6 * i, seed=i) for i in range(8)]
    adapter = adapter_of(family, 4, ("q_proj", "o_proj", "down_proj"))

    def losses(policy: Any) -> tuple[list[float], EngineRun]:
        job = JobSetup(samples=samples, adapter=adapter)
        run = EngineRun(tiny_model(family), policy, limits_of(), traffic(), jobs=[job])
        return [record.loss for record in run.engine.steps], run

    predictor = LinearCost(forward_s=2.0**-10, backward_s=2.0**-11, optimizer_s=0.0)
    own, run = losses(build_policy("coserving", predictor=predictor, budget_s=0.02))
    assert sum(any(isinstance(s, Forward) for s in p.finetune) for p in run.policy.plans) > len(samples)
    assert own == pytest.approx(losses(Splits([1000], [1000]))[0], rel=1e-4)
    assert len(own) == 4
