"""`coserve finetune`: train a LoRA adapter on a dataset, with checkpoints that survive a kill.

    coserve finetune model_name_or_path=FOLDER dataset=data.jsonl output_dir=adapter

The same engine and loop as everywhere, without requests. `output_dir` gets the adapter as PEFT has it,
`checkpoint-N` folders and `trainer_log.jsonl`, a line every `logging_steps`. With resume=true training goes on
from the last whole checkpoint, as if it had never stopped. What stops it, a step whose loss is not a number or
a full disk, is said in one line, and the checkpoints before it stay.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    keep_latest,
    last_checkpoint,
    read_progress,
    restore,
    save_checkpoint,
)
from engine.config import read_config
from engine.driver import Driver, GivenArrivals, WallClock
from engine.engine import Engine, StepRecord
from engine.evaluation import room_for
from engine.load import load_model
from engine.lora import new_adapter, read_adapter, write_adapter
from engine.replica import replica
from engine.sweep_folders import shared_folder
from engine.text import passes
from engine.tokenizer import check_tokens
from engine.training_data import Counted, fingerprint, read_data
from engine.training_log import TrainingLog, check_tensorboard
from engine.training_settings import DTYPES, Settings
from sim.checked import build
from sim.core.loop import Horizon, run_loop
from sim.core.plan import Limits, Policy
from sim.core.rows import Recorder
from sim.core.state import PipelineState
from sim.errors import USER_ERROR, keys_as, writing
from sim.hydra_app import hydra_main

CONFIGS = Path(__file__).parent / "programs"
"""Apart from those of `coserve bench`, among which `device` is a group and no key."""
BLOCK_TOKENS = 16
Save = Callable[[Path, Engine, str, Progress, str, "int | None"], object]
"""What writes a checkpoint, as `save_checkpoint` does."""


def main(argv: Sequence[str]) -> int:
    """`coserve finetune`."""
    if {"-m", "--multirun"} & set(argv):
        if (line := shared_folder(argv, "output_dir")) is not None:
            print(f"coserve finetune: error: {line}", file=sys.stderr)
            return USER_ERROR
    else:
        # As LLaMA-Factory writes them; to Hydra they are several values.
        argv = [re.sub(r"^(lora_target=)(\w+(,\w+)+)$", r"\1[\2]", arg) for arg in argv]
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
    """Train to the end; `steps`, `loss` of the last step, its `rise` if it rose, `eval_loss` and `folder`."""
    training = Training(settings)
    # There are no requests: their pages are for the samples that are evaluated.
    kv_tokens = room_for(training.held_out, BLOCK_TOKENS) if training.held_out else BLOCK_TOKENS
    limits = Limits(
        kv_tokens=kv_tokens, block_tokens=BLOCK_TOKENS, max_sequences=1, max_tokens=1, max_sequence_tokens=1
    )
    with replica(settings.tp, settings.device) as ranks:
        model = ranks.load(load_model, settings.model_name_or_path, DTYPES[settings.dtype])
        engine, jobs = ranks.assemble(model, limits, [training.job])
        trainer = engine.trainers[training.job.id]
        print(f"{training.describe()}\nmemory: {trainer.plan.describe()}", file=sys.stderr, flush=True)
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
        return {
            "steps": trainer.optimizer.steps,
            "loss": log.last_loss,
            "rise": log.rise(),
            "eval_loss": log.last_eval_loss,
            "folder": str(training.folder),
        }


class Training:
    """A job on a dataset: from where its output_dir stands to the adapter there, on whatever engine runs it."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError for a dataset or a checkpoint that cannot be used."""
        if settings.report_to == "tensorboard":
            check_tensorboard()
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self._found = _start(self.folder, settings)
        data, self.held_out, notes = read_data(settings)
        for note in notes:
            _note(note)
        # Which sample is next, and which are held out, follows from their number; what it says, from the file.
        own = {"dataset_samples": len(data), "dataset_fingerprint": fingerprint(data)}
        self._fixed = settings.fixed | own
        accumulation = settings.gradient_accumulation_steps
        found = self._found
        self._before = None if found is None else _checked_progress(found, self._fixed, accumulation)
        self._done = 0 if self._before is None else self._before.samples
        self._epoch_samples = len(data)
        self._epoch_tokens = sum(len(sample.tokens) for sample in data)
        self._all_samples = len(data) * settings.num_train_epochs
        if settings.max_steps is not None:
            self._all_samples = settings.max_steps * accumulation
        self.total = -(-self._all_samples // accumulation)
        """Optimizer steps to the end."""

        shape = read_config(settings.model_name_or_path).shape
        shape.check_tp(settings.tp)
        for sample in (*data, *self.held_out):
            check_tokens(sample.tokens.tolist(), shape.vocab, settings.model_name_or_path)
        longest = max(len(sample.tokens) for sample in (*data, *self.held_out))
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
        samples = itertools.islice(passes(data, settings.seed), self._done, self._all_samples)
        self._feed = Counted(samples)
        self.job = TrainingJob(
            id=self.folder.resolve().name,
            samples=self._feed,
            max_sample_tokens=max(len(sample.tokens) for sample in data),
            adapter=fresh if self._found is None else read_adapter(self._found, shape),
            optimizer=settings.optimizer(self.total),
            seed=settings.seed,
            accumulation=accumulation,
            order=settings.order,
            memory=settings.memory,
        )
        with writing("output_dir", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def describe(self) -> str:
        """The job in a line: data, steps, what is trained, and where."""
        settings = self.settings
        params = sum(tensor.numel() for tensor in self.job.adapter.tensors())
        done = "" if self._before is None else f" ({self._before.step} done)"
        devices = settings.device if settings.tp == 1 else f"{settings.tp} x {settings.device}"
        return (
            f"{self.folder}: {self._epoch_samples:,} samples of {self._epoch_tokens:,} tokens, {self.total:,} steps "
            f"of {self.job.accumulation} samples{done}, {params:,} trainable parameters, {settings.dtype} on {devices}"
        )

    @contextmanager
    def on(self, engine: Engine, save: Save | None = None) -> Iterator[TrainingLog]:
        """While `engine`, which was made with the job, runs it: its log, and its checkpoints. `save` writes these as
        `save_checkpoint` does, unless it is None. ValueError where another process trains into the same folder."""
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
                        step=record.step, samples=samples, settings=self._fixed, unlogged=log.unlogged
                    )
                    base = settings.model_name_or_path
                    write = save_checkpoint if save is None else save
                    write(self.folder, engine, job.id, progress, base, settings.save_total_limit)
            # Last: who stops it loses no training, and ranks that are stopped in it are asked for nothing more.
            self._evaluate(engine, log, record.step, samples)

        engine.on_step = on_step
        with _alone_in(self.folder), log:
            if self._found is not None:  # a kill may have come before older ones were removed
                keep_latest(self._found, settings.save_total_limit)
            if self._before is not None and not log.evaluated:
                self._evaluate(engine, log, self._before.step, self._done)
            yield log

    def _evaluate(self, engine: Engine, log: TrainingLog, step: int, samples: int) -> None:
        """Log the loss of what nothing is trained on, after the steps at which it is measured."""
        settings = self.settings
        eval_steps = settings.save_steps if settings.eval_steps is None else settings.eval_steps
        if self.held_out and (step % eval_steps == 0 or step == self.total):
            with log.pause():
                loss = engine.mean_loss(self.job.id, self.held_out)
            log.add_eval(step, samples, loss)

    def write(self, engine: Trained) -> None:
        """The adapter as it stands, to `output_dir`."""
        write_adapter(engine.adapter(self.job.id), self.folder, self.settings.model_name_or_path)

    def ways_on(self) -> str:
        """For a run that was stopped: from where the next one goes on."""
        last = next(iter(checkpoints(self.folder)), None)
        return "no checkpoint yet (save_steps)" if last is None else f"resume=true goes on from {last.name}"


def _start(folder: Path, settings: Settings) -> Path | None:
    """The checkpoint to go on from; ValueError when there is one and nobody asked to go on."""
    if settings.resume:
        return last_checkpoint(folder, _note)
    for found in checkpoints(folder):
        raise ValueError(
            f"output_dir {folder} has {found.name}; resume=true goes on, or choose another folder"
        )
    return None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A lock on the folder that ends with the process, however that ends. Where there are no locks, nobody is kept
    out."""
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir: another process trains into {folder}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(held)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _checked_progress(checkpoint: Path, fixed: Mapping[str, Any], accumulation: int) -> Progress:
    """Where the checkpoint stands; ValueError when it was made with other values than `fixed`."""
    progress = read_progress(checkpoint)
    made = progress.settings
    other = [f"{key}={made.get(key)!r}, got {now!r}" for key, now in fixed.items() if made.get(key) != now]
    if other:
        raise ValueError(f"{checkpoint} was made with {'; '.join(other)}; training cannot go on")
    most = progress.step * accumulation
    if progress.samples > most:
        raise ValueError(
            f"{checkpoint / STATE}: samples must be at most {most} after {progress.step} steps, got {progress.samples}"
        )
    return progress


def _show(rows: Sequence[Mapping[str, Any]], _: Path) -> None:
    for row in rows:
        loss = "nothing was left to do" if row["loss"] is None else f"loss {row['loss']:.4f}"
        held_out = "" if row["eval_loss"] is None else f", eval loss {row['eval_loss']:.4f}"
        print(f"{row['folder']}: {row['steps']} steps, {loss}{held_out}")
        if row["rise"] is not None:
            print(f"{row['folder']}: {row['rise']}")
