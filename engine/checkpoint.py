"""Checkpoints of a finetuning job at step boundaries: whole or not there at all.

    checkpoint-N/adapter_config.json, adapter_model.safetensors   PEFT's; float32 masters
    checkpoint-N/optimizer.pt                                     state of the optimizer
    checkpoint-N/state.json                                       step, samples, settings, hashes of the others

A checkpoint is written under another name, synced to disk and renamed, so a name `checkpoint-N` is a
promise; the hashes find what was damaged or half copied later. Data order follows from the seed and the number
of samples trained, so nothing random is stored, and adapter and optimizer are whole, so training may go on with
another `tp`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.engine import Engine
from engine.lora import Adapter, write_adapter
from sim.checked import build, check
from sim.json_file import read_object

STATE = "state.json"
HASHED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt")


class Trained(Protocol):
    """An engine, or what stands for one of its jobs."""

    def adapter(self, job: str) -> Adapter: ...

    def optimizer_state(self, job: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a checkpoint stands."""

    step: int
    samples: int
    """Samples trained so far; the next step begins with the one after."""
    settings: Mapping[str, Any]
    """What must be the same for training to go on."""
    unlogged: Sequence[float] = ()
    """Losses of the steps since the last row of the log."""

    def __post_init__(self) -> None:
        for key in ("step", "samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")


def save_checkpoint(
    folder: str | Path,
    engine: Trained,
    job: str,
    progress: Progress,
    base_model: str | None,
    keep: int | None = None,
) -> Path:
    """Write `folder`/checkpoint-N of a job, then leave as many as `keep_latest` does. On an OSError nothing of it is
    left, and older ones are untouched."""
    folder = Path(folder)
    final = folder / _name(progress.step)
    partial = _partial(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_adapter(engine.adapter(job), partial, base_model)
        # torch.save itself reports a full disk as a mistake of the program.
        buffer = io.BytesIO()
        torch.save(engine.optimizer_state(job), buffer)
        (partial / "optimizer.pt").write_bytes(buffer.getbuffer())
        state = {
            "step": progress.step,
            "samples": progress.samples,
            "unlogged": list(progress.unlogged),
            "settings": dict(progress.settings),
            "sha256": {path.name: _hash(path) for path in sorted(partial.iterdir())},
        }
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _remove(final)
        os.rename(partial, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno, f"checkpoint of step {progress.step}: {error.strerror}", str(final)
        ) from error
    keep_latest(final, keep)
    return final


def keep_latest(checkpoint: Path, keep: int | None) -> None:
    """Leave only it and the `keep` - 1 before it (None: all). Later ones, which were passed over when training went
    on, do not count."""
    if keep is not None:
        found = checkpoints(checkpoint.parent)
        for old in found[found.index(checkpoint) + keep :]:
            _remove(old)


def checkpoints(folder: str | Path) -> list[Path]:
    """All folders named checkpoint-N, the latest step first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: str | Path, warn: Callable[[str], None]) -> Path | None:
    """The latest whole checkpoint in `folder`, None without any; `warn` gets a line for each passed over.

    Raises ValueError when there are some and none is whole.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            _check_whole(path)
        except ValueError as error:
            warn(f"{error}; it is passed over")
        else:
            return path
    if found:
        raise ValueError(f"{folder} has no whole checkpoint to go on from; choose another output_dir")
    return None


def read_progress(checkpoint: str | Path) -> Progress:
    """Where a checkpoint stands. ValueError for a folder that is none."""
    return _read_state(Path(checkpoint))[0]


def restore(checkpoint: str | Path, engine: Engine, job: str) -> None:
    """Optimizer state and step count of a checkpoint; the job was made with its adapter."""
    state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
    engine.restore(job, state, read_progress(checkpoint).step)


def _check_whole(checkpoint: Path) -> None:
    _, hashes = _read_state(checkpoint)
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} is not a whole checkpoint: {name} is missing")
        if _hash(path) != expected:
            raise ValueError(f"{checkpoint} is not a whole checkpoint: {name} is damaged")


def _read_state(checkpoint: Path) -> tuple[Progress, dict[str, str]]:
    """Where it stands, and the hash of each other file."""
    try:
        state = read_object(checkpoint / STATE)
        hashes: dict[str, str] = check(state.pop("sha256", None), dict[str, str], f"{STATE}.sha256")
        if missing := [name for name in HASHED if name not in hashes]:
            raise ValueError(f"{STATE}.sha256.{missing[0]} is missing")
        progress: Progress = build(Progress, state, STATE)
        if checkpoint.name != _name(progress.step):
            raise ValueError(f"{STATE} is of step {progress.step}")
    except ValueError as error:
        told = str(error).removeprefix(f"{checkpoint}{os.sep}")
        raise ValueError(f"{checkpoint} is not a whole checkpoint: {told}") from None
    return progress, hashes


def _remove(checkpoint: Path) -> None:
    """Take its name away first: a kill in between leaves nothing that looks like a checkpoint."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(checkpoint, gone)
        shutil.rmtree(gone)


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _partial(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
