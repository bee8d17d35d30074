"""Finetuning jobs of a run: what each is, and the lengths of its samples in training order.

A job has a data set of sample lengths, drawn or from a file. All pipelines that finetune take their samples from it,
each the next when it needs one, and train a copy of the adapter each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sim.core.finetune import AUTO, MEMORIES, ORDERS, JobSpec
from sim.core.specs import LoraSpec, ModelShape
from sim.workload.checks import check_choice, check_number, check_whole
from sim.workload.files import check_file, find_file
from sim.workload.lengths import Length
from sim.workload.readers.columns import json_number
from sim.workload.readers.sharegpt import json_records
from sim.workload.streams import stream
from sim.workload.table import Ints

LENGTH_COLUMNS = ("tokens", "length", "input_ids")
MOST_SAMPLES = 10_000_000
"""Of a data set whose lengths are drawn: 80 MB of them."""
TEXT_COLUMNS = ("text", "conversations", "messages", "prompt", "instruction", "content")


class Samples(Protocol):
    """The data set of a job."""

    def lengths(self, rng: np.random.Generator) -> Ints:
        """Tokens of each sample, shape (samples,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSamples:
    """`samples` lengths from a distribution."""

    length: Length
    samples: int

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, at_least=1, at_most=MOST_SAMPLES)

    def lengths(self, rng: np.random.Generator) -> Ints:
        return self.length.draw(self.samples, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSamples:
    """Lengths from a JSON list or JSON lines: numbers, or records with a length or a list of tokens."""

    file: str | None
    column: str | None = None
    """Key of a record; None takes the first of LENGTH_COLUMNS that the first record has."""

    def __post_init__(self) -> None:
        if self.file is None:
            raise ValueError("file must be the path of a data set, got none")
        check_file("file", self.file)
        if self.column is not None and not self.column:
            raise ValueError("column must be null or the key of a record, got ''")

    def lengths(self, rng: np.random.Generator) -> Ints:
        assert self.file is not None
        path = find_file(self.file)
        column = self.column
        lengths = []
        for row, record in json_records(path):
            column = _length_column(path, record) if column is None else column
            value = record.get(column)
            record = {column: len(value)} if isinstance(value, list) else record
            lengths.append(int(json_number(path, row, record, column, 1, whole=True)))
        return np.array(lengths, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneJob:
    """One job, as a config states it; the mapping's key is its id."""

    data: Samples
    epochs: int | None = None
    """Passes over the data set; None never ends."""
    shuffle: bool = True
    """A new order in every pass."""
    cutoff_len: int = 8192
    """Longer samples are cut to this many tokens."""
    accumulation: int = 8
    weight: float = 1.0
    start_s: float = 0.0
    order: str = "layer_major"
    memory: str = "stash"
    """One of MEMORIES, or auto: the compile plan and the free memory choose."""

    def __post_init__(self) -> None:
        if self.epochs is not None:
            check_whole("epochs", self.epochs, at_least=1)
        if not isinstance(self.shuffle, bool):
            raise ValueError(f"shuffle must be true or false, got {self.shuffle!r}")
        check_whole("cutoff_len", self.cutoff_len, at_least=1)
        check_whole("accumulation", self.accumulation, at_least=1)
        check_number("weight", self.weight, above=0)
        check_number("start_s", self.start_s, at_least=0)
        check_choice("order", self.order, ORDERS)
        check_choice("memory", self.memory, (*MEMORIES, AUTO))

    def samples(self, name: str, seed: int) -> Iterator[int]:
        """Tokens of each sample, in order."""
        lengths = np.minimum(self.data.lengths(stream(seed, f"samples {name}")), self.cutoff_len)
        rng = stream(seed, f"shuffle {name}") if self.shuffle else None
        return _passes(lengths, self.epochs, rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune:
    """All jobs of a run; they train adapters of one shape."""

    jobs: Mapping[str, FinetuneJob]
    lora: LoraSpec

    def samples(self, seed: int) -> dict[str, Iterator[int]]:
        """Job -> the lengths of its samples, for all pipelines to take from."""
        return {name: job.samples(name, seed) for name, job in self.jobs.items()}

    def specs(self, model: ModelShape) -> list[JobSpec]:
        """What each job is on a pipeline of `model`."""
        return [
            JobSpec(
                id=name,
                layers=model.layers,
                optimizer_params=self.lora.params(model),
                accumulation=job.accumulation,
                weight=job.weight,
                start_s=job.start_s,
                order=job.order,
                memory=job.memory,
            )
            for name, job in self.jobs.items()
        ]


def _passes(lengths: Ints, epochs: int | None, rng: np.random.Generator | None) -> Iterator[int]:
    for _ in count() if epochs is None else range(epochs):
        yield from (lengths if rng is None else rng.permutation(lengths)).tolist()


def _length_column(path: Path, record: dict[str, Any]) -> str:
    for column in LENGTH_COLUMNS:
        if column in record:
            return column
    if any(column in record for column in TEXT_COLUMNS):
        raise ValueError(
            f"{path}: holds text, whose length depends on a tokenizer; give lengths or lists of tokens "
            f"under {' or '.join(LENGTH_COLUMNS)}"
        )
    raise ValueError(f"{path}: row 1: no length under {' or '.join(LENGTH_COLUMNS)}, got {', '.join(record)}")
