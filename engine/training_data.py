"""What a finetuning run trains on, and what it measures the loss of: datasets as samples."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.datasets import read_dataset
from engine.finetune import Sample
from engine.tokenizer import read_tokenizer
from engine.training_settings import Settings
from sim.errors import keys_as


class Data(NamedTuple):
    """Samples of a run."""

    trained: Sequence[Sample]
    held_out: Sequence[Sample]
    """Nothing is trained on these."""
    notes: Sequence[str]
    """What became of rows that are not whole among them."""


def read_data(settings: Settings) -> Data:
    """The samples of `dataset`, and those of `eval_dataset` or as many of `dataset` as `val_size` says. ValueError
    for a row that does not fit, and where nothing would be left to train on."""
    tokenizer = read_tokenizer(settings.model_name_or_path)
    notes = []

    def read(path: str) -> Sequence[Sample]:
        data = read_dataset(
            path,
            tokenizer,
            cutoff_len=settings.cutoff_len,
            max_samples=settings.max_samples,
            train_on_prompt=settings.train_on_prompt,
            packing=settings.packing,
        )
        if data.note is not None:
            notes.append(data.note)
        return data.samples

    samples = read(settings.dataset)
    if settings.eval_dataset is not None:
        with keys_as({"dataset ": "eval_dataset "}):
            return Data(samples, read(settings.eval_dataset), notes)
    if not settings.val_size:
        return Data(samples, (), notes)
    size = settings.val_size
    count = math.ceil(size * len(samples)) if size < 1 else int(size)
    if count >= len(samples):
        raise ValueError(
            f"val_size must leave something of {settings.dataset}'s {len(samples)} samples, got {size:g}"
        )
    order = np.random.default_rng(settings.seed).permutation(len(samples)).tolist()
    held_out, trained = ([samples[n] for n in sorted(part)] for part in (order[:count], order[count:]))
    return Data(trained, held_out, notes)


def fingerprint(samples: Iterable[Sample]) -> str:
    """Of all tokens and labels in their order, the same in every process: two that differ are of different data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.tokens).to_bytes(8, "little"))
        digest.update(sample.tokens.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()[:16]


class Counted:
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
