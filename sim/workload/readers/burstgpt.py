"""BurstGPT traces: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type.

A row without response tokens is a call that failed at the server. What it would have asked for is not
known, so it is left out and counted, unless it is kept as a prompt answered by one token.
https://github.com/HPMLL/BurstGPT (CC-BY-4.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.errors import nearest
from sim.workload.checks import check_choice
from sim.workload.files import find_file
from sim.workload.readers.columns import make_table, read_csv, seconds_column, tokens_column
from sim.workload.table import RequestTable


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstGptReader:
    """Reads a BurstGPT trace; times count from the first request kept."""

    models: Sequence[str] | None = None
    """Values of `Model` to keep, such as ChatGPT or GPT-4; None keeps all."""
    log_types: Sequence[str] | None = None
    """Values of `Log Type` to keep, such as Conversation log or API log; None keeps all."""
    failures: str = "drop"

    def __post_init__(self) -> None:
        check_choice("workload.reader.failures", self.failures, ("drop", "keep"))
        for key in ("models", "log_types"):
            wanted = getattr(self, key)
            if wanted is not None and (isinstance(wanted, str) or len(wanted) == 0):
                shown = wanted if isinstance(wanted, str) else [*wanted]
                raise ValueError(f"workload.reader.{key} must be null or a list of names, got {shown!r}")

    def read(self, file: str | Sequence[str]) -> RequestTable:
        path = find_file(file)
        columns = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
        frame = read_csv(path, columns, text=("Model", "Log Type"))
        for column, wanted in (("Model", self.models), ("Log Type", self.log_types)):
            if wanted is None:
                continue
            known = [str(name) for name in frame[column].unique()]
            for name in wanted:
                if name not in known:
                    got = ", ".join(known)
                    raise ValueError(
                        f"{path}: no row has {column} {name!r}; there are {got}{nearest(name, known)}"
                    )
            frame = frame[frame[column].isin(list(wanted))]
        output_tokens = tokens_column(path, frame, "Response tokens", at_least=0)
        failed = output_tokens == 0
        count, total = int(failed.sum()), len(frame)
        if self.failures == "drop":
            frame, output_tokens = frame[~failed], output_tokens[~failed]
            note = f"{count} of {total} rows are failed calls and left out"
        else:
            output_tokens = np.maximum(output_tokens, 1)
            note = f"{count} of {total} rows are failed calls, kept with 1 output token"
        if len(frame) == 0:
            raise ValueError(f"{path}: all {total} rows are failed calls without response tokens")
        arrival_s = seconds_column(path, frame, "Timestamp")
        prompt_tokens = tokens_column(path, frame, "Request tokens")
        notes = (note,) if count else ()
        return make_table(path, path.stem, arrival_s, prompt_tokens, output_tokens, rebase=True, notes=notes)
