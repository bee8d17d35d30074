"""`coserve finetune`: train a LoRA adapter on a dataset, with checkpoints that survive a kill.

    coserve finetune model_name_or_path=FOLDER dataset=data.jsonl output_dir=adapter

The same engine and loop as everywhere, without requests. `output_dir` gets the adapter as PEFT has it,
`checkpoint-N` folders and `trainer_log.jsonl`, a line per optimizer step. With resume=true training goes on
from the last checkpoint, as if it had never stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from engine.assemble import TrainingJob
from engine.checkpoint import Progress, last_checkpoint, read_progress, restore, save_checkpoint
from engine.config import read_config
from engine.datasets import read_samples
from engine.driver import Driver, GivenArrivals, WallClock
from engine.engine import StepRecord
from engine.load import load_model
from engine.lora import new_adapter, read_adapter, write_adapter
from engine.optimizer import OptimizerSettings
from engine.replica import replica
from engine.text import passes
from sim.assemble import CONFIGS as SIMULATOR
from sim.checked import build
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.rows import Recorder
from sim.core.specs import LoraSpec
from sim.core.state import PipelineState
from sim.hydra_app import hydra_main

CONFIGS = Path(__file__).parent / "configs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAY_CHANGE = (
    "output_dir",
    "resume",
    "device",
    "tp",
    "save_steps",
    "order",
    "memory",
    "dataset",
    "model_name_or_path",
)
"""Settings that a resumed run may state differently; paths may have moved."""


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
    packing: bool
    train_on_prompt: bool
    lora_rank: int
    lora_alpha: float
    lora_target: tuple[str, ...]
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_steps: int | None
    optim: str
    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    lr_scheduler_type: str
    warmup_steps: int
    save_steps: int
    order: str
    memory: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda needs a CUDA device, and torch finds none")
        for key in ("tp", "gradient_accumulation_steps", "num_train_epochs", "save_steps", "cutoff_len"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or null, got {self.max_steps}")

    @property
    def fixed(self) -> dict[str, Any]:
        """What a checkpoint's successor must agree with."""
        return {
            key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in MAY_CHANGE
        }


def main(argv: Sequence[str]) -> int:
    """`coserve finetune`."""
    OmegaConf.register_new_resolver("simulator_configs", lambda: str(SIMULATOR), replace=True)
    return hydra_main(
        finetune, argv, prog="coserve finetune", config_name="finetune", config_dir=CONFIGS, at_end=_show
    )


def finetune(config: DictConfig) -> dict[str, Any]:
    """Train a LoRA adapter on a dataset and write it as PEFT has it."""
    node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    policy: Policy = build(None, {k: v for k, v in node.pop("policy").items() if k != "name"}, "policy")
    settings: Settings = build(Settings, node, "finetune")
    return train(settings, policy)


def train(settings: Settings, policy: Policy) -> dict[str, Any]:
    """Train to the end; `steps`, `loss` of the last step, `folder` and the compile plan in a line."""
    from transformers import AutoTokenizer

    folder = Path(settings.output_dir)
    found = last_checkpoint(folder)
    if found is not None and not settings.resume:
        raise ValueError(
            f"output_dir {folder} has {found.name}; resume=true goes on, or choose another folder"
        )
    before = None if found is None else _checked_progress(found, settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path)
    samples = read_samples(
        settings.dataset,
        tokenizer,
        cutoff_len=settings.cutoff_len,
        train_on_prompt=settings.train_on_prompt,
        packing=settings.packing,
    )
    accumulation = settings.gradient_accumulation_steps
    all_samples = len(samples) * settings.num_train_epochs
    if settings.max_steps is not None:
        all_samples = min(all_samples, settings.max_steps * accumulation)
    total = -(-all_samples // accumulation)
    done = 0 if before is None else before.samples

    shape = read_config(settings.model_name_or_path).shape
    shape.check_tp(settings.tp)
    lora = LoraSpec(rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_target)
    fresh = new_adapter(lora, shape, torch.float32, "cpu", settings.seed)
    optimizer = OptimizerSettings(
        kind=settings.optim,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        schedule=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        total_steps=total,
    )
    job = TrainingJob(
        id="job",
        samples=itertools.islice(passes(samples, settings.seed), done, all_samples),
        max_sample_tokens=max(len(sample.tokens) for sample in samples),
        adapter=fresh if found is None else read_adapter(found, shape),
        optimizer=optimizer,
        accumulation=accumulation,
        order=settings.order,
        memory=settings.memory,
    )
    limits = Limits(kv_tokens=16, block_tokens=16, max_sequences=1, max_tokens=1, max_sequence_tokens=1)
    with replica(settings.tp, settings.device) as ranks:
        model = ranks.load(load_model, settings.model_name_or_path, DTYPES[settings.dtype])
        engine, jobs = ranks.assemble(model, limits, [job])
        trainer = engine.trainers["job"]
        if found is not None:
            restore(found, engine, job.id)
        log = _Log(folder / "trainer_log.jsonl", total, trainer.optimizer.steps)

        def on_step(record: StepRecord) -> None:
            samples_done = min(all_samples, record.step * accumulation)
            log.add(record, samples_done)
            if record.step % settings.save_steps == 0 or record.step == total:
                progress = Progress(step=record.step, samples=samples_done, settings=settings.fixed)
                save_checkpoint(folder, engine, job.id, progress, settings.model_name_or_path)

        engine.on_step = on_step
        state = PipelineState(limits=limits, slos={}, recorder=Recorder(), jobs=jobs)
        with log:
            Driver(engine, WallClock()).run(run_loop(state, policy, GivenArrivals(), Horizon()))
        write_adapter(engine.adapter(job.id), folder, settings.model_name_or_path)
        steps, plan = trainer.optimizer.steps, trainer.plan.describe()
        return {"steps": steps, "loss": log.last_loss, "folder": str(folder), "plan": plan}


def _checked_progress(checkpoint: Path, settings: Settings) -> Progress:
    """Where the checkpoint stands; ValueError when other settings made it."""
    progress = read_progress(checkpoint)
    for key, value in settings.fixed.items():
        had = progress.settings.get(key)
        if had != value:
            raise ValueError(
                f"{checkpoint} was made with {key}={had!r}, got {value!r}; training cannot go on"
            )
    return progress


class _Log:
    """A line of JSON per step, and a bar for a person who waits."""

    def __init__(self, path: Path, total: int, done: int) -> None:
        self._path = path
        self._total = total
        self._done = done
        self._started_s = time.perf_counter()
        self.last_loss: float | None = None

    def __enter__(self) -> _Log:
        from tqdm import tqdm

        self._path.parent.mkdir(parents=True, exist_ok=True)
        # What was logged after the checkpoint is trained again.
        kept = [line for line in self._lines() if json.loads(line)["step"] <= self._done]
        self._path.write_text("".join(kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=self._done, unit="step", leave=False, disable=quiet)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._file.close()

    def add(self, record: StepRecord, samples: int) -> None:
        self.last_loss = record.loss
        row = {
            "step": record.step,
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            "samples": samples,
            "elapsed_s": round(time.perf_counter() - self._started_s, 3),
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._bar.set_postfix(loss=f"{record.loss:.4f}", lr=f"{record.learning_rate:.2e}")
        self._bar.update(1)

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        # A kill may have cut the last line short.
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        loss = "nothing was left to do" if row["loss"] is None else f"loss {row['loss']:.4f}"
        print(f"{row['folder']}: {row['steps']} steps, {loss}")
        print(f"memory: {row['plan']}")
