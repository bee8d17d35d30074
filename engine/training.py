"""`coserve finetune`: train a LoRA adapter on a dataset, with checkpoints that survive a kill.

    coserve finetune model_name_or_path=FOLDER dataset=data.jsonl output_dir=adapter

The same engine and loop as everywhere, without requests. `output_dir` gets the adapter as PEFT has it,
`checkpoint-N` folders and `trainer_log.jsonl`, a line every `logging_steps`. With resume=true training goes on
from the last whole checkpoint, as if it had never stopped. What stops it, a step whose loss is not a number or
a full disk, is said in one line, and the checkpoints before it stay.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from engine.assemble import TrainingJob
from engine.checkpoint import (
    STATE,
    Progress,
    Trained,
    checkpoints,
    last_checkpoint,
    read_progress,
    restore,
    save_checkpoint,
)
from engine.config import read_config
from engine.datasets import Dataset, read_dataset
from engine.driver import Driver, GivenArrivals, WallClock
from engine.engine import Engine, StepRecord
from engine.finetune import Sample
from engine.load import check_model_folder, load_model
from engine.lora import LARGEST_SCALE, new_adapter, read_adapter, write_adapter
from engine.optimizer import KINDS, LARGEST_RATE, SCHEDULES, OptimizerSettings
from engine.replica import replica
from engine.text import check_tokens, passes, read_tokenizer
from engine.training_log import TrainingLog, check_tensorboard
from sim.checked import build
from sim.core.finetune import AUTO, MEMORIES, ORDERS
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.rows import Recorder
from sim.core.specs import LINEARS, LoraSpec
from sim.core.state import PipelineState
from sim.errors import keys_as
from sim.hydra_app import hydra_main

CONFIGS = Path(__file__).parent / "programs"
"""Apart from those of `coserve bench`, among which `device` is a group and no key."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAY_CHANGE = (
    "output_dir",
    "resume",
    "device",
    "tp",
    "save_steps",
    "save_total_limit",
    "report_to",
    "order",
    "memory",
    "dataset",
    "model_name_or_path",
)
"""Settings that a resumed run may state differently; paths may have moved."""
CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": tuple(DTYPES),
    "optim": KINDS,
    "lr_scheduler_type": SCHEDULES,
    "order": ORDERS,
    "memory": (*MEMORIES, AUTO),
    "report_to": ("none", "tensorboard"),
}
LEAST = {
    "tp": 1,
    "cutoff_len": 2,  # a token is trained on to follow from another
    "max_samples": 1,
    "lora_rank": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_steps": 1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "seed": 0,
    "weight_decay": 0,
}
ABOVE_0 = ("learning_rate", "lora_alpha", "max_grad_norm")
MOST = {
    "learning_rate": LARGEST_RATE["adamw"],
    "weight_decay": LARGEST_RATE["adamw"],
    "lora_alpha": LARGEST_SCALE,
}
Save = Callable[[Path, Engine, str, Progress, str, "int | None"], object]
"""What writes a checkpoint, as `save_checkpoint` does."""
OPTIONAL = ("max_samples", "max_steps", "save_total_limit", "max_grad_norm")
"""May be null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of `finetune.yaml`."""

    model_name_or_path: str
    dataset: str
    output_dir: str
    resume: bool
    device: str
    tp: int
    dtype: str
    seed: int
    cutoff_len: int
    max_samples: int | None
    packing: bool
    train_on_prompt: bool
    lora_rank: int
    lora_alpha: float
    lora_target: tuple[str, ...] | str
    lora_dropout: float
    use_rslora: bool
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_steps: int | None
    optim: str
    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    lr_scheduler_type: str
    warmup_steps: int
    warmup_ratio: float
    logging_steps: int
    report_to: str
    save_steps: int
    save_total_limit: int | None
    order: str
    memory: str

    def __post_init__(self) -> None:
        check_model_folder(self.model_name_or_path)
        for key, what in (("dataset", "a file"), ("output_dir", "a folder")):
            if not getattr(self, key).strip():
                raise ValueError(f"{key} must be {what}, got nothing")
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key, least in LEAST.items():
            self._require(key, f"at least {least}", least, MOST.get(key, math.inf))
        for key in ABOVE_0:
            self._require(key, "above 0", math.ulp(0.0), MOST.get(key, math.inf))
        self._require("warmup_ratio", "between 0 and 1", 0, 1)
        self._require("lora_dropout", "at least 0 and below 1", 0, math.nextafter(1, 0))
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                "only one of warmup_steps and warmup_ratio may be given, "
                f"got {self.warmup_steps} and {self.warmup_ratio}"
            )
        unknown = [target for target in self.targets if target not in LINEARS]
        if unknown or not self.targets:
            raise ValueError(
                f"lora_target must be all, or a list of {', '.join(LINEARS)}, got {self.lora_target!r}"
            )
        if self.memory == "recompute" and self.order != "window_major":
            raise ValueError(f"memory=recompute needs order=window_major, got {self.order}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a CUDA device, and torch finds none")

    def _require(self, key: str, rule: str, least: float, most: float) -> None:
        value = getattr(self, key)
        if value is None and key in OPTIONAL:
            return
        if not (math.isfinite(value) and least <= value <= most):
            bound = f" and at most {MOST[key]:g}" if key in MOST else ""
            or_null = " or null" if key in OPTIONAL else ""
            raise ValueError(f"{key} must be {rule}{bound}{or_null}, got {value}")

    @property
    def targets(self) -> tuple[str, ...]:
        given = self.lora_target
        if given == "all":
            return LINEARS
        return (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(rank=self.lora_rank, alpha=self.lora_alpha, targets=self.targets)

    def optimizer(self, total_steps: int) -> OptimizerSettings:
        """Of a run of so many steps."""
        return OptimizerSettings(
            kind=self.optim,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            schedule=self.lr_scheduler_type,
            # As transformers rounds the ratio.
            warmup_steps=self.warmup_steps or math.ceil(total_steps * self.warmup_ratio),
            total_steps=None if self.lr_scheduler_type == "constant" else total_steps,
        )

    @property
    def fixed(self) -> dict[str, Any]:
        """What a checkpoint's successor must agree with."""
        return {
            key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in MAY_CHANGE
        }


def main(argv: Sequence[str]) -> int:
    """`coserve finetune`."""
    return hydra_main(
        finetune, argv, prog="coserve finetune", config_name="finetune", config_dir=CONFIGS, at_end=_show
    )


def finetune(config: DictConfig) -> dict[str, Any]:
    """Train a LoRA adapter on a dataset and write it as PEFT has it."""
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    policy: Policy = build(None, node.pop("policy"), "policy")
    if not policy.finetunes:
        raise ValueError(f"policy must be one that finetunes, got {type(policy).__name__}")
    with keys_as({"finetune.": ""}):
        settings: Settings = build(Settings, node, "finetune")
    return train(settings, policy)


def train(settings: Settings, policy: Policy) -> dict[str, Any]:
    """Train to the end; `steps`, `loss` of the last step, `folder` and the compile plan in a line."""
    training = Training(settings)
    limits = Limits(kv_tokens=16, block_tokens=16, max_sequences=1, max_tokens=1, max_sequence_tokens=1)
    with replica(settings.tp, settings.device) as ranks:
        model = ranks.load(load_model, settings.model_name_or_path, DTYPES[settings.dtype])
        engine, jobs = ranks.assemble(model, limits, [training.job])
        state = PipelineState(limits=limits, slos={}, recorder=Recorder(), jobs=jobs)
        try:
            with training.on(engine) as log:
                Driver(engine, WallClock()).run(run_loop(state, policy, GivenArrivals(), Horizon()))
        except KeyboardInterrupt:
            _note(f"{training.folder}: {training.ways_on()}")
            raise
        for failure in engine.failures.values():
            kept = ", ".join(path.name for path in checkpoints(training.folder)[:1]) or "no checkpoint"
            raise ValueError(f"{failure.failure}; {training.folder} has {kept}")
        training.write(engine)
        trainer = engine.trainers[training.job.id]
        steps, plan = trainer.optimizer.steps, trainer.plan.describe()
        return {"steps": steps, "loss": log.last_loss, "folder": str(training.folder), "plan": plan}


class Training:
    """A job on a dataset: from where its output_dir stands to the adapter there, on whatever engine runs it."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError for a dataset or a checkpoint that cannot be used."""
        if settings.report_to == "tensorboard":
            check_tensorboard()
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self._found = _start(self.folder, settings)
        self._before = None if self._found is None else _checked_progress(self._found, settings)
        self._done = 0 if self._before is None else self._before.samples
        data = _data(settings)
        accumulation = settings.gradient_accumulation_steps
        self._epoch_samples = len(data.samples)
        self._all_samples = len(data.samples) * settings.num_train_epochs
        if settings.max_steps is not None:
            self._all_samples = min(self._all_samples, settings.max_steps * accumulation)
        self.total = -(-self._all_samples // accumulation)
        """Optimizer steps to the end."""

        shape = read_config(settings.model_name_or_path).shape
        shape.check_tp(settings.tp)
        for sample in data.samples:
            check_tokens(sample.tokens.tolist(), shape.vocab, settings.model_name_or_path)
        longest = max(len(sample.tokens) for sample in data.samples)
        if longest > shape.max_context_tokens:
            context = f"the model's context of {shape.max_context_tokens}"
            _note(
                f"samples have up to {longest} tokens, more than {context}; a smaller cutoff_len keeps within it"
            )
        fresh = replace(
            new_adapter(settings.lora, shape, torch.float32, "cpu", settings.seed),
            rslora=settings.use_rslora,
            dropout=settings.lora_dropout,
        )
        samples = itertools.islice(passes(data.samples, settings.seed), self._done, self._all_samples)
        self._feed = _Counted(samples)
        self.job = TrainingJob(
            id=self.folder.resolve().name,
            samples=self._feed,
            max_sample_tokens=longest,
            adapter=fresh if self._found is None else read_adapter(self._found, shape),
            optimizer=settings.optimizer(self.total),
            seed=settings.seed,
            accumulation=accumulation,
            order=settings.order,
            memory=settings.memory,
        )

    @contextmanager
    def on(self, engine: Engine, save: Save | None = None) -> Iterator[TrainingLog]:
        """While `engine`, which was made with the job, runs it: its log, and its checkpoints. `save` writes these as
        `save_checkpoint` does, unless it is None."""
        settings, job = self.settings, self.job
        if self._found is not None:
            restore(self._found, engine, job.id)
        log = TrainingLog(
            self.folder / "trainer_log.jsonl",
            total=self.total,
            done=engine.trainers[job.id].optimizer.steps,
            every=settings.logging_steps,
            epoch_samples=self._epoch_samples,
            unlogged=() if self._before is None else self._before.unlogged,
            tensorboard=self.folder / "runs" if settings.report_to == "tensorboard" else None,
        )

        def on_step(record: StepRecord) -> None:
            samples = min(self._all_samples, record.step * job.accumulation)
            try:
                log.add(record, samples, self._feed.tokens(samples - self._done))
            finally:
                if record.step % settings.save_steps == 0 or record.step == self.total:
                    progress = Progress(
                        step=record.step, samples=samples, settings=settings.fixed, unlogged=log.unlogged
                    )
                    base = settings.model_name_or_path
                    write = save_checkpoint if save is None else save
                    write(self.folder, engine, job.id, progress, base, settings.save_total_limit)

        engine.on_step = on_step
        with log:
            yield log

    def write(self, engine: Trained) -> None:
        """The adapter as it stands, to `output_dir`."""
        write_adapter(engine.adapter(self.job.id), self.folder, self.settings.model_name_or_path)

    def ways_on(self) -> str:
        """For a run that was stopped: from where the next one goes on."""
        last = next(iter(checkpoints(self.folder)), None)
        return "no checkpoint yet (save_steps)" if last is None else f"resume=true goes on from {last.name}"


class _Counted:
    """Samples in training order, whose tokens are counted."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples = samples
        self._lengths: deque[int] = deque()
        """Of the samples that were drawn and not counted yet."""
        self._counted = self._tokens = 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            self._lengths.append(len(sample.tokens))
            yield sample

    def tokens(self, count: int) -> int:
        """Tokens of the first `count` samples, which are no fewer than last time."""
        while self._counted < count:
            self._counted += 1
            self._tokens += self._lengths.popleft()
        return self._tokens


def _start(folder: Path, settings: Settings) -> Path | None:
    """The checkpoint to go on from; ValueError when there is one and nobody asked to go on."""
    if settings.resume:
        return last_checkpoint(folder, _note)
    for found in checkpoints(folder):
        raise ValueError(
            f"output_dir {folder} has {found.name}; resume=true goes on, or choose another folder"
        )
    return None


def _data(settings: Settings) -> Dataset:
    data = read_dataset(
        settings.dataset,
        read_tokenizer(settings.model_name_or_path),
        cutoff_len=settings.cutoff_len,
        max_samples=settings.max_samples,
        train_on_prompt=settings.train_on_prompt,
        packing=settings.packing,
    )
    if data.note is not None:
        _note(data.note)
    return data


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _checked_progress(checkpoint: Path, settings: Settings) -> Progress:
    """Where the checkpoint stands; ValueError when other settings made it."""
    progress = read_progress(checkpoint)
    for key, value in settings.fixed.items():
        had = progress.settings.get(key)
        if had != value:
            raise ValueError(
                f"{checkpoint} was made with {key}={had!r}, got {value!r}; training cannot go on"
            )
    most = progress.step * settings.gradient_accumulation_steps
    if progress.samples > most:
        raise ValueError(
            f"{checkpoint / STATE}: samples must be at most {most} after {progress.step} steps, got {progress.samples}"
        )
    return progress


def _show(rows: Sequence[Mapping[str, Any]], _: Path) -> None:
    for row in rows:
        loss = "nothing was left to do" if row["loss"] is None else f"loss {row['loss']:.4f}"
        print(f"{row['folder']}: {row['steps']} steps, {loss}")
        print(f"memory: {row['plan']}")
