"""Azure LLM inference traces of 2023 and 2024: columns TIMESTAMP, ContextTokens, GeneratedTokens.

The files of 2023 stamp `2023-11-16 18:15:46.6805900`, those of 2024 `2024-05-10 00:00:00.009930+00:00`,
without the fraction when it is 0. https://github.com/Azure/AzurePublicDataset (CC-BY-4.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sim.workload.files import find_file
from sim.workload.readers.columns import make_table, read_csv, stamps_column, tokens_column
from sim.workload.table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureReader:
    """Reads an Azure trace; times count from its first request."""

    def read(self, file: str | Sequence[str]) -> RequestTable:
        path = find_file(file)
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        frame = read_csv(path, columns, text=columns[:1])
        arrival_s = stamps_column(path, frame, "TIMESTAMP")
        prompt_tokens = tokens_column(path, frame, "ContextTokens")
        output_tokens = tokens_column(path, frame, "GeneratedTokens")
        return make_table(path, path.stem, arrival_s, prompt_tokens, output_tokens, rebase=True)
