"""Lengths of ShareGPT-style conversations, without arrivals: CSV, JSON list or JSON lines.

Known names of the pair of columns are in PAIRS. Records of text are refused: their length depends on a
tokenizer, which the simulator does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sim.json_file import parse
from sim.workload.files import find_file
from sim.workload.readers.columns import csv_header, json_lines, json_number, read_csv, tokens_column
from sim.workload.table import Ints

PAIRS = (
    ("prompt_tokens", "output_tokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("input_length", "output_length"),
    ("input_tokens", "output_tokens"),
    ("prompt_len", "output_len"),
    ("input_toks", "output_toks"),
)


def read_sharegpt(file: str) -> Ints:
    """Prompt and output lengths, shape (rows, 2)."""
    path = find_file(file)
    if path.suffix == ".csv":
        pair = _pair(path, csv_header(path, path.read_text(encoding="utf-8-sig", errors="replace")))
        frame = read_csv(path, pair)
        return np.stack([tokens_column(path, frame, column) for column in pair], axis=1)
    return _lengths(path, json_records(path))


def _lengths(path: Path, records: Iterable[tuple[int, dict[str, Any]]]) -> Ints:
    rows = []
    pair: tuple[str, str] | None = None
    for row, record in records:
        pair = pair or _pair(path, list(record))
        rows.append([int(json_number(path, row, record, column, 1, whole=True)) for column in pair])
    return np.array(rows, np.int64)


def json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place from 1, record) of JSON lines (.jsonl) or a JSON list. A pair of numbers stands for prompt
    and output, a number for the tokens of a sample."""
    values = json_lines(path) if path.suffix == ".jsonl" else enumerate(_json_list(path), start=1)
    for row, value in values:
        yield row, _record(path, row, value)


def _json_list(path: Path) -> list[Any]:
    try:
        values = parse(path.read_text(encoding="utf-8-sig", errors="replace"))
    except json.JSONDecodeError as error:
        lines = "; JSON lines must be in a file named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}: row {error.lineno}: not JSON: {error.msg}{lines}") from None
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: must be a list of records with lengths, not empty")
    return values


def _record(path: Path, row: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and len(value) == 2:
        return dict(zip(PAIRS[0], value, strict=True))
    if isinstance(value, (int, float)):
        return {"tokens": value}
    raise ValueError(f"{path}: row {row}: must be a record with lengths, got {str(value)[:60]!r}")


def _pair(path: Path, names: list[str]) -> tuple[str, str]:
    for pair in PAIRS:
        if pair[0] in names and pair[1] in names:
            return pair
    if "conversations" in names:
        raise ValueError(f"{path}: holds text, not lengths; count its tokens first")
    known = " or ".join("/".join(pair) for pair in PAIRS)
    raise ValueError(f"{path}: row 1: no columns with lengths ({known}), got {', '.join(names)}")
