"""Lengths alone, out of any file that a reader knows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sim.workload.config import TraceReader
from sim.workload.readers.azure import AzureReader
from sim.workload.readers.burstgpt import BurstGptReader
from sim.workload.readers.mooncake import MooncakeReader
from sim.workload.readers.plain import CsvReader
from sim.workload.readers.sharegpt import read_sharegpt
from sim.workload.table import Ints

TRACES: dict[str, Callable[[], TraceReader]] = {
    "azure": AzureReader,
    "burstgpt": BurstGptReader,
    "mooncake": MooncakeReader,
    "csv": CsvReader,
}
FORMATS = ("sharegpt", *TRACES)


def read_lengths(file: str, format: str) -> Ints:
    """Prompt and output lengths, shape (rows, 2); `format` is one of FORMATS."""
    if format == "sharegpt":
        return read_sharegpt(file)
    table = TRACES[format]().read(file)
    return np.stack([table.prompt_tokens, table.output_tokens], axis=1)
