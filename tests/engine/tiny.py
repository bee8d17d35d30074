"""Tiny random models of both families, their twins in transformers, and whole engine runs on the CPU."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.assemble import TrainingJob, assemble_engine
from engine.config import ModelConfig, RopeScaling
from engine.driver import Driver, EngineArrivals
from engine.engine import Engine
from engine.finetune import Sample
from engine.launching import Launching
from engine.load import random_model
from engine.lora import Adapter, AdapterBank, new_adapter
from engine.model import LayerWeights, Model, Weights
from engine.optimizer import OptimizerSettings
from engine.parallel import ALONE, Group
from engine.placement import Placement, placements_of
from engine.sampling import Sampling
from sim.compile.compiler import serving_bypasses
from sim.compile.peft import PeftSpec
from sim.compile.plan import CompilePlan
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Plan, Policy, View
from sim.core.request import Request
from sim.core.rows import Recorder
from sim.core.specs import LoraSpec, ModelShape
from sim.core.state import PipelineState
from tests.engine.saved import save_model
from tests.engine.virtual import VirtualClock
from tests.support import SLOS, LinearCost, ListArrivals

VOCAB = 96

CONFIGS = {
    "llama": ModelConfig(
        family="llama",
        shape=ModelShape(
            name="llama",
            layers=3,
            hidden=32,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn=48,
            vocab=VOCAB,
            max_context_tokens=512,
        ),
        norm_eps=1e-5,
        rope_theta=500.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "qwen2": ModelConfig(
        family="qwen2",
        shape=ModelShape(
            name="qwen2",
            layers=2,
            hidden=32,
            heads=4,
            kv_heads=4,
            head_dim=16,
            ffn=40,
            vocab=VOCAB,
            qkv_bias=True,
            tied_embeddings=True,
            max_context_tokens=512,
        ),
        rope_theta=1000.0,
    ),
}
"""One with grouped queries, stretched frequencies and a head of its own; one with a bias, one key head for
each query head and tied embeddings."""


def config_of(family: str, **changes: int) -> ModelConfig:
    """One of CONFIGS, its shape changed."""
    config = CONFIGS[family]
    return replace(config, shape=replace(config.shape, **changes))  # type: ignore[arg-type]


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    **changes: int,
) -> Model:
    """Weights large enough that no layer is close to the identity, and norms that are not 1.

    Those of 16 bits are the float32 ones, rounded: torch draws other numbers for them, and which depends on
    its version.
    """
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    model = random_model(config_of(family, **changes), wide, device, seed=7, spread=0.2, group=group)
    generator = torch.Generator().manual_seed(8)
    for layer in model.weights.layers:
        layer.input_norm.uniform_(0.5, 1.5, generator=generator)
        layer.mlp_norm.uniform_(0.5, 1.5, generator=generator)
    model.weights.norm.uniform_(0.5, 1.5, generator=generator)
    return model if wide == dtype else _changed(model, lambda tensor: tensor.to(dtype))


@functools.cache
def _saved(family: str, dtype: torch.dtype) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="coserve-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_model(tiny_model(family, dtype), folder)
    return folder


def twin(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model in transformers; in float64 its norms compute in float64 as well."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_saved(family, dtype), dtype=dtype)
    if dtype == torch.float64:
        exact_norms(model)
    return model.eval()


def exact_norms(model: Any) -> None:
    """Changes a model of transformers: its norms compute in the type that they are given."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_exact_norm, module)


def on_cuda(model: Model) -> Model:
    """The same weights on the GPU."""
    return _changed(model, torch.Tensor.cuda)


def _changed(model: Model, change: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    w = model.weights
    layers = tuple(LayerWeights(*(None if t is None else change(t) for t in layer)) for layer in w.layers)
    embed = change(w.embed)
    head = embed if w.head is w.embed else change(w.head)
    return Model(
        model.whole, Weights(embed=embed, layers=layers, norm=change(w.norm), head=head), model.group
    )


def _exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * scaled


def adapter_of(
    family: str, rank: int, targets: Sequence[str], seed: int = 0, alpha: float = 8.0, **changes: int
) -> Adapter:
    """An adapter that changes the output: B is not zero."""
    shape = config_of(family, **changes).shape
    spec = LoraSpec(rank=rank, alpha=alpha, targets=tuple(targets))
    adapter = new_adapter(spec, shape, torch.float32, "cpu", seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for b in adapter.b.values():
        b.normal_(0.0, 0.2, generator=generator)
    return adapter


def placed(family: str, rank: int, targets: Sequence[str]) -> dict[str, Placement]:
    """Of an adapter on one device."""
    shape, spec = config_of(family).shape, PeftSpec(targets=tuple(targets), rank=rank)
    return placements_of(serving_bypasses(shape, spec, 1, 1), rank, ALONE, shape)


def bank_of(
    family: str, targets: Sequence[str], rank: int, dtype: torch.dtype, slots: int = 4, device: Any = "cpu"
) -> AdapterBank:
    """A bank on one device, with room for ranks up to `rank`."""
    placements = placed(family, rank, targets).values()
    return AdapterBank(placements, ALONE, config_of(family).shape.layers, dtype, torch.device(device), slots)


def put(bank: AdapterBank, family: str, adapter: Adapter) -> int:
    return bank.put(adapter, placed(family, adapter.rank, adapter.targets))


def tokens_of(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def sample_of(count: int, seed: int, ignored: int = 0) -> Sample:
    """A random sample whose first `ignored` labels do not count."""
    tokens = np.array(tokens_of(count, seed), np.int32)
    labels = tokens.astype(np.int64)
    labels[:ignored] = -100
    return Sample(tokens, labels)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finetuning run's log, without what the clock says."""
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("elapsed_s", "tok_s")} for row in rows]


def without_notes(text: str) -> list[str]:
    """Lines of standard error that are not notes, and do not tell how training goes."""
    told = re.compile("note: |memory: |step \\d+ of |.* trainable parameters, ")
    return [line for line in text.splitlines() if not told.match(line)]


class RecordingModel(Model):
    """Remembers all logits that it gave."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.whole, model.weights, model.group)
        self.recorded: list[torch.Tensor] = []

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().logits(x)
        self.recorded.append(logits)
        return logits


class Watched:
    """A policy whose plans are remembered."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.serves = policy.serves
        self.plans: list[Plan] = []

    def plan(self, view: View) -> Plan:
        plan = self._policy.plan(view)
        self.plans.append(plan)
        return plan


@dataclass(kw_only=True)
class JobSetup:
    """A finetuning job of a test run."""

    samples: Iterable[Sample]
    adapter: Adapter
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(learning_rate=1e-2, schedule="constant")
    )
    accumulation: int = 2
    order: str = "layer_major"
    memory: str = "stash"
    max_tokens: int = 64
    seed: int = 0
    id: str = "job"
    weight: float = 1.0
    start_s: float = 0.0
    plan: CompilePlan | None = None

    def of(self) -> TrainingJob:
        return TrainingJob(
            id=self.id,
            samples=self.samples,
            max_sample_tokens=self.max_tokens,
            adapter=self.adapter,
            optimizer=self.optimizer,
            accumulation=self.accumulation,
            weight=self.weight,
            start_s=self.start_s,
            order=self.order,
            memory=self.memory,
            seed=self.seed,
            plan=self.plan,
        )


class EngineRun:
    """A whole run: tokens and logits of every request, plans, steps."""

    def __init__(
        self,
        model: Model,
        policy: Policy,
        limits: Limits,
        prompts: Mapping[int, tuple[Request, Sequence[int], Sampling]],
        *,
        adapters: Mapping[str, Adapter] | None = None,
        jobs: Sequence[JobSetup] = (),
        horizon: Horizon | None = None,
        world: Any = None,
        keep_logits: bool = True,
        launching: Launching = Launching(),  # noqa: B008 - a value without state
        watch: Callable[[Engine], None] | None = None,
    ) -> None:
        """`watch` gets the engine before anything runs."""
        self.model = RecordingModel(model)
        self._keep_logits = keep_logits
        self._launching = launching
        self.tokens: dict[int, list[int]] = {id: [] for id in prompts}
        self.logits: dict[int, list[torch.Tensor]] = {id: [] for id in prompts}
        self.policy = Watched(policy)
        self.recorder = Recorder()
        self._build(limits, adapters or {}, jobs)
        if watch is not None:
            watch(self.engine)
        arrivals = ListArrivals(request for request, _, _ in prompts.values())
        source = EngineArrivals(arrivals, self.engine, lambda r: prompts[r.id][1:])
        self.state = PipelineState(limits=limits, slos=SLOS, recorder=self.recorder, jobs=self.jobs)
        loop = run_loop(self.state, self.policy, source, horizon or Horizon())
        launch = self.engine.launch
        self.engine.launch = self._launch(launch)  # type: ignore[method-assign]
        self.driver = Driver(self.engine, VirtualClock(world or LinearCost()))
        self.driver.run(loop)

    def _build(self, limits: Limits, adapters: Mapping[str, Adapter], jobs: Sequence[JobSetup]) -> None:
        self.engine, self.jobs = assemble_engine(
            self.model,
            limits,
            [job.of() for job in jobs],
            adapters,
            on_token=lambda id, token: self.tokens[id].append(token),
            launching=self._launching,
        )
        self.trainers = list(self.engine.trainers.values())

    def _launch(self, launch: Any) -> Any:
        def wrapped(plan: Plan) -> None:
            before = len(self.model.recorded)
            launch(plan)
            if not self._keep_logits:
                self.model.recorded.clear()
            elif len(self.model.recorded) > before:
                for id, row in zip(self.engine._launched[-1].ids, self.model.recorded[-1], strict=True):
                    self.logits[id].append(row.cpu())

        return wrapped
