"""Mooncake traces: JSON lines with timestamp (ms), input_length, output_length, hash_ids.

Stamps are whole multiples of 3 s, so many requests share one. The hashes of 512-token prefix blocks
are not read: no cache of shared prefixes is simulated. https://github.com/kvcache-ai/Mooncake
(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.workload.files import find_file
from sim.workload.readers.columns import json_number, make_table, read_jsonl
from sim.workload.table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeReader:
    """Reads a Mooncake trace; times count from its first request."""

    def read(self, file: str | Sequence[str]) -> RequestTable:
        path = find_file(file)
        rows = [
            (
                json_number(path, line, record, "timestamp", 0, whole=False) / 1000,
                json_number(path, line, record, "input_length", 1, whole=True),
                json_number(path, line, record, "output_length", 1, whole=True),
            )
            for line, record in read_jsonl(path)
        ]
        arrival_s, *tokens = np.array(rows, np.float64).T
        prompt_tokens, output_tokens = (column.astype(np.int64) for column in tokens)
        return make_table(path, path.stem, arrival_s, prompt_tokens, output_tokens, rebase=True)
