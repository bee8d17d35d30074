"""Plain text as training samples, and the byte tokenizer of models that have none of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.finetune import Sample
from sim.json_file import parse

BUNDLED = Path(__file__).parent / "data" / "harbour.json"
BYTES = 256
"""Vocabulary of the byte tokenizer: a token is a byte of UTF-8."""


def read_text(path: str | Path) -> str:
    """A text file, or the `text` of the records of a JSON list. ValueError names file and row."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None
    if path.suffix != ".json":
        return content
    try:
        records = parse(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, got {type(records).__name__}")
    texts = []
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f"{path}: row {row} must be a record with a text, got {record!r}")
        texts.append(record["text"])
    return "\n\n".join(texts)


def byte_tokens(text: str) -> NDArray[np.int32]:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def packed_samples(tokens: NDArray[np.int32], sample_tokens: int) -> list[Sample]:
    """Consecutive pieces of `sample_tokens`; a shorter rest is left out unless it is all there is."""
    if len(tokens) < 2:
        raise ValueError(f"a text must have at least 2 tokens to train on, got {len(tokens)}")
    count = max(1, len(tokens) // sample_tokens)
    pieces = [tokens[n * sample_tokens : (n + 1) * sample_tokens] for n in range(count)]
    return [Sample(piece, piece.astype(np.int64)) for piece in pieces]


def random_samples(count: int, sample_tokens: int, vocab: int) -> list[Sample]:
    """Tokens drawn from the whole vocabulary, the same for every run: for measuring, nothing to learn."""
    drawn = np.random.default_rng(0).integers(0, vocab, (count, sample_tokens), np.int32)
    return [Sample(tokens, tokens.astype(np.int64)) for tokens in drawn]


def passes(samples: Sequence[Sample], seed: int) -> Iterator[Sample]:
    """Endless passes over the samples, each in a new order."""
    random = np.random.default_rng(seed)
    while True:
        for index in random.permutation(len(samples)).tolist():
            yield samples[index]
