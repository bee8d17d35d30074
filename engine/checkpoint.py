"""Checkpoints of a finetuning job at step boundaries: whole or not there at all.

    checkpoint-N/adapter_config.json, adapter_model.safetensors   PEFT's; float32 masters
    checkpoint-N/optimizer.pt                                     state of the optimizer
    checkpoint-N/state.json                                       step, samples trained, settings

A checkpoint is written under another name, synced to disk and renamed, so a name `checkpoint-N` is a
promise. Data order follows from the seed and the number of samples trained, so nothing random is stored, and
adapter and optimizer are whole, so training may go on with another `tp`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.engine import Engine
from engine.lora import write_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a checkpoint stands."""

    step: int
    samples: int
    """Samples trained so far; the next step begins with the one after."""
    settings: Mapping[str, Any]
    """What must be the same for training to go on."""


def save_checkpoint(
    folder: str | Path, engine: Engine, job: str, progress: Progress, base_model: str | None
) -> Path:
    """Write `folder`/checkpoint-N of a job. On an OSError nothing of it is left, and older ones are untouched."""
    folder = Path(folder)
    final = folder / f"checkpoint-{progress.step}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_adapter(engine.adapter(job), partial, base_model)
        torch.save(engine.optimizer_state(job), partial / "optimizer.pt")
        state = {"step": progress.step, "samples": progress.samples, "settings": dict(progress.settings)}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno, f"checkpoint of step {progress.step}: {error.strerror}", str(final)
        ) from error
    return final


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the latest step in `folder`; None without any."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def read_progress(checkpoint: str | Path) -> Progress:
    """Where a checkpoint stands. ValueError for a folder that is none."""
    path = Path(checkpoint) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint: {error}") from None
    return Progress(step=state["step"], samples=state["samples"], settings=state["settings"])


def restore(checkpoint: str | Path, engine: Engine, job: str) -> None:
    """Optimizer state and step count of a checkpoint; the job was made with its adapter."""
    state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True)
    engine.restore(job, state, read_progress(checkpoint).step)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
