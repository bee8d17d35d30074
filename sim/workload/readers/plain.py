"""A user's own trace: CSV with arrival_s, prompt_tokens, output_tokens and, if wanted, slo and adapter.

Times are taken as they are: 0 is the start of the run. An empty adapter is the base model, an empty slo the class
`default`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.workload.files import find_file
from sim.workload.readers.columns import make_table, read_csv, seconds_column, tokens_column
from sim.workload.table import RequestTable

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


LATEST_START_S = 1e8
"""Three years: a first arrival after that is a date, and a run would idle until it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvReader:
    """Reads a trace in the project's own columns; others are told and not read."""

    def read(self, file: str | Sequence[str]) -> RequestTable:
        path = find_file(file)
        columns = ("arrival_s", "prompt_tokens", "output_tokens")
        labels = ("slo", "adapter")
        frame = read_csv(path, columns, text=labels, optional=labels)
        arrival_s = seconds_column(path, frame, "arrival_s")
        if arrival_s.size and (first_s := arrival_s.min()) > LATEST_START_S:
            raise ValueError(
                f"{path}: column arrival_s must count seconds from the start of the run, "
                f"the first arrival is at {first_s:.0f} s"
            )
        prompt_tokens = tokens_column(path, frame, "prompt_tokens")
        output_tokens = tokens_column(path, frame, "output_tokens")
        more = _slos(path, frame) | _adapters(frame)
        return make_table(path, path.stem, arrival_s, prompt_tokens, output_tokens, rebase=False, **more)


def _slos(path: Path, frame: pd.DataFrame) -> dict[str, Any]:
    if "slo" not in frame:
        return {}
    stated = frame["slo"].replace("", "default").to_numpy(dtype=str)
    names, first, codes = np.unique(stated, return_index=True, return_inverse=True)
    return {
        "slo": codes.astype(np.int16),
        "slo_names": tuple(names.tolist()),
        "slo_places": tuple(f"{path}: row {row + 2}" for row in first.tolist()),
    }


def _adapters(frame: pd.DataFrame) -> dict[str, Any]:
    if "adapter" not in frame:
        return {}
    named = np.append("", frame["adapter"].to_numpy(dtype=str))
    names, codes = np.unique(named, return_inverse=True)
    return {"adapter": codes[1:].astype(np.int32), "adapter_names": tuple(names.tolist())}
