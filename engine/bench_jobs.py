"""The finetuning jobs of a bench: `job`, and beside it `more_jobs`, with what each trains on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from engine.finetune import Sample
from engine.optimizer import OptimizerSettings
from engine.text import (
    BUNDLED,
    BYTES,
    byte_tokens,
    packed_samples,
    random_samples,
    read_text,
)
from engine.tokenizer import check_tokens, read_tokenizer
from sim.checked import build
from sim.core.finetune import AUTO, MEMORIES, ORDERS
from sim.core.specs import LoraSpec, ModelShape
from sim.errors import keys_as

RANDOM = "random"
RANDOM_SAMPLES = 64
FIRST = "job"
"""Id of the job that the `job` node describes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """The `job` node, or it with the changes of one of `more_jobs`."""

    weight: float
    data: str | None
    sample_tokens: int
    accumulation: int
    order: str
    memory: str
    lora: LoraSpec
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        for key, least in (("sample_tokens", 2), ("accumulation", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"job.{key} must be at least {least}, got {getattr(self, key)}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"job.weight must be above 0 and finite, got {self.weight}")
        for key, allowed in (("order", ORDERS), ("memory", (*MEMORIES, AUTO))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"job.{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        if self.memory == "recompute" and self.order != "window_major":
            raise ValueError(f"job.memory=recompute needs job.order=window_major, got {self.order}")


def jobs_of(config: DictConfig) -> dict[str, JobSettings]:
    """Job -> its settings; the first is `job` itself."""
    found = {FIRST: _job(config.job, "job")}
    more = config.more_jobs
    if more is not None and not isinstance(more, DictConfig):
        raise ValueError(f"more_jobs must be a group of names, each with keys of job, got {more!r}")
    for key, changes in (more or {}).items():
        name = str(key)
        if name == FIRST or name.startswith("adapter_"):
            raise ValueError(f"more_jobs.{name}: a name must not be {FIRST}, nor begin with adapter_")
        if not isinstance(changes, DictConfig):
            raise ValueError(f"more_jobs.{name} must be a group of keys of job, got {changes!r}")
        node = OmegaConf.merge(OmegaConf.to_container(config.job, resolve=True), changes)
        found[name] = _job(node, f"more_jobs.{name}")
    return found


def _job(node: object, where: str) -> JobSettings:
    own = {"job.": f"{where}.", "finetune.lora.": f"{where}.lora.", "optimizer.": f"{where}.optimizer."}
    with keys_as(own):
        settings: JobSettings = build(JobSettings, node, where)
        return settings


def adapter_folder(job: str) -> str:
    """Below the run's, where the job's adapter is written."""
    return "adapter" if job == FIRST else f"adapter_{job}"


def samples_of(config: DictConfig, settings: JobSettings, shape: ModelShape) -> list[Sample]:
    """What the job trains on."""
    if settings.data == RANDOM:
        return random_samples(RANDOM_SAMPLES, settings.sample_tokens, shape.vocab)
    return packed_samples(_tokens(config, settings), settings.sample_tokens)


def _tokens(config: DictConfig, settings: JobSettings) -> NDArray[np.int32]:
    """The job's text in tokens: the model's own, or bytes for random weights."""
    text = read_text(BUNDLED if settings.data is None else settings.data)
    if config.weights is None:
        if config.model.vocab < BYTES:
            raise ValueError(
                f"model.vocab must be at least {BYTES} for tokens of bytes, got {config.model.vocab}"
            )
        return byte_tokens(text)
    tokenizer = read_tokenizer(config.weights)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    check_tokens(tokens, config.model.vocab, config.weights)
    return np.array(tokens, np.int32)
